"""Reports from results alone, and the statistics in them."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests
from typer.testing import CliRunner

from l2a.cli.research import experiment_app
from l2a.experiments.card import cell_key, expand, load_experiment
from l2a.experiments.report import compare, estimate, render_page, summarise
from l2a.experiments.runner import read_results, save_result
from l2a.util.errors import RunError, UsageError
from l2a.util.files import code_fingerprint

from .conftest import CARD, write_card

LEVELS, RUN = {"tfidf": 0.6, "plain": 0.7, "random": 0.8}, ("run", "tiny", "--data-root", "data")


def simulate(make, name, seed=0):
    """Results as a finished run leaves them, their data long gone."""
    rng, results = np.random.default_rng(seed), []
    for group in expand(load_experiment(name), None):
        for cell in group:
            data = {cell.config.source: "0" * 64, cell.config.target: "1" * 64}
            found = {"accuracy": round(LEVELS[cell.place.variant] + float(rng.normal(0, 0.01)), 3), "data": data}
            results.append(make(**cell.place._asdict(), method=cell.method, key=cell_key(cell, data), **found))
            save_result(Path("benchmarks/results") / name, results[-1])
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
    assert f"| `sky.jsonl` | `{'1' * 64}` |" in page and "have not run" not in page and "other settings" not in page
    figures = re.findall(r"\]\((.+?\.svg)\)", page)
    assert figures == ["tiny/methods.svg", "tiny/pairs.svg", "tiny/shots.svg"]
    assert all((Path("docs/experiments") / figure).stat().st_size > 1000 for figure in figures)
    summary = json.loads(Path("benchmarks/results/tiny.json").read_text())
    assert Counter(cell["variant"] for cell in summary["cells"]) == dict.fromkeys(LEVELS, 8)
    assert len(summary["comparisons"]) == 3 * 2 * 2
    items = {(item["variant"], item["baseline"], item["metric"]): item for item in summary["comparisons"]}
    found = items["random", "plain", "accuracy"]
    assert [found[name] for name in ("wins", "ties", "losses", "cells")] == [8, 0, 0, 8]
    assert found["mean_difference"] == pytest.approx(0.1, abs=0.02)
    means = {tuple(m[name] for name in ("pair", "shots", "variant", "metric")): m["mean"] for m in summary["means"]}
    assert means[None, None, "random", "accuracy"] == pytest.approx(mean / 100)


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
    strangers = (replace(result, variant="gone") for result in simulated)
    assert summarise(card, [*simulated, *strangers]).results == tuple(simulated)


def test_a_report_says_which_cells_other_code_ran(workspace, make_result):
    write_card(workspace, seeds=[0], pairs=CARD["pairs"][:1])
    old = simulate(make_result, "tiny")
    now = [replace(result, code=code_fingerprint()) for result in old]
    one = [replace(now[0], code="c" * 32), *now[1:]]
    said = [("not recorded (3 cells)", "all"), (f"`{code_fingerprint()[:12]}` (3 cells)", "none")]
    said.append(("`cccccccccccc` (1 cells)", f"1 of `{one[0].variant}`"))
    for results, (made, other) in zip((old, now, one), said, strict=True):
        page = render_page(summarise(load_experiment("tiny"), results))
        assert made in page and f"cells not run by the code that wrote this page: {other}." in page


def test_a_dry_run_tells_what_is_left_and_runs_nothing(workspace, make_result):
    output = call(*RUN, "--dry-run", "--workers", "1")
    assert "12 cells, 12 to run: about 8.0 minutes on 1 workers" in output
    assert output.count("to run") == 13
    assert "3 cells, 3 to run" in call(*RUN, "--dry-run", "--only", "sea_sky 4 1")
    assert read_results(Path("benchmarks/results/tiny")) == ()


@pytest.mark.slow
def test_run_and_report_work_together(workspace, fake_run_method, monkeypatch):
    monkeypatch.setattr("l2a.pipeline.methods.run_method", fake_run_method)
    assert "4 cells ran, 4 of 4 are finished" in call(*RUN, "--workers", "1", "--only", "tfidf")
    monkeypatch.setenv("FAIL_METHOD", "plain_kd_student")
    with pytest.raises(RunError, match="4 of 12 cells failed"):
        call(*RUN, "--workers", "1")
    monkeypatch.delenv("FAIL_METHOD")
    assert "4 cells ran, 12 of 12 are finished" in call(*RUN, "--workers", "1")
    assert "12 cells, 0 to run: about 0.0 minutes" in call(*RUN, "--dry-run")
    assert "12 cells, 0 missing" in call("report", "tiny")


def test_what_is_missing_of_data_and_results_is_named(workspace):
    with pytest.raises(UsageError, match=r"sea\.jsonl"):
        call("run", "tiny", "--data-root", "nowhere", "--workers", "1")
    with pytest.raises(UsageError, match="l2a experiment run tiny"):
        call("report", "tiny")


def by_place(table):
    """A (pairs, seeds) table of accuracies as cells; NaN where one is missing."""
    places = [(f"pair{pair}", 32, seed) for pair, seed in np.ndindex(table.shape)]
    return pd.Series(table.ravel(), pd.MultiIndex.from_tuples(places, names=["pair", "shots", "seed"]))


def level(table):
    return estimate(by_place(table).dropna())


def compared(**grid):
    table = pd.DataFrame({name: by_place(values) for name, values in grid.items()})
    return [SimpleNamespace(**item) for item in compare(table, list(grid), "accuracy")]


def test_the_interval_is_as_wide_as_the_pairs_differ():
    rng = np.random.default_rng(0)
    values = rng.normal(0.7, 0.1, size=(6, 1)) + rng.normal(0, 0.001, size=(6, 3))
    found = level(values)
    assert (found.cells, found.mean) == (18, pytest.approx(values.mean()))
    assert level(np.array([[0.5]])) == (1, 0.5, 0.5, 0.5)
    one_level = stats.bootstrap((values.ravel(),), np.mean, rng=1, method="percentile").confidence_interval
    assert found.high - found.low == pytest.approx(values.mean(axis=1).std() / np.sqrt(6) * 1.96 * 2, rel=0.25)
    assert found.high - found.low > 1.4 * (one_level.high - one_level.low)  # cells taken as independent: too narrow


def test_95_of_100_intervals_hold_the_truth():
    rng, covered = np.random.default_rng(3), 0
    for _ in range(80):
        found = level(rng.normal(0.7, 0.05, size=(12, 1)) + rng.normal(0, 0.05, size=(12, 3)))
        covered += found.low <= 0.7 <= found.high
    assert 0.88 <= covered / 80 <= 0.99  # of 80 % intervals about 0.77


@settings(max_examples=10)
@given(shift=st.floats(-0.5, 0.5))
def test_a_shift_of_all_cells_shifts_everything(shift):
    table = np.array([[0.4, 0.5], [0.6, 0.55], [0.3, 0.7]])
    assert level(table + shift)[1:] == pytest.approx(np.array(level(table)[1:]) + shift)


def test_missing_cells_leave_numbers_and_no_warning():
    table = np.linspace(0.5, 0.9, 9).reshape(3, 3)
    table[[0, 2], [1, 2]] = np.nan
    found = level(table)
    assert found.cells == 7 and np.isfinite(found).all()


def test_a_comparison_counts_and_tests_the_same_cells():
    rng = np.random.default_rng(0)
    base = rng.uniform(0.5, 0.9, size=(6, 3))
    better = base + rng.normal(0.02, 0.01, size=(6, 3))
    better[0, 0] = base[0, 0]
    item, back = compared(new=better, old=base)
    assert (item.variant, item.baseline, item.metric, item.cells) == ("new", "old", "accuracy", 18)
    assert item.mean_difference == pytest.approx((better - base).mean())
    assert item.low < item.mean_difference < item.high
    assert (item.wins, item.ties, item.losses) == ((better > base).sum(), 1, (better < base).sum())
    assert item.p_value == pytest.approx(stats.wilcoxon((better - base).ravel()).pvalue)
    assert (back.mean_difference, back.low, back.high) == (-item.mean_difference, -item.high, -item.low)
    assert (back.variant, back.wins, back.losses, back.p_value) == ("old", item.losses, item.wins, item.p_value)


def test_pairing_removes_what_both_methods_share():
    hard_and_easy = np.array([[0.3] * 3, [0.6] * 3, [0.9] * 3])
    noise = np.random.default_rng(0).normal(0, 0.002, size=(3, 3))
    item = compared(new=hard_and_easy + 0.02 + noise, old=hard_and_easy)[0]
    assert item.high - item.low < 0.01 < item.low


def test_p_values_are_corrected_over_all_pairs_of_methods():
    rng = np.random.default_rng(1)
    grid = {name: rng.uniform(0.5, 0.9, size=(4, 3)) for name in "abc"}
    by_names = {item.variant + item.baseline: item.p_value for item in compared(**grid)}
    assert list(by_names) == ["ab", "ac", "ba", "bc", "ca", "cb"]
    raw = [stats.wilcoxon((grid[x] - grid[y]).ravel().round(12)).pvalue for x, y in ("ab", "ac", "bc")]
    expected = multipletests(raw, method="holm")[1]
    assert [by_names[both] for both in ("ab", "ac", "bc")] == pytest.approx(expected.tolist())
    assert max(expected) > max(raw)


def test_only_cells_that_both_methods_have_are_compared():
    one, other = np.full((2, 3), 0.6), np.full((2, 3), 0.5)
    other[:, 2] = np.nan
    assert compared(a=one, b=other)[0].cells == 4
    one[:, :2] = np.nan
    assert compared(a=one, b=other) == []
    item = compared(a=np.full((2, 2), 0.7), b=np.full((2, 2), 0.7))[0]
    assert (item.p_value, item.wins, item.ties, item.losses, item.mean_difference) == (1.0, 0, 4, 0, 0.0)
