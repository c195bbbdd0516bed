"""Files are classified line by line, and a student is measured on labelled texts."""

import csv
import io
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

from l2a.config import Columns
from l2a.data import readers
from l2a.data.domains import load_domain
from l2a.serving.classifier import Classifier, evaluate, labelled_texts, predict_file
from l2a.util import Progress, UsageError, files
from l2a.util.cluster import open_client
from tests.cli.conftest import run as run, stopped_after
from tests.conftest import Killing, labelled, make_examples, save_frame, write_domain

TEXTS = [text for (text,) in make_examples(30).inputs]
SENTENCES = list(make_examples(60).inputs)


def write(path, rows):
    frame = pd.DataFrame(rows)
    return save_frame(frame[["text"]] if ".txt" in path.name else frame, path)


def read(path):
    if ".parquet" in path.name:
        return pd.read_parquet(path)
    if ".jsonl" in path.name:
        return pd.read_json(path, lines=True)
    return pd.read_csv(path, sep="\t" if ".tsv" in path.name else ",")


FORMATS = [
    (".csv", ".jsonl"), (".tsv", ".csv.gz"), (".jsonl", ".parquet"), (".parquet", ".tsv"), (".csv.gz", ".jsonl.xz"),
    (".jsonl.xz", ".csv"), (".txt", ".csv"), (".txt.gz", ".jsonl"),
]  # fmt: skip


@pytest.mark.parametrize(("read_as", "written_as"), FORMATS)
def test_every_format_is_read_and_written_in_order(classifier, tmp_path, monkeypatch, read_as, written_as):
    monkeypatch.setattr(readers, "WINDOW", 7)  # several windows, the last not full
    source = write(tmp_path / f"in{read_as}", [{"number": i, "text": text} for i, text in enumerate(TEXTS)])
    done = predict_file(classifier, source, tmp_path / f"out{written_as}")
    found = read(tmp_path / f"out{written_as}")
    assert (done.lines, done.broken, done.abstained) == (30, 0, 0)
    assert list(found["text"]) == TEXTS
    assert ".txt" in read_as or list(found["number"].astype(int)) == list(range(30))
    assert list(found["label"]) == list(classifier.predict(TEXTS))
    expected = classifier.predict_proba(TEXTS)
    assert np.allclose(found[["p_mixed", "p_negative", "p_positive"]].to_numpy(), expected, atol=1e-4)
    assert np.allclose(found["confidence"], expected.max(axis=1), atol=1e-4) and len(set(found["label"])) > 1


BROKEN = {
    "too many fields": (b'3,"too, quoted",x\n', "3 fields, the header has 2"),
    "a stray quote": (b'3,"it was" bad\n', "a stray quote"),
    "a quote without an end": (b'3,"the film\n', "a stray quote"),
    "an empty text": (b"3, \n", "is empty"),
    "another encoding": ("3,très fine\n".encode("latin-1"), "not UTF-8"),
}


