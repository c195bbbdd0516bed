import json
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertForSequenceClassification, pipeline

from l2a.config import StudentConfig
from l2a.evaluation.metrics import ClassificationMetrics, Interval
from l2a.generator.chain import CandidatePool
from l2a.report import run_folder as report
from l2a.report.run_folder import check_parity, export_student
from l2a.selector.problem import Selection
from l2a.student.student import build_student, class_names, load_checkpoint
from l2a.teacher.labelling import TeacherOutputs
from l2a.teacher.model import load_encoder
from l2a.util.errors import RunError
from tests.conftest import LABELS, make_examples, plain_tokenizer, save_tiny, tiny_bert_config

TEXTS, PAIRS = make_examples(6).inputs, make_examples(6, pairs=True).inputs
STATUS = Path("/proc/self/status")


LATENCY = {"batch_1": 1.234, "batch_1_spread": 0.1, "batch_32": 0.5, "batch_32_spread": 0.02}


def make_row(accuracy):
    ends = Interval(accuracy, accuracy - 0.05, accuracy + 0.05)
    metrics = ClassificationMetrics(ends, Interval(accuracy - 0.01, accuracy - 0.06, accuracy + 0.04))
    return report.MethodReport("tfidf_logreg", metrics, 1234567, LATENCY)


@pytest.fixture
def student(tokenizer):
    torch.manual_seed(0)
    return BertForSequenceClassification(tiny_bert_config(tokenizer, **class_names(LABELS))).train()


def test_cells_are_percentages_with_intervals():
    expected = ("tfidf_logreg", "70.0 (65.0-75.0)", "69.0", "1.23 M", "1.23±0.10", "0.50±0.02")
    assert report.short_cells([make_row(0.7)]) == [expected]
    assert len(expected) == len(report.SHORT_HEADERS)


def test_metrics_have_the_promised_fields():
    metrics = json.loads(json.dumps(report.metrics_content([make_row(0.7)], {"rounds": [1]})))
    assert metrics.keys() == {"rows", "peak_memory_mb", "versions", "date", "threads", "rounds"}
    assert metrics["rows"][0] == {
        "name": "tfidf_logreg",
        "accuracy": {"value": 0.7, "low": pytest.approx(0.65), "high": pytest.approx(0.75)},
        "macro_f1": {"value": pytest.approx(0.69), "low": pytest.approx(0.64), "high": pytest.approx(0.74)},
        "parameters": 1234567, "latency_ms": LATENCY,
    }  # fmt: skip
    assert {"python", "l2a", "torch", "transformers"} <= metrics["versions"].keys() and metrics["threads"] == 1


def test_a_number_that_is_not_finite_is_refused_with_its_row():
    with pytest.raises(RunError, match=r"tfidf_logreg is not finite"):
        report.metrics_content([make_row(math.nan)], {})


@pytest.mark.skipif(not STATUS.exists(), reason="the reference is Linux's own record")
def test_peak_memory_is_the_high_water_mark_in_megabytes():
    mark = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    assert report.peak_memory_mb() == pytest.approx(int(mark[1]) * 1024 / 1e6, rel=0.02)


def written(path, *rounds):
    """Write rounds of candidates, the first of each and every second one kept, and read them back."""
    drawn = []
    for inputs in rounds:
        size, zeros = len(inputs), np.zeros(len(inputs), np.float32)
        outputs = TeacherOutputs(np.zeros((size, 2), np.float32), np.zeros((size, 4), np.float32))
        origins, scores = tuple(f"source:{i}" for i in range(size)), np.arange(size, dtype=np.float32)
        pool = CandidatePool(inputs, origins, ("knn",) * size, 2 * scores, outputs, zeros, zeros, zeros)
        drawn.append((pool, Selection(np.arange(size) % 2 == 0, scores, "random", {})))
    report.write_augmentations(path, drawn)
    return pd.read_parquet(path)


def test_every_candidate_of_every_round_is_written(tmp_path):
    frame = written(tmp_path / "augmentations.parquet", (("one",), ("two",)), (("three",),))
    expected = {
        "text": ["one", "two", "three"], "text_pair": ["-"] * 3, "origin": ["source:0", "source:1", "source:0"],
        "operator": ["knn"] * 3, "degree": [0, 2, 0], "teacher_probabilities": [[0.5, 0.5]] * 3,
        "selector_score": [0, 1, 0], "kept": [True, False, True], "round": [0, 0, 1],
    }  # fmt: skip
    frame = frame.fillna({"text_pair": "-"})
    frame["teacher_probabilities"] = frame["teacher_probabilities"].map(list)
    assert frame.to_dict("list") == expected and list(frame.columns) == list(expected)
    empty = written(tmp_path / "none.parquet")
    assert list(empty.columns) == list(expected) and empty.empty


def test_any_text_is_read_back_but_for_lone_surrogates(tmp_path):
    inputs = (("\ud800 end", "bad \ud83d"), ('\x00\r\n,"', ""), ("", "\U0001f600\u2028"))
    frame = written(tmp_path / "odd.parquet", inputs)
    assert list(zip(frame["text"], frame["text_pair"], strict=True)) == [("? end", "bad ?"), *inputs[1:]]


@pytest.fixture
def folder(student, tokenizer, tmp_path):
    export_student(student, tokenizer, tmp_path / "student", "# card\n", 32)
    return tmp_path / "student"


def test_folder_is_complete_and_holds_no_pickle(folder):
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= names
    assert not {path.suffix for path in folder.iterdir()} & {".bin", ".pt", ".pkl", ".pth"}
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in folder.iterdir())
    assert (folder / "README.md").read_text() == "# card\n"


