"""What a grid of cells says: means with intervals, paired comparisons, learning curves, agreement of budgets.

Intervals are 95 % percentile bootstrap intervals of a two-level resampling: pairs with replacement, then seeds with
replacement inside each drawn pair. They speak of new pairs and new draws of the few labels, and are as wide as a
handful of pairs makes them.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.multitest import multipletests

from l2a.experiments.results import CellResult, Place

METRICS = ("accuracy", "macro_f1")
RESAMPLES = 2000
LEVEL = 0.95
TRIMMED = 0.25
SEED = 0

Values = Mapping[Place, float]
Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True)
class Estimate:
    """Level of a method over some cells, as fractions.

    Attributes:
        cells: Number of cells.
        mean: Mean.
        low: Lower end of its interval.
        high: Upper end of its interval.
        interquartile_mean: Mean without the lowest and the highest quarter of the cells (Agarwal et al. 2021,
            arXiv 2108.13264).
        interquartile_low: Lower end of its interval.
        interquartile_high: Upper end of its interval.
    """

    cells: int
    mean: float
    low: float
    high: float
    interquartile_mean: float
    interquartile_low: float
    interquartile_high: float


@dataclass(frozen=True)
class Comparison:
    """One method against another on the cells that both have.

    Attributes:
        method: The method.
        baseline: What it is compared with.
        metric: "accuracy" or "macro_f1".
        mean_difference: Method minus baseline, mean over the cells, as a fraction.
        low: Lower end of its interval.
        high: Upper end of its interval.
        p_value: Wilcoxon signed-rank test on the cells' differences, two-sided, Holm-corrected over all pairs of
            methods of this metric.
        wins: Cells where the method is better.
        ties: Cells where both are equal.
        losses: Cells where the baseline is better.
        cells: Cells that both have.
    """

    method: str
    baseline: str
    metric: str
    mean_difference: float
    low: float
    high: float
    p_value: float
    wins: int
    ties: int
    losses: int
    cells: int


@dataclass(frozen=True)
class RankAgreement:
    """Whether two budgets rank methods alike.

    Attributes:
        metric: "accuracy" or "macro_f1".
        methods: Methods that both have.
        cells: Cells for each method, the same ones in both.
        first: Mean of each method at the first budget.
        second: Mean of each method at the second budget.
        spearman: Rank correlation of the two means over the methods.
        mean_spearman_of_pairs: Mean over pairs of the rank correlation inside each pair.
    """

    metric: str
    methods: tuple[str, ...]
    cells: int
    first: tuple[float, ...]
    second: tuple[float, ...]
    spearman: float
    mean_spearman_of_pairs: float


def values_of(results: Sequence[CellResult], method: str, metric: str) -> dict[Place, float]:
    """Collect a method's values.

    Args:
        results: Finished cells.
        method: The method's name.
        metric: "accuracy" or "macro_f1".

    Returns:
        The metric of each cell of the method, by place.
    """
    return {result.place: float(getattr(result, metric)) for result in results if result.method == method}


def estimate(values: Values) -> Estimate:
    """Estimate the level of a method.

    Args:
        values: One value a cell; at least one.

    Returns:
        Mean and interquartile mean with their intervals.
    """
    cube = _cube(values)
    means = _interval(cube, _mean)
    middles = _interval(cube, _interquartile_mean)
    return Estimate(len(values), *means, *middles)


def compare(results: Sequence[CellResult], methods: Sequence[str], metric: str) -> tuple[Comparison, ...]:
    """Compare every method with every other one on the cells that both have.

    Args:
        results: Finished cells.
        methods: Names, in the order of the report.
        metric: "accuracy" or "macro_f1".

    Returns:
        Comparisons in both directions, sorted by method and baseline in the given order; pairs of methods without a
        common cell are left out.
    """
    by_method = {method: values_of(results, method, metric) for method in methods}
    found = []
    for method, baseline in itertools.combinations(methods, 2):
        differences = _differences(by_method[method], by_method[baseline])
        if differences:
            found.append(_compare_two(method, baseline, metric, differences))
    corrected = _holm(found)
    both_ways = [*corrected, *map(_reversed, corrected)]
    order = {method: position for position, method in enumerate(methods)}
    return tuple(sorted(both_ways, key=lambda item: (order[item.method], order[item.baseline])))


def rank_agreement(first: Sequence[CellResult], second: Sequence[CellResult], metric: str) -> RankAgreement | None:
    """Measure how far two budgets rank the same methods alike, on the cells that both have.

    Args:
        first: Finished cells of the first budget.
        second: Finished cells of the second budget.
        metric: "accuracy" or "macro_f1".

    Returns:
        The agreement, or None when fewer than three methods have cells in common.
    """
    methods = _common_methods(first, second)
    tables = [[values_of(results, method, metric) for method in methods] for results in (first, second)]
    places = sorted(set.intersection(*(set(values) for table in tables for values in table))) if methods else []
    if len(methods) < 3 or not places:
        return None
    levels = np.array([[[values[place] for place in places] for values in table] for table in tables])
    means = levels.mean(axis=2)
    return RankAgreement(
        metric, methods, len(places), tuple(means[0].tolist()), tuple(means[1].tolist()),
        _spearman(means[0], means[1]), _spearman_of_pairs(levels, [place.pair for place in places]),
    )  # fmt: skip


def _common_methods(first: Sequence[CellResult], second: Sequence[CellResult]) -> tuple[str, ...]:
    wanted = {result.method for result in second}
    return tuple(dict.fromkeys(result.method for result in first if result.method in wanted))


def _spearman(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """A budget at which all methods are equal ranks nothing: its correlation is 0, not undefined."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(stats.spearmanr(first, second).statistic)