@pytest.mark.parametrize(("line", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_line_is_named_and_kept_and_costs_no_other(classifier, tmp_path, capsys, line, reason):
    content = b"id,text\n1,the film was good\n2,it is bad\n" + line + b'4,"a fine,\nlovely story"\n5,very poor\n'
    (tmp_path / "in.csv").write_bytes(content)
    with Progress() as progress:
        done = predict_file(classifier, tmp_path / "in.csv", tmp_path / "out.csv", progress=progress)
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert (done.lines, done.broken) == (5, 1)
    assert [bool(row["label"]) for row in rows] == [True, True, False, True, True]
    assert rows[3]["text"] == "a fine,\nlovely story" and rows[4]["id"] == "5"
    kept = ",".join(filter(None, (rows[2]["id"], rows[2]["text"])))
    shown = line.decode("utf-8", "surrogateescape").encode("utf-8", "backslashreplace").decode()
    assert kept.strip(", ") == shown.strip(", \n")
    assert f"in.csv, line 4: {reason}" in capsys.readouterr().err.replace("the column 'text' ", "")


def test_broken_json_and_values_that_are_no_text_are_kept(classifier, tmp_path):
    lines = ['{"text": "good", "n": 1}', '{"text": "bad', "[1]", '{"text": 5}', '{"text": "\\ud800 x"}', '{"n": 2}']
    (tmp_path / "in.jsonl").write_text("\n\n".join(lines))
    done = predict_file(classifier, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    assert (done.lines, done.broken) == (6, 5)
    assert [row["label"] is None for row in found] == [False, True, True, True, True, True]
    assert [row.get("text") for row in found] == ["good", '{"text": "bad', "[1]", 5, "\ud800 x", None]
    assert found[0]["n"] == 1 and found[5]["n"] == 2


def test_abstains_below_the_threshold_and_keeps_the_probabilities(classifier, tmp_path):
    confidence = classifier.predict_proba(TEXTS).max(axis=1)
    threshold = float(np.median(confidence))
    source = write(tmp_path / "in.txt", [{"text": text} for text in TEXTS])
    done = predict_file(classifier, source, tmp_path / "out.csv", threshold=threshold)
    found = read(tmp_path / "out.csv")
    assert done.abstained == int((confidence < threshold).sum()) > 0
    assert np.array_equal(found["label"].isna(), confidence < threshold)
    assert found["p_mixed"].notna().all()


def test_columns_of_the_input_are_never_replaced(classifier, tmp_path):
    write(tmp_path / "in.csv", [{"text": "good", "label": "mine", "confidence": 3, "predicted_label": "yours"}])
    predict_file(classifier, tmp_path / "in.csv", tmp_path / "out.csv")
    row = read(tmp_path / "out.csv").iloc[0]
    assert (row["label"], row["confidence"], row["predicted_label"]) == ("mine", 3, "yours")
    assert row["predicted_predicted_label"] in classifier.classes_ and 0 < row["predicted_confidence"] <= 1


def test_types_survive_from_parquet_to_parquet(classifier, tmp_path):
    frame = pd.DataFrame({"day": pd.to_datetime(["2026-01-02"]), "text": ["good"], "parts": [[1, 2]]})
    frame.to_parquet(tmp_path / "in.parquet")
    predict_file(classifier, tmp_path / "in.parquet", tmp_path / "out.parquet")
    found = pd.read_parquet(tmp_path / "out.parquet")
    assert found["day"][0] == frame["day"][0] and list(found["parts"][0]) == [1, 2]


def test_pairs_are_read_from_columns_and_from_tabs(classifier, tmp_path):
    pairs = [("the film was good", "it is bad"), ("very poor", "a fine story")]
    write(tmp_path / "in.csv", [{"text": "no", "a": a, "b": b} for a, b in pairs])
    (tmp_path / "in.txt").write_text("".join(f"{a}\t{b}\n" for a, b in pairs) + "alone\n")
    for name, columns, broken in (("in.csv", Columns("a", "b"), 0), ("in.txt", Columns(), 1)):
        out = tmp_path / f"{name}.tsv"
        assert predict_file(classifier, tmp_path / name, out, columns).broken == broken
        assert np.allclose(read(out)["p_mixed"][:2], classifier.predict_proba(pairs)[:, 0], atol=1e-5)


@pytest.fixture
def interrupted(tmp_path, monkeypatch, saved_after_every_step):
    """Starts to classify 30 lines, 7 at a time, and is stopped in the third piece; gives the input."""
    monkeypatch.setattr(readers, "WINDOW", 7)
    source = write(tmp_path / "in.jsonl", [{"text": text if i != 9 else ""} for i, text in enumerate(TEXTS)])

    def start(classifier, output):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Classifier, "predict_proba", stopped_after(2, Classifier.predict_proba))
            predict_file(classifier, source, output)
        return source

    return start


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv.gz", "out.parquet"])
def test_a_killed_run_goes_on_and_writes_the_bytes_of_a_whole_one(classifier, interrupted, tmp_path, monkeypatch, name):
    source, place = interrupted(classifier, tmp_path / name), tmp_path / "elsewhere"
    expected = predict_file(classifier, source, place / name)
    (tmp_path / f".{name}.l2a-new.killed").write_text("half")
    with (tmp_path / f".{name}{files.CHECKPOINT}" / "made").open("ab") as made:
        made.write(b"torn")  # written after the last state
    asked, original = [], Classifier.predict_proba
    monkeypatch.setattr(Classifier, "predict_proba", lambda self, texts: asked.extend(texts) or original(self, texts))
    assert predict_file(classifier, source, tmp_path / name) == expected == (30, 1, 0)
    assert [text for (text,) in asked] == TEXTS[14:]
    content = (tmp_path / name).read_bytes()
    assert content == (place / name).read_bytes()
    assert ".gz" not in name or content[4:8] == bytes(4)  # where gzip keeps the time
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", name, "elsewhere"}


def test_what_was_kept_of_another_request_is_not_used(classifier, interrupted, student, tmp_path):
    mine, output = shutil.copytree(student, tmp_path / "mine"), tmp_path / "out.jsonl"
    source = interrupted(Classifier.from_pretrained(mine), output)

    def refused(classifier, difference, **settings):
        with pytest.raises(UsageError, match=rf"out\.jsonl\.l2a-checkpoint keeps .*{difference}"):
            predict_file(classifier, source, output, **settings)

    refused(classifier, '"student": ".*" there')
    refused(Classifier(mine), '"threshold": 0.0 there, "threshold": 0.5 here', threshold=0.5)
    refused(Classifier(mine), '"text": null there, "text": "text" here', columns=Columns("text"))
    (mine / files.MARK).write_text('{"temperature": 2}')
    refused(Classifier(mine), r'"sha256 of .*mine/l2a\.json"')
    (mine / files.MARK).unlink()
    content = source.read_text()
    source.write_text(content.replace("film", "book"))
    refused(Classifier(mine), r'"sha256 of .*in\.jsonl"')
    source.write_text(content)
    assert predict_file(Classifier(mine), source, output).lines == 30 and not list(tmp_path.glob(".*"))


def test_damage_to_what_was_kept_only_costs_time(classifier, interrupted, tmp_path):
    source = interrupted(classifier, tmp_path / "out.jsonl")
    kept = tmp_path / f".out.jsonl{files.CHECKPOINT}" / "made"
    kept.write_bytes(bytes(kept.stat().st_size))
    predict_file(classifier, source, tmp_path / "out.jsonl")
    predict_file(classifier, source, tmp_path / "whole.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_pipe_is_read_once_and_nothing_of_it_is_kept(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr("l2a.serving.classifier.sha256_file", None)  # it would read the pipe too
    os.mkfifo(tmp_path / "pipe.txt")
    with ThreadPoolExecutor(1) as pool:
        pool.submit((tmp_path / "pipe.txt").write_text, "\n".join(TEXTS))
        assert predict_file(classifier, tmp_path / "pipe.txt", tmp_path / "out.csv").lines == 30
    assert {path.name for path in tmp_path.iterdir()} == {"pipe.txt", "out.csv"}


@pytest.fixture(scope="session")
def labels(classifier):
    """What the student says, but for every fourth text."""
    names = classifier.classes_.tolist()
    return [names[(names.index(it) + (i % 4 == 0)) % 3] for i, it in enumerate(classifier.predict(SENTENCES))]


def test_numbers_are_those_of_scikit_learn(classifier, labels):
    found, predicted = evaluate(classifier, SENTENCES, labels), classifier.predict(SENTENCES)
    assert found.metrics.accuracy.value == accuracy_score(labels, predicted) == 0.75
    assert found.metrics.macro_f1.value == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert found.confusion.sum() == 60 and np.trace(found.confusion) == 45
    assert found.confusion[0].sum() == labels.count(found.classes[0])
    assert np.allclose(found.scores.T, precision_recall_fscore_support(labels, predicted)[:3])


def test_the_most_confident_errors_come_first(classifier, labels):
    errors = evaluate(classifier, SENTENCES, labels).errors
    confidences = [error["confidence"] for error in errors]
    assert len(errors) == 15 and confidences == sorted(confidences, reverse=True)
    assert all(error["predicted"] == classifier.predict([error["text"]])[0] != error["label"] for error in errors)


def test_a_label_that_the_student_does_not_know_is_refused(classifier):
    with pytest.raises(UsageError, match=r"'postive' is not a class .*did you mean 'positive'"):
        evaluate(classifier, SENTENCES[:1], ["postive"])


def test_the_test_split_is_used_where_there_is_one(tmp_path):
    path = write_domain(tmp_path / "domain.jsonl", 20, seed=1)
    assert labelled_texts(str(path))[0] == list(load_domain(path).test.reveal().inputs)
    frame = pd.read_json(path, lines=True).drop(columns="split")
    texts, labels = labelled_texts(str(write(tmp_path / "plain.csv", frame)))
    assert [text for (text,) in texts] == list(frame["text"]) and labels == list(frame["label"])


def test_a_file_that_the_run_trained_on_is_read_as_the_run_tested_on_it(tmp_path):
    mine = str(write(tmp_path / "mine.csv", pd.DataFrame(labelled(60, 1), columns=["text", "label"])))
    digest = readers.read_table(tmp_path / "mine.csv").digest
    (tmp_path / "metrics.json").write_text(json.dumps({"files": {"mine.csv": digest}}))
    assert labelled_texts(mine, run=tmp_path)[0] == list(load_domain(mine).test.reveal().inputs)
    assert len(labelled_texts(mine, run=tmp_path)[0]) < 60 == len(labelled_texts(mine)[0])


def test_commands_predict_and_evaluate(run, run_folder, labels, tmp_path, monkeypatch):
    source, output = tmp_path / "in.csv", tmp_path / "out.jsonl"
    write(source, {"text": [text for (text,) in SENTENCES], "label": labels})
    code, out, err = run("predict", str(run_folder), str(source), "--output", str(output))
    assert code == 0 and "60 lines, 0 broken ones kept" in err and len(output.read_text().splitlines()) == 60
    code, _, err = run("predict", str(run_folder), str(source), "--output", str(source), "--overwrite")
    assert code == 2 and source.read_text().startswith("text,label\n")
    code, out, _ = run("evaluate", str(run_folder), str(source), "--output", str(tmp_path / "errors.csv"))
    assert code == 0 and "accuracy 75.0%" in out and "as mixed" in out
    assert len(pd.read_csv(tmp_path / "errors.csv")) == 15


def test_standard_input_and_output_are_text_lines(run, run_folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"good film\nbad story\n")))
    code, out, _ = run("predict", str(run_folder), "-")
    header, first, _ = out.splitlines()
    assert code == 0 and header.split("\t")[:3] == ["text", "label", "confidence"] and first.startswith("good film\t")
    assert run("predict", str(run_folder), "-", "--format", "parquet")[0] == 2


@pytest.mark.slow
def test_a_cluster_gives_every_line_once_and_in_order_though_a_worker_is_killed(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "WINDOW", 128)
    rows = [{"number": i, "text": TEXTS[i * 7 % 30] if i % 100 else ""} for i in range(2_000)]
    source = write(tmp_path / "in.jsonl", rows)
    here = predict_file(classifier, source, tmp_path / "here.jsonl")
    with open_client(2) as client:
        progress = Killing(client)
        there = predict_file(classifier, source, tmp_path / "there.jsonl", progress=progress, client=client)
    assert progress.killed and here == there == (2_000, 20, 0)
    assert (tmp_path / "there.jsonl").read_bytes() == (tmp_path / "here.jsonl").read_bytes()
