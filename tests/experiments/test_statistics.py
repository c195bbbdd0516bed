from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from l2a.experiments.results import CellResult, Estimate, Place, compare, estimate

Make = Callable[..., CellResult]
few = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
Grid = dict[str, np.ndarray]


def places(pairs: int, seeds: int) -> list[Place]:
    return [Place(f"pair{p}", 32, s, "auto") for p in range(pairs) for s in range(seeds)]


def level(values: dict[Place, float]) -> Estimate:
    return estimate(pd.Series(values.values(), pd.MultiIndex.from_tuples(values, names=Place._fields)))


def results_of(make: Make, grid: Grid) -> list[CellResult]:
    """A (pairs, seeds) table of accuracies for each variant."""
    return [
        make(variant=variant, pair=f"pair{p}", seed=s, accuracy=float(value), macro_f1=float(value) / 2)
        for variant, table in grid.items()
        for (p, s), value in np.ndenumerate(table)
    ]


def test_means_are_those_of_numpy_and_scipy() -> None:
    values = np.random.default_rng(0).uniform(size=18)
    found = level(dict(zip(places(6, 3), values.tolist(), strict=True)))
    assert found.cells == 18
    assert found.mean == pytest.approx(values.mean())
    assert found.low < found.mean < found.high


def test_the_interval_is_as_wide_as_the_pairs_differ() -> None:
    rng = np.random.default_rng(0)
    pairs, seeds = rng.normal(0.7, 0.1, size=(6, 1)), rng.normal(0, 0.001, size=(6, 3))
    values = dict(zip(places(6, 3), (pairs + seeds).ravel().tolist(), strict=True))
    found = level(values)
    one_level = stats.bootstrap(((pairs + seeds).ravel(),), np.mean, rng=1, method="percentile").confidence_interval
    between = pairs.std() / np.sqrt(6) * 1.96 * 2
    assert found.high - found.low == pytest.approx(between, rel=0.25)
    assert found.high - found.low > 1.4 * (one_level.high - one_level.low)  # cells taken as independent: too narrow


def test_95_of_100_intervals_hold_the_truth() -> None:
    rng, covered = np.random.default_rng(3), 0
    for _ in range(150):
        table = rng.normal(0.7, 0.05, size=(12, 1)) + rng.normal(0, 0.05, size=(12, 3))
        found = level(dict(zip(places(12, 3), table.ravel().tolist(), strict=True)))
        covered += found.low <= 0.7 <= found.high
    assert 0.88 <= covered / 150 <= 0.99  # of 80 % intervals about 0.77


@few
@given(shift=st.floats(-0.5, 0.5))
def test_a_shift_of_all_cells_shifts_everything(shift: float) -> None:
    values = dict(zip(places(3, 2), [0.4, 0.5, 0.6, 0.55, 0.3, 0.7], strict=True))
    before, after = level(values), level({place: value + shift for place, value in values.items()})
    for name in ("mean", "low", "high"):
        assert getattr(after, name) == pytest.approx(getattr(before, name) + shift)


def test_missing_cells_leave_numbers_and_no_warning() -> None:
    values = dict(zip(places(3, 3), np.linspace(0.5, 0.9, 9).tolist(), strict=True))
    for place in (places(3, 3)[1], places(3, 3)[8]):
        del values[place]
    found = level(values)
    assert found.cells == 7
    assert np.isfinite([found.low, found.high]).all()


def test_one_cell_is_its_own_interval() -> None:
    found = level({Place("a", 32, 0, "auto"): 0.5})
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)


def test_a_comparison_counts_and_tests_the_same_cells(make_result: Make) -> None:
    rng = np.random.default_rng(0)
    base = rng.uniform(0.5, 0.9, size=(6, 3))
    better = base + rng.normal(0.02, 0.01, size=(6, 3))
    better[0, 0] = base[0, 0]
    (item, back) = compare(results_of(make_result, {"new": better, "old": base}), ["new", "old"], "accuracy")
    assert (item.variant, item.baseline, item.cells) == ("new", "old", 18)
    assert item.mean_difference == pytest.approx((better - base).mean())
    assert item.low < item.mean_difference < item.high
    assert (item.wins, item.ties, item.losses) == ((better > base).sum(), 1, (better < base).sum())
    assert item.p_value == pytest.approx(stats.wilcoxon((better - base).ravel()).pvalue)
    assert (back.mean_difference, back.low, back.high) == (-item.mean_difference, -item.high, -item.low)
    assert (back.wins, back.losses, back.p_value) == (item.losses, item.wins, item.p_value)


def test_pairing_removes_what_both_methods_share(make_result: Make) -> None:
    hard_and_easy = np.array([[0.3] * 3, [0.6] * 3, [0.9] * 3])
    noise = np.random.default_rng(0).normal(0, 0.002, size=(3, 3))
    grid = {"new": hard_and_easy + 0.02 + noise, "old": hard_and_easy}
    item = compare(results_of(make_result, grid), ["new", "old"], "accuracy")[0]
    assert item.high - item.low < 0.01
    assert item.low > 0.01


def test_p_values_are_corrected_over_all_pairs_of_methods(make_result: Make) -> None:
    rng = np.random.default_rng(1)
    grid = {name: rng.uniform(0.5, 0.9, size=(4, 3)) for name in "abc"}
    found = compare(results_of(make_result, grid), list("abc"), "accuracy")
    assert len(found) == 6  # every method against every other
    raw = [stats.wilcoxon((grid[x] - grid[y]).ravel().round(12)).pvalue for x, y in ("ab", "ac", "bc")]
    expected = multipletests(raw, method="holm")[1]
    by_names = {(item.variant, item.baseline): item.p_value for item in found}
    assert [by_names["a", "b"], by_names["a", "c"], by_names["b", "c"]] == pytest.approx(expected.tolist())
    assert max(expected) > max(raw)


def test_only_cells_that_both_methods_have_are_compared(make_result: Make) -> None:
    results = results_of(make_result, {"a": np.full((2, 3), 0.6), "b": np.full((2, 3), 0.5)})
    results = [result for result in results if (result.variant, result.seed) != ("b", 2)]
    assert compare(results, ["a", "b"], "accuracy")[0].cells == 4
    lonely = [result for result in results if (result.variant, result.pair) != ("b", "pair0")]
    assert compare([r for r in lonely if r.variant == "b" or r.pair == "pair0"], ["a", "b"], "accuracy") == ()


def test_equal_methods_tie(make_result: Make) -> None:
    table = np.full((2, 2), 0.7)
    item = compare(results_of(make_result, {"a": table, "b": table}), ["a", "b"], "macro_f1")[0]
    assert (item.p_value, item.wins, item.ties, item.losses, item.mean_difference) == (1.0, 0, 4, 0, 0.0)
