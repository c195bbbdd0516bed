"""Exports answer as the student does, run without torch, and are refused where they do not."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest

import l2a
from l2a.cli.app import export_command
from l2a.serving import export as module
from l2a.serving.classifier import write_temperature
from l2a.serving.export import comparison_texts, export_onnx
from l2a.util import RunError, UsageError
from l2a.util.files import output_folder, read_mark
from tests.conftest import make_examples

PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text("utf-8")
INPUTS = list(make_examples(40).inputs)
LATENCY = {"batch_1": 1.0, "batch_1_spread": 0.1, "batch_32": 0.5, "batch_32_spread": 0.1}
LOOSE = {"agreement": 0.8, "difference": 5, "accuracy": 0.2}
"""Large random weights lose more in 8 bits than trained ones."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(module, "measure_latency", lambda predict, texts: predict(texts) is None or LATENCY)


@pytest.fixture(scope="session")
def run(run_folder, tmp_path_factory):
    """A finished run that was exported."""
    run = tmp_path_factory.mktemp("exported") / "run"
    with output_folder(run, "run") as folder:
        shutil.copytree(run_folder / "student", folder / "student")
        write_temperature(folder / "student", 1.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "measure_latency", lambda predict, texts: LATENCY)
        for name in ("model_int8.onnx", "model_int8_static.onnx"):
            patch.setitem(module.TOLERANCES, name, LOOSE)
        export_onnx(str(run), INPUTS, l2a.Classifier(run).predict(INPUTS), static=True)
    return run


EXPORTED = {"model.onnx": 1e-5, "model_int8.onnx": 0.5, "model_int8_static.onnx": 0.5}
"""What an export writes, and how far a probability may be from the student's."""


@pytest.mark.parametrize(("name", "difference"), EXPORTED.items())
def test_an_export_answers_as_the_student_at_any_batch_and_length(run, name, difference):
    torch, exported = l2a.Classifier.from_pretrained(run), l2a.Classifier.from_pretrained(run / "onnx" / name)
    assert exported.engine.temperature == 1.5 and list(exported.classes_) == list(torch.classes_)
    for inputs in (INPUTS, INPUTS[:1], [("good " * 60,)], list(make_examples(5, pairs=True).inputs)):
        assert np.abs(exported.predict_proba(inputs) - torch.predict_proba(inputs)).max() < difference


def test_the_report_holds_what_was_measured(run):
    report = json.loads((run / "onnx" / "export.json").read_text())
    assert (report["texts"], report["opset"]) == (40, 17)
    original, whole, small, static = report["models"]
    assert [model["file"] for model in report["models"]] == ["model.safetensors", *EXPORTED]
    assert original["accuracy"] == whole["accuracy"] == 1.0 and whole["label_agreement"] == 1.0
    assert 0 < whole["largest_logit_difference"] < 1e-4 < small["largest_logit_difference"]
    assert small["bytes"] == (run / "onnx" / "model_int8.onnx").stat().st_size < 0.6 * original["bytes"]
    assert whole["latency_ms"] == LATENCY
    # Fixed scales of activations are in the file, calibrated on texts; those of model_int8.onnx follow each text, as
    # those that a layer's narrowing product reads do in both.
    graphs = [onnx.load(run / "onnx" / one["file"]).graph for one in (small, static)]
    kinds = [Counter(node.op_type for node in graph.node) for graph in graphs]
    layers = json.loads((run / "onnx" / "config.json").read_text())["num_hidden_layers"]
    assert kinds[0]["DynamicQuantizeLinear"] > kinds[1]["DynamicQuantizeLinear"] == layers
    assert kinds[0]["QuantizeLinear"] == 0 < kinds[1]["QuantizeLinear"]
    assert all(onnx.TensorProto.INT8 not in {one.data_type for one in graph.initializer} for graph in graphs)
    assert onnx.load(run / "onnx" / "model.onnx").opset_import[0].version == 17
    assert {"onnx/model.onnx", "onnx/export.json", "student/config.json"} <= read_mark(run / "l2a.json")["files"].keys()


WRONG = [
    ("model.onnx", {"agreement": 1.01, "difference": 1, "accuracy": 1}, "labels are the PyTorch student's"),
    ("model_int8.onnx", {"agreement": 0, "difference": 1e-9, "accuracy": 1}, "a logit differs by"),
    ("model_int8.onnx", {"agreement": 0, "difference": 99, "accuracy": 0.99}, "less accurate by 100.0%"),
]


@pytest.fixture
def again(run, tmp_path, monkeypatch):
    """The student of the run, whose next export has the models of the last one."""
    copy = partial(shutil.copytree, run / "onnx", ignore=shutil.ignore_patterns(module.STATIC), dirs_exist_ok=True)
    monkeypatch.setattr(module, "_write", lambda _, folder, calibration: copy(folder))
    monkeypatch.setitem(module.TOLERANCES, "model_int8.onnx", LOOSE)
    shutil.copytree(run / "student", tmp_path / "student")
    return tmp_path