@pytest.mark.parametrize("inputs", [TEXTS, PAIRS], ids=["single", "pairs"])
def test_saved_model_gives_the_same_logits_and_keeps_its_mode(student, tokenizer, folder, inputs):
    for training in (True, False):
        assert check_parity(student.train(training), tokenizer, folder, inputs, 32) <= 1e-6
        assert student.training == training


def test_a_folder_with_other_weights_or_names_is_refused(student, tokenizer, folder):
    kept = load_file(folder / "model.safetensors")
    for change in (0.1, torch.nan):
        weights = kept | {"classifier.weight": kept["classifier.weight"] + change}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(RunError, match="logits differ"):
            check_parity(student, tokenizer, folder, TEXTS, 32)
    student.config.id2label = {0: LABELS[1], 1: LABELS[0]}
    with pytest.raises(RunError, match="saved with the classes"):
        check_parity(student, tokenizer, folder, TEXTS, 32)


@pytest.fixture(scope="module")
def of_pairs(tokenizer, tmp_path_factory):
    """A student of pairs whose teacher's tokenizer gives no token types and cuts nothing."""
    folder = tmp_path_factory.mktemp("teacher")
    teacher = load_encoder(str(save_tiny("distilbert", folder, plain_tokenizer(tokenizer))), LABELS, 0)
    student = build_student(StudentConfig(max_share=0.9), teacher, LABELS, PAIRS, 0)
    for parameter in student.model.parameters():  # far from its start, so that nothing is read in vain
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    return student


def scores(folder, *sides):
    answer = pipeline("text-classification", model=str(folder), truncation=True)
    asked = dict(zip(("text", "text_pair"), sides, strict=False))
    return {each["label"]: each["score"] for each in answer(asked, top_k=None)}


def test_a_saved_student_of_pairs_tells_the_sides_apart_by_itself(of_pairs, tmp_path):
    export_student(of_pairs.model, of_pairs.tokenizer, tmp_path / "student", "", 24)
    assert check_parity(of_pairs.model, of_pairs.tokenizer, tmp_path / "student", PAIRS, 24) < 1e-4
    ids = of_pairs.tokenizer("good film", "it was bad", return_tensors="pt")
    assert ids["token_type_ids"].sum() == 4
    expected = dict(zip(LABELS, of_pairs.model(**ids).logits.softmax(-1)[0].tolist(), strict=True))
    assert scores(tmp_path / "student", "good film", "it was bad") == pytest.approx(expected, abs=1e-5)


def test_a_saved_student_cuts_texts_where_it_was_trained_to(of_pairs, tmp_path):
    export_student(of_pairs.model, of_pairs.tokenizer, folder := tmp_path / "student", "", 12)
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.model_max_length == len(loaded("good " * 99, truncation=True)["input_ids"]) == 12
    saved = json.loads((folder / "tokenizer.json").read_text())
    assert saved["truncation"] is None and saved["padding"] is None
    cut = scores(folder, "good " * 4, "bad " * 5)
    assert scores(folder, "good " * 9, "bad " * 99) == pytest.approx(cut, abs=1e-5)
    export_student(of_pairs.model, of_pairs.tokenizer, folder, "", 999)
    assert AutoTokenizer.from_pretrained(folder).model_max_length == of_pairs.positions
    assert sum(scores(folder, "good " * 999).values()) == pytest.approx(1)


SETTINGS = [
    ("tokenizer_config.json", {"model_max_length": 40}),
    ("tokenizer_config.json", {"model_input_names": ["input_ids", "attention_mask"]}),
    ("config.json", {"problem_type": "multi_label_classification"}),
]


def test_a_folder_that_scores_otherwise_when_used_is_refused(of_pairs, tmp_path):
    for file, setting in SETTINGS:
        export_student(of_pairs.model, of_pairs.tokenizer, tmp_path / "student", "", 24)
        path = tmp_path / "student" / file
        path.write_text(json.dumps(json.loads(path.read_text()) | setting))
        with pytest.raises(RunError, match="scores and logits differ"):
            check_parity(of_pairs.model, of_pairs.tokenizer, tmp_path / "student", PAIRS, 24)


@pytest.mark.parametrize("kind", ["bert", "electra"])  # whose embeddings are narrow
def test_settings_of_the_base_checkpoints_task_stay_behind(tokenizer, tmp_path, kind):
    task = {"text-classification": {"num_labels": 5, "function_to_apply": "sigmoid", "top_k": 1}}
    foreign = {
        "task_specific_params": task, "finetuning_task": "mnli", "function_to_apply": "sigmoid",
        "problem_type": "multi_label_classification", "_name_or_path": "/home/me/base",
    }  # fmt: skip
    folder = save_tiny(kind, tmp_path / "base", plain_tokenizer(tokenizer, padding_side="left"), **foreign)
    student = load_checkpoint(str(folder), LABELS)
    export_student(student.model, student.tokenizer, tmp_path / "student", "", 24)
    saved = json.loads((tmp_path / "student" / "config.json").read_text())
    assert not saved.keys() & (foreign.keys() - {"problem_type"})
    assert saved["problem_type"] == "single_label_classification"
    assert saved["architectures"] == [f"{kind.title()}ForSequenceClassification"]
    assert saved["id2label"] == {"0": LABELS[0], "1": LABELS[1]}
    assert AutoTokenizer.from_pretrained(tmp_path / "student").padding_side == "right"
    assert check_parity(student.model, student.tokenizer, tmp_path / "student", TEXTS, 24) < 1e-4
