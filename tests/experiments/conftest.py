"""A tiny workspace: two pairs of invented domains, a card, and a row runner that guesses in place of training."""

import pytest
import yaml

from l2a.experiments.card import data_files, expand, load_experiment
from l2a.experiments.runner import CellResult, Workers, plan, read_results, run_groups
from tests.conftest import write_domain

CARD = {
    "description": "A grid for tests.",
    "preset": "screening",
    "shots": [4],
    "seeds": [0, 1],
    "pairs": [{"name": f"{name}_sky", "source": f"{name}.jsonl", "target": "sky.jsonl"} for name in ("sea", "land")],
    "variants": {
        "tfidf": {"method": "tfidf_logreg"},
        "plain": {"method": "plain_kd_student"},
        "random": {"method": "l2a_student", "overrides": {"selector.agent": "random", "kd.rounds": 1}},
    },
}


WITH_MORE = [{**CARD["pairs"][0], "unlabelled": ["more.txt"]}]
"""The first pair with a file of unlabelled text."""
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
    (tmp_path / "data").mkdir()
    for seed, name in enumerate(("sea", "land", "sky")):
        write_domain(tmp_path / "data" / f"{name}.jsonl", 200, seed, f"{name} ")
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
    (folder / "data" / "more.txt").write_text("calm day again\nwind and a rough night\nbright\n")
    operator = {"generator.operator": "knn"} if row.startswith("augmented") else {}
    overrides = {**TINY_RUN, "teacher.model": str(encoder), **operator}
    variant = {"method": row, "overrides": overrides, "unlabelled": "unlabelled" in row}
    write_card(folder, pairs=WITH_MORE, seeds=[0], variants={"it": variant})


def planned(workspace, finished=()):
    groups = expand(load_experiment("tiny"), workspace / "data")
    return plan(groups, data_files(groups), finished)


def run_tiny(workspace, run_method, folder="results", workers=None):
    left = planned(workspace, read_results(workspace / folder))
    return run_groups(left, workspace / folder, run_method, workers or Workers(1))


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
        test = data.target.test.reveal()
        return SimpleNamespace(
            name=row, test=test, predictions=torch.randint(2, (len(test),)).numpy(), parameters=100, seconds=0.5,
            labels_used=data.splits.labels_used,
            diagnostics={"threads": torch.get_num_threads(), "drawn": torch.rand(1).item()},
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