def _spearman_of_pairs(levels: NDArray[np.float64], pairs: Sequence[str]) -> float:
    names = np.array(pairs)
    means = [levels[:, :, names == pair].mean(axis=2) for pair in sorted(set(pairs))]
    return float(np.mean([_spearman(first, second) for first, second in means]))


def _cube(values: Values) -> NDArray[np.float64]:
    """Arrange values as (pairs, seeds, rest), NaN where a cell is missing."""
    pairs = {name: i for i, name in enumerate(sorted({place.pair for place in values}))}
    seeds = {seed: i for i, seed in enumerate(sorted({place.seed for place in values}))}
    rest = {key: i for i, key in enumerate(sorted({(place.shots, place.student) for place in values}))}
    cube = np.full((len(pairs), len(seeds), len(rest)), np.nan)
    for place, value in values.items():
        cube[pairs[place.pair], seeds[place.seed], rest[place.shots, place.student]] = value
    return cube


def _interval(cube: NDArray[np.float64], statistic: Statistic) -> tuple[float, float, float]:
    """Give the statistic of all cells and the ends of its two-level bootstrap interval."""
    rng = np.random.default_rng(SEED)  # the same draws for every interval, so that adding a method moves no other
    pairs, seeds, _ = cube.shape
    drawn_pairs = rng.integers(pairs, size=(RESAMPLES, pairs, 1))
    drawn_seeds = rng.integers(seeds, size=(RESAMPLES, pairs, seeds))
    replicates = cube[drawn_pairs, drawn_seeds].reshape(RESAMPLES, -1)
    kept = replicates[~np.isnan(replicates).all(axis=1)]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(statistic(kept), [tail, 1 - tail])
    return float(statistic(cube.reshape(1, -1))[0]), float(low), float(high)


def _mean(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.nanmean(rows, axis=1), dtype=np.float64)


def _interquartile_mean(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    known = ~np.isnan(rows)
    counts, found = known.sum(axis=1), np.empty(len(rows))
    for count in np.unique(counts):
        chosen = counts == count
        values = rows[chosen][known[chosen]].reshape(-1, count)
        found[chosen] = stats.trim_mean(values, TRIMMED, axis=1)
    return found


def _differences(method: Values, baseline: Values) -> dict[Place, float]:
    """Rounded, so that equal differences of fractions tie in the ranks of the test."""
    return {place: round(method[place] - baseline[place], 12) for place in method if place in baseline}


def _compare_two(method: str, baseline: str, metric: str, differences: Values) -> Comparison:
    values = np.array(list(differences.values()))
    mean, low, high = _interval(_cube(differences), _mean)
    wins, losses = int((values > 0).sum()), int((values < 0).sum())
    p_value = float(stats.wilcoxon(values).pvalue) if wins + losses else 1.0
    return Comparison(
        method, baseline, metric, mean, low, high, p_value, wins, len(values) - wins - losses, losses, len(values)
    )


def _holm(comparisons: Sequence[Comparison]) -> tuple[Comparison, ...]:
    if not comparisons:
        return ()
    corrected = multipletests([item.p_value for item in comparisons], method="holm")[1]
    return tuple(replace(item, p_value=float(p)) for item, p in zip(comparisons, corrected, strict=True))


def _reversed(item: Comparison) -> Comparison:
    return replace(
        item,
        method=item.baseline,
        baseline=item.method,
        mean_difference=0.0 - item.mean_difference,
        low=0.0 - item.high,
        high=0.0 - item.low,
        wins=item.losses,
        losses=item.wins,
    )
