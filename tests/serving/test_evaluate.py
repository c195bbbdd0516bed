"""A student on labelled texts: numbers, errors, and which texts count as a test."""

import io
import json
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, f1_score

from l2a.data.domains import load_domain
from l2a.data.readers import read_table
from l2a.serving import export as module
from l2a.serving.classifier import Classifier, evaluate, labelled_texts
from l2a.util.errors import UsageError
from tests.cli.conftest import run as run
from tests.conftest import make_examples, write_domain

INPUTS = list(make_examples(60).inputs)


@pytest.fixture(scope="session")
def classifier(student):
    return Classifier.from_pretrained(student)


@pytest.fixture(scope="session")
def labels(classifier):
    """What the student says, but for every fourth text."""
    names = classifier.classes_.tolist()
    found = classifier.predict(INPUTS)
    return [names[(names.index(name) + (i % 4 == 0)) % 3] for i, name in enumerate(found)]


def test_numbers_are_those_of_scikit_learn(classifier, labels):
    found, predicted = evaluate(classifier, INPUTS, labels), classifier.predict(INPUTS)
    assert found.metrics.accuracy.value == accuracy_score(labels, predicted) == 0.75
    assert found.metrics.macro_f1.value == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert found.confusion.sum() == 60 and np.trace(found.confusion) == 45
    first = [name == found.classes[0] for name in labels]
    assert found.confusion[0].sum() == sum(first)
    assert np.allclose(found.scores[:, 2], f1_score(labels, predicted, average=None))


def test_the_most_confident_errors_come_first(classifier, labels):
    errors = evaluate(classifier, INPUTS, labels).errors
    confidences = [error["confidence"] for error in errors]
    assert len(errors) == 15 and confidences == sorted(confidences, reverse=True)
    assert all(error["predicted"] == classifier.predict([error["text"]])[0] != error["label"] for error in errors)


def test_a_label_that_the_student_does_not_know_is_refused(classifier):
    with pytest.raises(UsageError, match=r"'postive' is not a class .*did you mean 'positive'"):
        evaluate(classifier, INPUTS[:1], ["postive"])


def test_the_test_split_is_used_where_there_is_one(tmp_path):
    path = write_domain(tmp_path / "domain.jsonl", 20, seed=1)
    assert labelled_texts(str(path))[0] == list(load_domain(path).test.reveal().inputs)
    frame = pd.read_json(path, lines=True)
    frame.drop(columns="split").to_csv(tmp_path / "plain.csv", index=False)
    texts, labels = labelled_texts(str(tmp_path / "plain.csv"))
    assert [text for (text,) in texts] == list(frame["text"]) and labels == list(frame["label"])


def test_a_file_that_the_run_trained_on_is_read_as_the_run_tested_on_it(tmp_path):
    frame = pd.read_json(write_domain(tmp_path / "domain.jsonl", 60, seed=1), lines=True)
    frame.drop(columns="split").to_csv(tmp_path / "mine.csv", index=False)
    mine, digest = str(tmp_path / "mine.csv"), read_table(tmp_path / "mine.csv").digest
    (tmp_path / "metrics.json").write_text(json.dumps({"files": {"mine.csv": digest}}))
    assert labelled_texts(mine, run=tmp_path)[0] == list(load_domain(mine).test.reveal().inputs)
    assert len(labelled_texts(mine, run=tmp_path)[0]) < 60 == len(labelled_texts(mine)[0])


def test_commands_predict_and_evaluate(run, run_folder, labels, tmp_path, monkeypatch):
    frame = pd.DataFrame({"text": [text for (text,) in INPUTS], "label": labels})
    source, output = tmp_path / "in.csv", tmp_path / "out.jsonl"
    frame.to_csv(source, index=False)
    code, out, err = run("predict", str(run_folder), str(source), "--output", str(output))
    assert code == 0 and "60 lines, 0 broken ones kept" in err and len(output.read_text().splitlines()) == 60
    code, _, err = run("predict", str(run_folder), str(source), "--output", str(output))
    assert code == 2 and "add --overwrite" in err
    code, _, err = run("predict", str(run_folder), str(source), "--output", str(source), "--overwrite")
    assert code == 2 and source.read_text().startswith("text,label\n")
    code, out, _ = run("evaluate", str(run_folder), str(source), "--output", str(tmp_path / "errors.csv"))
    assert code == 0 and "accuracy 75.0%" in out and "as mixed" in out
    assert len(pd.read_csv(tmp_path / "errors.csv")) == 15
    assert run("evaluate", str(tmp_path), str(source))[0] == 2


def test_standard_input_and_output_are_text_lines(run, run_folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"good film\nbad story\n")))
    code, out, _ = run("predict", str(run_folder), "-")
    header, first, _ = out.splitlines()
    assert code == 0 and header.split("\t")[:3] == ["text", "label", "confidence"] and first.startswith("good film\t")
    assert run("predict", str(run_folder), "-", "--format", "parquet")[0] == 2
    assert run("predict", str(run_folder), "-", "--threshold", "2")[0] == 2


def test_the_export_command_shows_what_it_measured(run, run_folder, tmp_path, monkeypatch):
    latency = {"batch_1": 1.0, "batch_1_spread": 0.1, "batch_32": 0.5, "batch_32_spread": 0.1}
    monkeypatch.setattr(module, "measure_latency", lambda predict, texts: latency)
    monkeypatch.setitem(module.TOLERANCES, "model_int8.onnx", module.Tolerance(0.5, 0.9, 0.9))
    shutil.copytree(run_folder / "student", tmp_path / "student")
    (tmp_path / "texts.txt").write_text("".join(f"{text}\n" for (text,) in INPUTS))
    code, out, _ = run("export", str(tmp_path), "--texts", str(tmp_path / "texts.txt"))
    assert code == 0 and "model_int8.onnx" in out and "opset 17, compared on 60 texts" in out
