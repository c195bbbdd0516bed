import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from l2a.cli.research import experiment_app
from l2a.experiments.card import cell_key, expand, load_experiment
from l2a.experiments.report import render_page, summarise
from l2a.experiments.runner import CellResult, read_results, save_result
from l2a.util.errors import RunError, UsageError
from l2a.util.files import code_fingerprint

from .conftest import CARD, write_card

Make = Callable[..., CellResult]
COMPARISON = {
    "variant", "baseline", "metric", "mean_difference", "low", "high", "p_value", "wins", "ties", "losses", "cells",
}  # fmt: skip
LEVELS = {"tfidf": 0.6, "plain": 0.7, "random": 0.8}


def simulate(make, name, seed=0):
    """Results as a finished run leaves them, their data long gone."""
    rng, results = np.random.default_rng(seed), []
    for group in expand(load_experiment(name), None):
        for cell in group:
            data = {cell.config.source: "0" * 64, cell.config.target: "1" * 64}
            accuracy = round(LEVELS[cell.place.variant] + float(rng.normal(0, 0.01)), 3)
            result = make(
                **cell.place._asdict(), method=cell.method, key=cell_key(cell, data), data=data,
                accuracy=accuracy, macro_f1=accuracy - 0.01,
            )  # fmt: skip
            results.append(result)
            save_result(Path("benchmarks/results") / name, result)
    return results


def call(*arguments):
    outcome = CliRunner().invoke(experiment_app, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


@pytest.fixture
def simulated(workspace, make_result):
    write_card(workspace, shots=[4, 8])
    return simulate(make_result, "tiny")


def test_a_report_says_what_was_measured_in_page_figures_and_summary(workspace, simulated):
    call("report", "tiny")
    page = Path("docs/experiments/tiny.md").read_text()
    mean = 100 * np.mean([result.accuracy for result in simulated if result.variant == "random"])
    assert f"| `random` | {mean:.1f} [" in page
    assert page.index("`random`") < page.index("`plain`") < page.index("`tfidf`")  # the best first
    assert "| `sky.jsonl` | `" + "1" * 64 + "` |" in page
    assert "have not run" not in page and "other settings" not in page
    figures = re.findall(r"\]\((.+?\.svg)\)", page)
    assert figures == ["tiny/methods.svg", "tiny/pairs.svg", "tiny/shots.svg"]
    assert all((Path("docs/experiments") / figure).stat().st_size > 1000 for figure in figures)
    summary = json.loads(Path("benchmarks/results/tiny.json").read_text())
    assert len(summary["cells"]) == len(simulated) == 24
    assert {cell["variant"] for cell in summary["cells"]} == set(LEVELS)
    assert all(set(item) == COMPARISON for item in summary["comparisons"])
    assert len(summary["comparisons"]) == 3 * 2 * 2
    items = {(item["variant"], item["baseline"], item["metric"]): item for item in summary["comparisons"]}
    item = items["random", "plain", "accuracy"]
    assert item["mean_difference"] == pytest.approx(0.1, abs=0.02)
    assert (item["wins"], item["ties"], item["losses"], item["cells"]) == (8, 0, 0, 8)
    overall = [m for m in summary["means"] if (m["pair"], m["shots"]) == (None, None)]
    expected = np.mean([result.accuracy for result in simulated if result.variant == "plain"])
    level = next(m for m in overall if (m["variant"], m["metric"]) == ("plain", "accuracy"))
    assert level["mean"] == pytest.approx(expected)


@pytest.mark.slow
def test_the_same_results_give_the_same_files(workspace, simulated):
    def files():
        call("report", "tiny")
        return {path: path.read_bytes() for path in [*Path("docs").rglob("*.*"), Path("benchmarks/results/tiny.json")]}

    assert files() == files()


@pytest.mark.slow
def test_missing_and_outdated_cells_are_said(workspace, simulated):
    card = load_experiment("tiny")
    fewer = [replace(result, key="of old") if result.seed == 1 else result for result in simulated[3:]]
    summary = summarise(card, fewer)
    assert (summary.missing, summary.outdated) == (3, sum(result.key == "of old" for result in fewer))
    strangers = [replace(result, variant="gone") for result in simulated]
    assert summarise(card, [*simulated, *strangers]).results == tuple(simulated)


def test_a_report_says_which_cells_other_code_ran(workspace, make_result):
    write_card(workspace, seeds=[0], pairs=CARD["pairs"][:1])
    old = simulate(make_result, "tiny")
    now = [replace(result, code=code_fingerprint()) for result in old]
    one = [replace(now[0], code="c" * 32), *now[1:]]
    for results, made, other in (
        (old, "not recorded (3 cells)", "all"),
        (now, f"`{code_fingerprint()[:12]}` (3 cells)", "none"),
        (one, "`cccccccccccc` (1 cells)", f"1 of `{one[0].variant}`"),
    ):
        page = render_page(summarise(load_experiment("tiny"), results))
        assert made in page
        assert f"cells not run by the code that wrote this page: {other}." in page


def test_a_card_without_results_says_how_to_get_them(workspace):
    with pytest.raises(UsageError, match="l2a experiment run tiny"):
        summarise(load_experiment("tiny"), ())


def test_a_dry_run_tells_what_is_left_and_runs_nothing(workspace, make_result):
    output = call("run", "tiny", "--data-root", "data", "--dry-run", "--workers", "1")
    assert "12 cells, 12 to run: about 8.0 minutes on 1 workers" in output
    assert output.count("to run") == 13
    assert "3 cells, 3 to run" in call("run", "tiny", "--data-root", "data", "--dry-run", "--only", "sea_sky 4 1")
    assert read_results(Path("benchmarks/results/tiny")) == ()


@pytest.mark.slow
def test_run_and_report_work_together(workspace, fake_run_method, monkeypatch):
    monkeypatch.setattr("l2a.pipeline.methods.run_method", fake_run_method)
    only = call("run", "tiny", "--data-root", "data", "--workers", "1", "--only", "tfidf")
    assert "4 cells ran, 4 of 4 are finished" in only
    monkeypatch.setenv("FAIL_METHOD", "plain_kd_student")
    with pytest.raises(RunError, match="4 of 12 cells failed"):
        call("run", "tiny", "--data-root", "data", "--workers", "1")
    monkeypatch.delenv("FAIL_METHOD")
    assert "4 cells ran, 12 of 12 are finished" in call("run", "tiny", "--data-root", "data", "--workers", "1")
    assert "12 cells, 0 to run: about 0.0 minutes" in call("run", "tiny", "--data-root", "data", "--dry-run")
    assert "12 cells, 0 missing" in call("report", "tiny")


def test_missing_data_is_a_clear_error(workspace):
    with pytest.raises(UsageError, match=r"sea\.jsonl"):
        call("run", "tiny", "--data-root", "nowhere", "--workers", "1")


def test_packages_that_are_missing_are_named(workspace, monkeypatch):
    monkeypatch.setattr("l2a.cli.research.EXTRA_PACKAGES", ("joblib", "no_such_package"))
    with pytest.raises(UsageError, match=r"need no_such_package; .*l2a\[experiments\]"):
        call("report", "tiny")
