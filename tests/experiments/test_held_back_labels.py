"""No label of the test split reaches a choice: the runner never opens it, and flipping its labels changes nothing."""

import json
import sys

import pytest

from l2a.data.domains import load_domain
from l2a.data.examples import HeldOut
from l2a.experiments.card import load_experiment
from l2a.experiments.report import summarise
from l2a.experiments.runner import read_results
from l2a.pipeline.methods import METHODS, run_method
from tests.conftest import LABELS

from .conftest import run_tiny, write_card_of_one_cell


@pytest.fixture
def openings(monkeypatch):
    """Who opened a test split, each time; to "relabel" puts the class indices in the target's order, unseen."""
    callers, reveal = [], HeldOut.reveal

    def spy(self):
        callers.extend({sys._getframe(1).f_code.co_name} - {"relabel"})
        return reveal(self)

    monkeypatch.setattr(HeldOut, "reveal", spy)
    return callers


def run_card(workspace, run_method):
    assert not any(outcome.message for outcome in run_tiny(workspace, run_method))


def flip_test_labels(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["label"] = LABELS[1 - LABELS.index(row["label"])] if row["split"] == "test" else row["label"]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")


@pytest.mark.slow
def test_the_runner_opens_no_test_split_itself(workspace, fake_run_method, openings):
    run_card(workspace, fake_run_method)
    assert openings == ["run_method"] * 12  # once a cell
    openings.clear()
    run_card(workspace, fake_run_method)
    summarise(load_experiment("tiny"), read_results(workspace / "results"))
    assert openings == []


def test_the_spy_would_see_a_runner_that_looks(workspace, openings):
    load_domain("sea.jsonl", data_root=workspace / "data").test.reveal()
    assert openings == ["test_the_spy_would_see_a_runner_that_looks"]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_flipped_test_labels_change_no_prediction_of_any_method(workspace, encoder_folder, openings, method):
    write_card_of_one_cell(workspace, method, encoder_folder)
    results = []
    for _ in range(2):
        run_card(workspace, run_method)
        results += read_results(workspace / "results")
        flip_test_labels(workspace / "data" / "sky.jsonl")
    before, after = results
    assert before.predictions == after.predictions
    assert before.accuracy == pytest.approx(1 - after.accuracy)  # the labels that it is judged by did change
    assert openings == ["evaluate_method"] * 2
