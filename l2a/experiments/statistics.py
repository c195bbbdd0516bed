"""What a grid of cells says: means with intervals, paired comparisons, learning curves, agreement of budgets.

Intervals are 95 % percentile bootstrap intervals of a two-level resampling: pairs with replacement, then seeds with
replacement inside each drawn pair. They speak of new pairs and new draws of the few labels, and are as wide as a
handful of pairs makes them.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.multitest import multipletests

from l2a.experiments.card import ExperimentCard, cell_key, expand
from l2a.experiments.results import CellResult, Place
from l2a.util.errors import UsageError
from l2a.util.files import atomic_write_text

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


CELL_FIELDS = (*Place._fields, "method", "accuracy", "macro_f1", "parameters", "labels_used", "seconds", "key")


@dataclass(frozen=True)
class Level:
    """Level of a method over its cells, or over some of them; a None field means: over all of that axis.

    Attributes:
        method: The method.
        metric: "accuracy" or "macro_f1".
        pair: Only this pair.
        shots: Only this number of shots.
        student: Only this student.
        estimate: Mean and interquartile mean with their intervals.
    """

    method: str
    metric: str
    pair: str | None
    shots: int | None
    student: str | None
    estimate: Estimate


@dataclass(frozen=True)
class Summary:
    """What a card's cells say.

    Attributes:
        card: The card.
        results: Finished cells of the card, sorted.
        outdated: How many of them were run with other settings than the card gives now.
        missing: Cells of the card without a result.
        levels: Means.
        comparisons: Every method against every other one, in both directions.
    """

    card: ExperimentCard
    results: tuple[CellResult, ...]
    outdated: int
    missing: int
    levels: tuple[Level, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods that have results, in the card's order."""
        found = {result.method for result in self.results}
        return tuple(method for method in self.card.methods if method in found)

    @property
    def best_first(self) -> tuple[str, ...]:
        """Methods that have results, by falling mean accuracy."""
        means = {method: level.mean for method in self.methods if (level := self.level(method)) is not None}
        return tuple(sorted(means, key=lambda method: -means[method]))

    def level(
        self,
        method: str,
        metric: str = "accuracy",
        pair: str | None = None,
        shots: int | None = None,
        student: str | None = None,
    ) -> Estimate | None:
        """Look a level up.

        Args:
            method: The method.
            metric: "accuracy" or "macro_f1".
            pair: Only this pair.
            shots: Only this number of shots.
            student: Only this student.

        Returns:
            The estimate, or None when there is no such cell.
        """
        wanted = (method, metric, pair, shots, student)
        return next((item.estimate for item in self.levels if _axes(item) == wanted), None)


def summarise(card: ExperimentCard, results: Sequence[CellResult]) -> Summary:
    """Compute everything that a report says.

    Args:
        card: The card.
        results: Finished cells; those that the card no longer has are left out.

    Returns:
        The summary.

    Raises:
        UsageError: If no cell of the card is finished.
    """
    cells = {(cell.place, cell.method): cell for group in expand(card, None) for cell in group}
    known = tuple(result for result in results if (result.place, result.method) in cells)
    if not known:
        raise UsageError(
            f"results: none of the {len(cells)} cells of card {card.name} is finished; "
            f"run them first: l2a experiment run {card.name}"
        )
    outdated = sum(cell_key(cells[result.place, result.method], result.data) != result.key for result in known)
    methods = [method for method in card.methods if any(result.method == method for result in known)]
    comparisons = tuple(item for metric in METRICS for item in compare(known, methods, metric))
    return Summary(card, known, outdated, len(cells) - len(known), tuple(_levels(card, known, methods)), comparisons)


def write_summary(path: Path, summary: Summary) -> None:
    """Write the summary as JSON, one entry a line, so that changes can be reviewed.

    Args:
        path: Destination.
        summary: The numbers.
    """
    parts = {
        "card": summary.card.name,
        "description": summary.card.description,
        "preset": summary.card.preset,
        "missing": summary.missing,
        "outdated": summary.outdated,
        "cells": [{name: getattr(result, name) for name in CELL_FIELDS} for result in summary.results],
        "means": [_flat(level) for level in summary.levels],
        "comparisons": [asdict(comparison) for comparison in summary.comparisons],
    }
    entries = (f" {json.dumps(key)}: {_lines(value)}" for key, value in parts.items())
    atomic_write_text(path, "{\n" + ",\n".join(entries) + "\n}\n")


def _levels(card: ExperimentCard, results: Sequence[CellResult], methods: Iterable[str]) -> Iterable[Level]:
    """Overall first, then on each pair, then along each other axis that the card varies."""
    slices: list[tuple[str | None, int | None, str | None]] = [(None, None, None)]
    slices += [(pair.name, None, None) for pair in card.pairs]
    slices += [(None, shots, None) for shots in card.shots if len(card.shots) > 1]
    slices += [(None, None, student) for student in card.students if len(card.students) > 1]
    for method in methods:
        for metric in METRICS:
            values = values_of(results, method, metric)
            for pair, shots, student in slices:
                chosen = {place: value for place, value in values.items() if _is_in(place, pair, shots, student)}
                if chosen:
                    yield Level(method, metric, pair, shots, student, estimate(chosen))


def _is_in(place: Place, pair: str | None, shots: int | None, student: str | None) -> bool:
    wanted = ((place.pair, pair), (place.shots, shots), (place.student, student))
    return all(limit in (None, value) for value, limit in wanted)


def _axes(level: Level) -> tuple[str, str, str | None, int | None, str | None]:
    return (level.method, level.metric, level.pair, level.shots, level.student)


def _flat(level: Level) -> dict[str, Any]:
    facts = asdict(level)
    estimated = facts.pop("estimate")
    return {**facts, **estimated}


def _lines(value: Any) -> str:
    if not isinstance(value, list) or not value:
        return json.dumps(value, ensure_ascii=False)
    return "[\n" + ",\n".join("  " + json.dumps(entry, ensure_ascii=False) for entry in value) + "\n ]"
