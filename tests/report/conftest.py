"""The folder of a finished run, written by hand: texts and names of data in it are as hostile as they come."""

import json

import numpy as np
import pytest

from l2a.data.examples import Examples
from l2a.generator.chain import CandidatePool
from l2a.report import page
from l2a.report.run_folder import write_augmentations
from l2a.selector.problem import Selection
from l2a.teacher.labelling import TeacherOutputs
from l2a.util.files import output_folder, to_json

HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=http://evil.test/x onerror='window.hacked = 2'>\ud83d\x00"
)
METHODS = ("target_only_teacher", "cross_domain_teacher", "l2a_without_unlabelled_student", "l2a_student")
PART = {"name": HOSTILE[:40], "description": "Texts.", "licence": "MIT", "citation": "A. Author (2020).",
        "language": "en", "origin": "package==1.0", "sha256": "ab" * 32}  # fmt: skip
DATA = {"target": [PART], "source": [PART], "unlabelled": []}
MODELS = {role: {"name": "minilm-l6", "hub": "owner/model", "licence": "Apache-2.0"} for role in ("teacher", "start")}
LATENCY = {"batch_1": 13.6, "batch_1_spread": 1.2, "batch_32": 7.0, "batch_32_spread": 0.1}
EXPORT = {"texts": 1600, "labelled": 38, "models": [
    {"file": name, "bytes": 11_700_000, "label_agreement": 0.978, "largest_logit_difference": 0.42, "accuracy": 0.816,
     "latency_ms": LATENCY}
    for name in ("model.safetensors", "model.onnx", "model_int8.onnx")]}  # fmt: skip


def label(texts, classes=3):
    """Stand in for a teacher, at random."""
    rng = np.random.default_rng(len(texts))
    return TeacherOutputs(*(rng.normal(size=(len(texts), width)).astype(np.float32) for width in (classes, 6)))


def interval(value):
    return {"value": value, "low": value - 0.04, "high": value + 0.03}


def metrics(names, **changes):
    rows = [
        {"name": name, "accuracy": interval(0.8 + i / 100), "macro_f1": interval(0.7),
         "parameters": 22_566_146 // (i + 1), "latency_ms": LATENCY}
        for i, name in enumerate(names)
    ]  # fmt: skip
    selector = {"tier_correlation": 0.94, "surrogate_rewards": [0.03, 0.09, -0.06],
                "real_rewards": [-0.29, -0.23, -0.36], "reward_curve": [0.001, 0.002, 0.004],
                "surrogate_noise": 0.0123, "real_noise": 0.0456, "vetoed": True}  # fmt: skip
    return {
        "rows": rows, "student": "l2a_student", "validation_log_likelihood": {"l2a_student": -0.36},
        "parameter_share": 0.13, "labels_used": 128, "seconds_by_stage": {"teacher: source": 25.3, "evaluate": 5.0},
        "command": f"l2a distill --target {HOSTILE[:60]}", "seed": 0, "rounds": [{"selector": selector}] * 2,
        "files": {f"target: {HOSTILE[:40]}.csv": "d5bb07" * 10}, "peak_memory_mb": 1361.8, "threads": 1,
        "versions": {"l2a": "0.1.0"}, "warnings": [f"{HOSTILE[:60]} is odd"], "date": "2026-01-02", "data": DATA,
        "models": MODELS, **changes,
    }  # fmt: skip


def fill(folder, classes=3, is_pair=False, **changes):
    """Write what a page is drawn from."""
    rng, names = np.random.default_rng(0), [f"class {i} {HOSTILE[:60]}" for i in range(classes)]
    texts = [(f"{HOSTILE} {i}", "second")[: 1 + is_pair] for i in range(200)]
    test = Examples(tuple(texts), rng.integers(0, classes, 200), tuple(names))
    teacher, student = (rng.normal(size=(200, classes)).astype(np.float32) for _ in range(2))
    kinds = {"source": texts, "unlabelled": [], "target": texts[:20]}
    kinds |= {"dropped candidate": texts[:9], "kept candidate": texts[9:]}
    evidence = {
        "format": page.FORMAT, "is_pair": is_pair,
        "target": HOSTILE[:50], "source": "movies", "unlabelled": ["a.txt", HOSTILE[:50]],
        "teacher": "minilm-l6", "label_names": names,
        "test": page.compare_on_test(test, teacher, student, 1.5),
        "policy": [{"feature": "degree", "loss": 0.012, "changed": 0.3, "quartiles": [[0, 0.1, 0.2], [None] * 3]},
                   {"feature": "operator", "loss": -0.001, "changed": 0.1, "quartiles": []}],
        "map": page.map_texts(kinds, lambda some: label(some, classes), names, rng),
    }  # fmt: skip
    (folder / "report.json").write_text(to_json(evidence))
    (folder / "metrics.json").write_text(to_json(metrics(METHODS, **changes)))
    events = [{"event": "validation", "step": step, "log_likelihood": -1 / (1 + step)} for step in (20, 40, 60)]
    events = [*events, {"event": "fitted", "row": METHODS[2], "row_seconds": 7.5}, *events, {"event": "stage"},
              {"event": "fitted", "row": METHODS[3], "row_seconds": 80.5}]  # fmt: skip
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, events)) + "\n")
    rounds = []
    for size in (40, 60):
        numbers, origins = np.arange(size, dtype=np.float32), (f"source:{HOSTILE[:10]}",) * size
        used = tuple(("knn", HOSTILE[:20])[i % 3 // 2] for i in range(size))
        outputs = label(texts[:size], classes)
        pool = CandidatePool(tuple(texts[:size]), origins, used, numbers, outputs, numbers, numbers, numbers)
        rounds.append((pool, Selection(numbers >= size / 4, numbers, "random", {})))
    write_augmentations(folder / "augmentations.parquet", rounds)


@pytest.fixture
def finished(tmp_path):
    """A finished run that drew no page."""
    with output_folder(tmp_path / "run", "run") as folder:
        fill(folder)
    return tmp_path / "run"
