from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from l2a.experiments.report import compare, estimate


def by_place(table):
    """A (pairs, seeds) table of accuracies as cells; NaN where one is missing."""
    places = [(f"pair{pair}", 32, seed) for pair, seed in np.ndindex(table.shape)]
    index = pd.MultiIndex.from_tuples(places, names=["pair", "shots", "seed"])
    return pd.Series(table.ravel(), index)


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
