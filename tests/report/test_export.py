import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, ElectraConfig, ElectraForSequenceClassification, pipeline

from l2a.config import StudentConfig
from l2a.report.run_folder import check_parity, export_student
from l2a.student.presets import build_student
from l2a.student.student import load_checkpoint
from l2a.teacher.model import load_encoder
from l2a.util.errors import RunError
from tests.conftest import LABELS, make_examples, plain_tokenizer, save_tiny

TEXTS = make_examples(6).inputs


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


@pytest.mark.parametrize("inputs", [TEXTS, make_examples(4, pairs=True).inputs], ids=["single", "pairs"])
def test_saved_model_gives_the_same_logits(student, tokenizer, folder, inputs):
    assert check_parity(student, tokenizer, folder, inputs, 32) <= 1e-6


def test_checking_keeps_training_mode(student, tokenizer, folder):
    check_parity(student, tokenizer, folder, TEXTS, 32)
    assert student.training
    student.eval()
    check_parity(student, tokenizer, folder, TEXTS, 32)
    assert not student.training


def test_pipeline_names_the_classes(student, tokenizer, folder):
    classify = pipeline("text-classification", model=str(folder))
    answer = classify(TEXTS[0][0], top_k=None)
    expected = student.eval()(**tokenizer(TEXTS[0][0], return_tensors="pt")).logits.softmax(-1)[0]
    scores = {each["label"]: each["score"] for each in answer}
    assert scores == {name: pytest.approx(expected[i].item(), abs=1e-5) for i, name in enumerate(LABELS)}


@pytest.mark.parametrize(
    "damage", [lambda weight: weight + 0.1, lambda weight: weight * torch.nan], ids=["moved", "nan"]
)
def test_damaged_weights_are_refused(student, tokenizer, folder, damage):
    weights = load_file(folder / "model.safetensors")
    weights["classifier.weight"] = damage(weights["classifier.weight"])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match="logits differ"):
        check_parity(student, tokenizer, folder, TEXTS, 32)


def test_swapped_class_names_are_refused(student, tokenizer, folder):
    student.config.id2label = {0: LABELS[1], 1: LABELS[0]}
    with pytest.raises(RunError, match="saved with the classes"):
        check_parity(student, tokenizer, folder, TEXTS, 32)


def test_an_architecture_with_narrow_embeddings_is_kept_whole(tokenizer, tmp_path):
    config = ElectraConfig(
        vocab_size=len(tokenizer), embedding_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    model = ElectraForSequenceClassification(config)
    export_student(model, tokenizer, tmp_path / "electra", "", 32)
    assert check_parity(model, tokenizer, tmp_path / "electra", TEXTS, 32) <= 1e-6


PAIRS = make_examples(6, pairs=True).inputs


@pytest.fixture
def of_pairs(tokenizer, tmp_path):
    """A student of pairs whose teacher's tokenizer gives no token types and cuts nothing."""
    teacher = load_encoder(str(save_tiny("distilbert", tmp_path / "teacher", plain_tokenizer(tokenizer))), LABELS, 0)
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
    first, second = "good film", "it was bad"
    ids = of_pairs.tokenizer(first, second, return_tensors="pt")
    assert ids["token_type_ids"].sum() == 4
    expected = dict(zip(LABELS, of_pairs.model(**ids).logits.softmax(-1)[0].tolist(), strict=True))
    assert scores(tmp_path / "student", first, second) == pytest.approx(expected, abs=1e-5)


def test_a_saved_student_cuts_texts_where_it_was_trained_to(of_pairs, tmp_path):
    export_student(of_pairs.model, of_pairs.tokenizer, tmp_path / "student", "", 12)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert loaded.model_max_length == 12
    assert len(loaded("good " * 99, truncation=True)["input_ids"]) == 12
    saved = json.loads((tmp_path / "student" / "tokenizer.json").read_text())
    assert saved["truncation"] is None and saved["padding"] is None
    assert scores(tmp_path / "student", "good " * 9, "bad " * 99) == pytest.approx(
        scores(tmp_path / "student", "good " * 4, "bad " * 5), abs=1e-5
    )
    export_student(of_pairs.model, of_pairs.tokenizer, tmp_path / "student", "", 999)
    assert AutoTokenizer.from_pretrained(tmp_path / "student").model_max_length == of_pairs.positions
    assert sum(scores(tmp_path / "student", "good " * 999).values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("file", "setting"),
    [
        ("tokenizer_config.json", {"model_max_length": 40}),
        ("tokenizer_config.json", {"model_input_names": ["input_ids", "attention_mask"]}),
        ("config.json", {"problem_type": "multi_label_classification"}),
    ],
)
def test_a_folder_that_scores_otherwise_when_used_is_refused(of_pairs, tmp_path, file, setting):
    export_student(of_pairs.model, of_pairs.tokenizer, tmp_path / "student", "", 24)
    path = tmp_path / "student" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    with pytest.raises(RunError, match="scores and logits differ"):
        check_parity(of_pairs.model, of_pairs.tokenizer, tmp_path / "student", PAIRS, 24)


def test_settings_of_the_base_checkpoints_task_stay_behind(tokenizer, tmp_path):
    task = {"text-classification": {"num_labels": 5, "function_to_apply": "sigmoid", "top_k": 1}}
    foreign = {
        "task_specific_params": task, "finetuning_task": "mnli", "function_to_apply": "sigmoid",
        "problem_type": "multi_label_classification", "_name_or_path": "/home/me/base",
    }  # fmt: skip
    save_tiny("bert", tmp_path / "base", plain_tokenizer(tokenizer, padding_side="left"), **foreign)
    student = load_checkpoint(str(tmp_path / "base"), LABELS)
    export_student(student.model, student.tokenizer, tmp_path / "student", "", 24)
    saved = json.loads((tmp_path / "student" / "config.json").read_text())
    assert not saved.keys() & (foreign.keys() - {"problem_type"})
    assert saved["problem_type"] == "single_label_classification"
    assert saved["architectures"] == ["BertForSequenceClassification"]
    assert saved["id2label"] == {"0": LABELS[0], "1": LABELS[1]}
    assert AutoTokenizer.from_pretrained(tmp_path / "student").padding_side == "right"
    assert check_parity(student.model, student.tokenizer, tmp_path / "student", TEXTS, 24) < 1e-4