@pytest.mark.parametrize(("name", "tolerance", "reason"), WRONG)
def test_a_model_beyond_its_tolerance_is_not_kept(again, monkeypatch, name, tolerance, reason):
    monkeypatch.setitem(module.TOLERANCES, name, tolerance)
    labels, answer = l2a.Classifier(again).predict(INPUTS), module.run

    def other_classes(engine, texts):
        is_wrong = getattr(engine.model, "_model_path", "").endswith(f"/{name}")
        return np.roll(answer(engine, texts), 1, axis=1) if is_wrong else answer(engine, texts)

    if "accurate" in reason:
        monkeypatch.setattr(module, "run", other_classes)
    with pytest.raises(RunError, match=f"{name} is refused, on 40 texts .*{reason}"):
        export_onnx(str(again), INPUTS, labels)
    kept = {path.name for path in (again / "onnx").glob("*.onnx")}
    assert kept == {"model.onnx", "model_int8.onnx"} - {name}


def test_a_single_labelled_text_may_be_lost():
    limits = module.TOLERANCES["model_int8.onnx"]
    for labelled, lost, words in ((40, 1, ""), (40, 2, "less accurate by 5.0% (allowed: 2.5%)"), (1000, 10, ""),
                                  (1000, 11, "less accurate by 1.1% (allowed: 1.0%)")):  # fmt: skip
        found = {"label_agreement": 1.0, "largest_logit_difference": 0.0, "accuracy": 0.9 - lost / labelled}
        problem = module._beyond(found, {"accuracy": 0.9}, limits, 1 / labelled)
        assert words in problem and bool(words) == bool(problem)


def test_the_labels_belong_to_the_first_texts(again):
    report = export_onnx(str(again), INPUTS, ["no class"] * 5 + l2a.Classifier(again).predict(INPUTS[5:10]).tolist())
    assert report["labelled"] == 10 and [model["accuracy"] for model in report["models"][:2]] == [0.5, 0.5]


def test_a_static_model_comes_without_advice(run, tmp_path, monkeypatch, caplog):
    for name in ("model_int8.onnx", "model_int8_static.onnx"):
        monkeypatch.setitem(module.TOLERANCES, name, LOOSE)
    shutil.copytree(run / "student", tmp_path / "student")
    assert len(export_onnx(str(tmp_path), INPUTS, static=True)["models"]) == 4 and not caplog.messages


def test_the_export_command_shows_what_it_measured(again, capsys):
    (again / "texts.txt").write_text("".join(f"{text}\n" for (text,) in INPUTS))
    export_command(str(again), str(again / "texts.txt"))
    shown = capsys.readouterr().out
    assert "model_int8.onnx" in shown and "opset 17, compared on 40 texts (0 labelled)" in shown


def test_other_files_and_exports_are_not_replaced_or_exported(run_folder, run, tmp_path):
    shutil.copytree(run_folder / "student", tmp_path / "student")
    (tmp_path / "onnx").mkdir()
    with pytest.raises(UsageError, match="files that are no export"):
        export_onnx(str(tmp_path), INPUTS)
    with pytest.raises(UsageError, match=r"no model\.safetensors"):
        export_onnx(str(run / "onnx"), INPUTS)


def test_texts_to_compare_on_come_with_labels_or_without(tmp_path):
    with pytest.raises(UsageError, match="name others by --texts"):
        comparison_texts(str(tmp_path), None)
    (tmp_path / "plain.txt").write_text("good\nbad\n")
    (tmp_path / "labelled.csv").write_text("text,label\ngood,positive\nbad,negative\n")
    assert comparison_texts("", str(tmp_path / "plain.txt")) == ([("good",), ("bad",)], [])
    assert comparison_texts("", str(tmp_path / "labelled.csv"))[1] == ["positive", "negative"]


def test_the_server_of_the_documentation_answers_without_torch(run, tmp_path):
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20 and "torch" not in code
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "serve.py").write_text(code.replace("8000", str(port)))
    shutil.copytree(run / "onnx", tmp_path / "runs" / "latest" / "onnx")
    server = subprocess.Popen([sys.executable, "serve.py"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        asked = urllib.request.Request(f"http://127.0.0.1:{port}", b'["good film", "a bad story"]')
        for _ in range(100):
            try:
                answer = json.load(urllib.request.urlopen(asked, timeout=5))
                break
            except OSError:
                time.sleep(0.1)
    finally:
        server.terminate()
        server.wait()
    expected = l2a.Classifier(run / "onnx" / "model_int8.onnx").predict_proba(["good film", "a bad story"])
    found = [[one[name] for name in ("mixed", "negative", "positive")] for one in answer]
    assert np.allclose(found, expected, atol=1e-6)
