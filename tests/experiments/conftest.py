"""A tiny workspace: two pairs of invented domains, a card, and a row runner that trains in milliseconds."""

import json

import numpy as np
import pytest
import yaml

from l2a.experiments.runner import CellResult

CARD = {
    "description": "A grid for tests.",
    "preset": "screening",
    "shots": [4],
    "seeds": [0, 1],
    "pairs": [
        {"name": "sea_sky", "source": "sea.jsonl", "target": "sky.jsonl"},
        {"name": "land_sky", "source": "land.jsonl", "target": "sky.jsonl"},
    ],
    "variants": {
        "tfidf": {"method": "tfidf_logreg"},
        "plain": {"method": "plain_kd_student"},
        "random": {"method": "l2a_student", "overrides": {"selector.agent": "random", "kd.rounds": 1}},
    },
}


TINY_RUN = {
    "teacher.source_epochs": 1, "teacher.target_epochs": 1, "teacher.target_only_epochs": 1,
    "teacher.frozen_layers": 0, "dev_shots": 2, "student.max_share": 1.0, "kd.warmup_steps": 4, "kd.round_steps": 4,
    "kd.evaluate_every": 4, "kd.pool_size": 32, "selector.agent": "random", "selector.real_evaluations": 0,
    "generator.chains": 8, "generator.burn_in": 1,
}  # fmt: skip


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A working directory with cards, data and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("sea", "land", "sky")):
        write_domain(tmp_path / "data" / f"{name}.jsonl", name, seed)
    write_card(tmp_path)
    return tmp_path


@pytest.fixture(scope="session", autouse=True)
def _no_leftover_workers():
    yield
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor().shutdown(wait=True)


def write_card(folder, name="tiny", **changes):
    path = folder / "configs" / "experiments" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(CARD | changes, sort_keys=False), "utf-8")


def write_card_of_one_cell(folder, row, encoder):
    """A card for the real pipeline with a tiny teacher."""
    one_pair = [{"name": "sea_sky", "source": "sea.jsonl", "target": "sky.jsonl", "unlabelled": ["more.txt"]}]
    (folder / "data" / "more.txt").write_text("calm day again\nwind and a rough night\nbright\n")
    overrides = TINY_RUN | {"teacher.model": str(encoder)}
    if row.startswith("augmented"):
        overrides["generator.operator"] = "knn"
    variant = {"method": row, "overrides": overrides, "unlabelled": "unlabelled" in row}
    write_card(folder, pairs=one_pair, seeds=[0], variants={"it": variant})


def write_domain(path, topic, seed):
    rng = np.random.default_rng(seed)
    words = {"good": ["fine", "bright", "calm", "warm"], "bad": ["grim", "dull", "rough", "cold"]}
    rows = []
    for split, count in (("train", 60), ("dev", 20), ("test", 40)):
        for i in range(count):
            label = ("good", "bad")[i % 2]
            said = rng.choice(words[label] + ["day", "night", "wind"], size=4)
            rows.append({"text": f"{topic} {split} {i} {' '.join(said)}", "label": label, "split": split})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", "utf-8")


@pytest.fixture
def trace(tmp_path):
    """A file that the fake rows write what they do to, from whatever process they run in."""
    return tmp_path / "trace.txt"


@pytest.fixture
def fake_run_method(trace):
    """A runner of rows that is nested, so that worker processes get it by value."""

    def run_method(config, row, *_):
        import os
        import time
        from types import SimpleNamespace

        import torch

        from l2a.pipeline.data import load_run_data
        from l2a.util.errors import RunError

        with open(trace, "a") as file:
            file.write(f"{config.source} {config.seed} {row} {os.getpid()}\n")
        if os.environ.get("FAIL_METHOD") == row:
            raise RunError("the row failed, as it was told to")
        time.sleep(float(os.environ.get("METHOD_SECONDS", "0")))
        data = load_run_data(config)
        features = torch.nn.EmbeddingBag(64, 8, mode="sum")
        head = torch.nn.Sequential(torch.nn.Dropout(0.2), torch.nn.Linear(8, len(data.label_names)))
        weights = [*features.parameters(), *head.parameters()]

        def logits(inputs):
            ids = [[sum(word.encode()) % 64 for word in text[0].split()] for text in inputs]
            return head(features(torch.tensor([line[:7] for line in ids])))

        train = data.target_labels
        for _ in range(8):
            loss = torch.nn.functional.cross_entropy(logits(train.inputs), torch.from_numpy(train.labels))
            with torch.no_grad():
                for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                    weight -= 0.1 * gradient
        head.eval()
        test = data.target.test.reveal()
        predictions = logits(test.inputs).argmax(1).numpy()
        facts = {"threads": torch.get_num_threads(), "weights": head[1].weight.sum().item()}
        return SimpleNamespace(
            name=row, test=test, predictions=predictions, parameters=100, labels_used=data.splits.labels_used,
            seconds=0.5, diagnostics=facts,
        )  # fmt: skip

    return run_method


@pytest.fixture
def make_result():
    def make(**changes):
        fields = {
            "pair": "sea_sky", "shots": 4, "seed": 0, "variant": "tfidf", "method": "tfidf_logreg",
            "key": "k", "preset": "screening", "accuracy": 0.5, "macro_f1": 0.5, "test_examples": 40,
            "predictions": "p", "parameters": 100, "labels_used": 72, "seconds": 0.5, "wall_seconds": 0.75,
            "data": {"sea.jsonl": "0" * 64, "sky.jsonl": "1" * 64}, "versions": {"l2a": "0.1.0"},
            "machine": {"platform": "Linux x86_64", "cores": 2, "memory_gib": 8, "device": "cpu"},
            "diagnostics": {"rounds": 2},
        }  # fmt: skip
        return CellResult(**(fields | changes))

    return make
