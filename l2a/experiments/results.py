"""Finished cells, one JSON line each, safe against kills, damage and a second runner; and what they say of a card.

Intervals are 95 % percentile bootstrap intervals of a two-level resampling, pairs with replacement, then seeds inside
each drawn pair: they speak of new pairs and new draws of the few labels, and are as wide as a handful of pairs makes
them.
"""

import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from filelock import FileLock
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.multitest import multipletests

from l2a.experiments.card import ExperimentCard, Place, cell_key, expand
from l2a.util.cards import PACKAGE
from l2a.util.errors import UsageError
from l2a.util.files import atomic_write_text, fingerprint

RESULTS_FILE = "cells.jsonl"
LOCK_FOLDER = ".locks"
CHECKSUM, END = ', "checksum": "', '"}'
METRICS = ("accuracy", "macro_f1")
RESAMPLES = 2000
LEVEL = 0.95
TRIMMED = 0.25
SEED = 0
CELL_FIELDS = (*Place._fields, "variant", "accuracy", "macro_f1", "parameters", "labels_used", "seconds", "key")

Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]
logger = logging.getLogger(__name__)


@cache
def code_fingerprint() -> str:
    """Hash the sources of the package, so that a result can say which code made it.

    Returns:
        32 hexadecimal digits, the same for the same files in any folder.
    """
    files = sorted(PACKAGE.rglob("*.py"))
    return fingerprint([[path.relative_to(PACKAGE).as_posix(), path.read_bytes()] for path in files])


@dataclass(frozen=True)
class CellResult:
    """What one cell gave, and everything needed to judge and repeat it.

    Attributes:
        pair: Name of the pair of domains.
        shots: Labelled target examples per class.
        seed: The run's seed.
        student: Student preset.
        variant: Name of the variant in the card.
        method: The method that it is a variant of.
        key: Fingerprint of the configuration and the data; another key means another result.
        preset: The budget.
        accuracy: Fraction on the target's test split.
        macro_f1: Fraction on the target's test split.
        test_examples: Size of that split.
        predictions: Fingerprint of the predicted labels, in the order of the test split.
        parameters: Parameters of the model.
        labels_used: Labelled target examples used, those of the reward and validation splits included.
        seconds: The method's own training and selection, shared teacher work aside.
        wall_seconds: The whole cell, with whatever teacher work it found missing in the cache.
        data: Files read, with their sha256.
        versions: Versions of the packages that decide numbers.
        machine: Cores, memory and device.
        diagnostics: What the method says about its own run.
        code: Fingerprint of the sources of the package that ran it; empty where none was noted.
    """

    pair: str
    shots: int
    seed: int
    student: str
    variant: str
    method: str
    key: str
    preset: str
    accuracy: float
    macro_f1: float
    test_examples: int
    predictions: str
    parameters: int
    labels_used: int
    seconds: float
    wall_seconds: float
    data: Mapping[str, str]
    versions: Mapping[str, str]
    machine: Mapping[str, str | int | float]
    diagnostics: Mapping[str, float | int | str]
    code: str = ""

    @property
    def place(self) -> Place:
        """The cell's place in the grid."""
        return Place(self.pair, self.shots, self.seed, self.student)


def to_line(result: CellResult) -> str:
    """Write a result as one line of JSON that carries its own checksum as its last field.

    Args:
        result: A finished cell.

    Returns:
        The line, without a line break.
    """
    body = json.dumps(asdict(result), ensure_ascii=False, default=float)[:-1]
    return f"{body}{CHECKSUM}{_checksum(body.encode())}{END}"


def from_line(line: bytes) -> CellResult:
    """Read one line, checking that it is what was written.

    Args:
        line: UTF-8 JSON, as made by ``to_line``.

    Returns:
        The finished cell.

    Raises:
        ValueError: If the line is damaged, or of another version of this file.
    """
    body, _, checksum = line.rpartition(CHECKSUM.encode())
    if checksum != f"{_checksum(body)}{END}".encode():
        raise ValueError("the checksum does not match")
    try:
        return CellResult(**json.loads(body + b"}"))
    except TypeError as error:
        raise ValueError(f"the fields do not match: {error}") from error


def _checksum(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:16]


def read_results(folder: Path) -> tuple[CellResult, ...]:
    """Read the finished cells of a card; damaged lines are reported and left out, so that their cells run again.

    Args:
        folder: The card's results folder, which may not exist yet.

    Returns:
        The finished cells, sorted by place and variant.
    """
    path = folder / RESULTS_FILE
    if not path.exists():
        return ()
    results = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            if line.strip():
                results.append(from_line(line))
        except ValueError as error:
            logger.warning("%s line %d is damaged (%s); its cell will run again", path, number, error)
    return tuple(sorted(results, key=_order))


def find_result(folder: Path, key: str) -> CellResult | None:
    """Find a finished cell by what decides it, in a card's results or in those of the cards beside it.

    Args:
        folder: The card's results folder.
        key: The cell's fingerprint.

    Returns:
        The cell, wherever it stands, or None.
    """
    beside = sorted(other for other in folder.parent.glob("*/") if other != folder)
    cells = (result for place in (folder, *beside) for result in read_results(place))
    return next((result for result in cells if result.key == key), None)


def save_result(folder: Path, result: CellResult) -> None:
    """Add a finished cell to the results file in one step; an older result of the same cell is replaced.

    Args:
        folder: The card's results folder; it is created.
        result: The finished cell.

    Raises:
        RunError: If the disk is full; the file keeps its old content.
    """
    with lock_for(folder, "results"):
        others = [known for known in read_results(folder) if _order(known) != _order(result)]
        lines = [to_line(known) for known in sorted([*others, result], key=_order)]
        atomic_write_text(folder / RESULTS_FILE, "\n".join(lines) + "\n")


def lock_for(folder: Path, name: str) -> FileLock:
    """Make a lock that all runners of one results folder share; it opens by itself when its holder dies.

    Args:
        folder: The card's results folder; it is created.
        name: What is locked: a group of cells, or "results" for the file.

    Returns:
        The lock, not yet taken.
    """
    locks = folder / LOCK_FOLDER
    locks.mkdir(parents=True, exist_ok=True)
    if not (locks / ".gitignore").exists():
        atomic_write_text(locks / ".gitignore", "*\n")
    return FileLock(locks / f"{name}.lock")


def _order(result: CellResult) -> tuple[Place, str]:
    return (result.place, result.variant)


@dataclass(frozen=True)
class Estimate:
    """Level of a variant over some cells, as fractions.

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
    """One variant against another on the cells that both have.

    Attributes:
        variant: The variant.
        baseline: What it is compared with.
        metric: "accuracy" or "macro_f1".
        mean_difference: Variant minus baseline, mean over the cells, as a fraction.
        low: Lower end of its interval.
        high: Upper end of its interval.
        p_value: Wilcoxon signed-rank test on the cells' differences, two-sided, Holm-corrected over all pairs of
            variants of this metric.
        wins: Cells where the variant is better.
        ties: Cells where both are equal.
        losses: Cells where the baseline is better.
        cells: Cells that both have.
    """

    variant: str
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
    """Whether two budgets rank variants alike.

    Attributes:
        metric: "accuracy" or "macro_f1".
        cells: Cells for each variant, the same ones in both.
        means: Mean of each variant at the first and at the second budget.
        spearman: Rank correlation of the two means over the variants.
        mean_spearman_of_pairs: Mean over pairs of the rank correlation inside each pair.
    """

    metric: str
    cells: int
    means: Mapping[str, tuple[float, float]]
    spearman: float
    mean_spearman_of_pairs: float


def table_of(results: Sequence[CellResult], metric: str) -> pd.DataFrame:
    """Lay results out with a row for each place and a column for each variant.

    Args:
        results: Finished cells.
        metric: "accuracy" or "macro_f1".

    Returns:
        float64, NaN where a cell is missing; indexed by pair, shots, seed and student, sorted.
    """
    rows = [(*result.place, result.variant, float(getattr(result, metric))) for result in results]
    frame = pd.DataFrame(rows, columns=[*Place._fields, "variant", metric])
    return frame.pivot(index=list(Place._fields), columns="variant", values=metric)


def estimate(values: pd.Series) -> Estimate:
    """Estimate the level of a variant.

    Args:
        values: One value a cell, by place; at least one.

    Returns:
        Mean and interquartile mean with their intervals.
    """
    cube = _cube(values)
    return Estimate(len(values), *_interval(cube, _mean), *_interval(cube, _interquartile_mean))


def compare(results: Sequence[CellResult], variants: Sequence[str], metric: str) -> tuple[Comparison, ...]:
    """Compare every variant with every other one on the cells that both have.

    Args:
        results: Finished cells.
        variants: Names, in the order of the report.
        metric: "accuracy" or "macro_f1".

    Returns:
        Comparisons in both directions, sorted by variant and baseline in the given order; pairs of variants without a
        common cell are left out.
    """
    table, found = table_of(results, metric), []
    for variant, baseline in itertools.combinations(variants, 2):
        # Rounded, so that equal differences of fractions tie in the ranks of the test.
        differences = (table[variant] - table[baseline]).dropna().round(12)
        if len(differences):
            found.append(_compare_two(variant, baseline, metric, differences))
    if found:
        corrected = multipletests([item.p_value for item in found], method="holm")[1]
        found = [replace(item, p_value=float(p)) for item, p in zip(found, corrected, strict=True)]
    order = {variant: position for position, variant in enumerate(variants)}
    return tuple(sorted([*found, *map(_reversed, found)], key=lambda it: (order[it.variant], order[it.baseline])))


def _compare_two(variant: str, baseline: str, metric: str, differences: pd.Series) -> Comparison:
    interval = _interval(_cube(differences), _mean)
    wins, losses, cells = int((differences > 0).sum()), int((differences < 0).sum()), len(differences)
    p_value = float(stats.wilcoxon(differences).pvalue) if wins + losses else 1.0
    return Comparison(variant, baseline, metric, *interval, p_value, wins, cells - wins - losses, losses, cells)


def _reversed(item: Comparison) -> Comparison:
    mean, low, high = 0.0 - item.mean_difference, 0.0 - item.high, 0.0 - item.low
    counts = (item.losses, item.ties, item.wins, item.cells)
    return Comparison(item.baseline, item.variant, item.metric, mean, low, high, item.p_value, *counts)


def rank_agreement(first: Sequence[CellResult], second: Sequence[CellResult], metric: str) -> RankAgreement | None:
    """Measure how far two budgets rank the same variants alike, on the cells that both have.

    Args:
        first: Finished cells of the first budget.
        second: Finished cells of the second budget.
        metric: "accuracy" or "macro_f1".

    Returns:
        The agreement, or None when fewer than three variants have cells in common.
    """
    tables = [table_of(results, metric) for results in (first, second)]
    variants = sorted({*map(str, tables[0])} & {*map(str, tables[1])})
    both = pd.concat([table[variants] for table in tables], axis=1, join="inner", keys=["first", "second"]).dropna()
    if len(variants) < 3 or both.empty:
        return None
    means, of_pairs = both.mean(), both.groupby(level="pair").mean()
    by_variant = {variant: (float(means["first", variant]), float(means["second", variant])) for variant in variants}
    mean_of_pairs = float(np.mean([_spearman(row, variants) for _, row in of_pairs.iterrows()]))
    return RankAgreement(metric, len(both), by_variant, _spearman(means, variants), mean_of_pairs)


def _spearman(means: pd.Series, variants: Sequence[str]) -> float:
    """A budget at which all variants are equal ranks nothing: its correlation is 0, not undefined."""
    first, second = means["first"][variants], means["second"][variants]
    return float(stats.spearmanr(first, second).statistic) if np.ptp(first) and np.ptp(second) else 0.0


def _cube(values: pd.Series) -> NDArray[np.float64]:
    """Arrange values as (pairs, seeds, rest), NaN where a cell is missing."""
    axes = ("pair", "seed", ["shots", "student"])
    places = tuple(values.groupby(level=axis).ngroup().to_numpy() for axis in axes)
    cube = np.full([place.max() + 1 for place in places], np.nan)
    cube[places] = values
    return cube


def _interval(cube: NDArray[np.float64], statistic: Statistic) -> tuple[float, float, float]:
    """Give the statistic of all cells and the ends of its two-level bootstrap interval."""
    rng = np.random.default_rng(SEED)  # the same draws for every interval, so that adding a variant moves no other
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
        found[chosen] = stats.trim_mean(rows[chosen][known[chosen]].reshape(-1, count), TRIMMED, axis=1)
    return found


class Slice(NamedTuple):
    """Cells of a variant by one metric, all of them or some: a None field means over all of that axis."""

    variant: str
    metric: str = "accuracy"
    pair: str | None = None
    shots: int | None = None
    student: str | None = None


@dataclass(frozen=True)
class Summary:
    """What a card's cells say.

    Attributes:
        card: The card.
        results: Finished cells of the card, sorted.
        variants: Variants that have results, in the card's order.
        best_first: The same by falling mean accuracy.
        outdated: How many cells were run with other settings than the card gives now.
        other_code: Cells of each variant that other code than the package's present code ran.
        missing: Cells of the card without a result.
        levels: Means, by what they are taken over.
        comparisons: Every variant against every other one, in both directions.
    """

    card: ExperimentCard
    results: tuple[CellResult, ...]
    variants: tuple[str, ...]
    best_first: tuple[str, ...]
    outdated: int
    other_code: Counter[str]
    missing: int
    levels: Mapping[Slice, Estimate]
    comparisons: tuple[Comparison, ...]

    def level(self, variant: str, metric: str = "accuracy", **axes: Any) -> Estimate | None:
        """Look a level up.

        Args:
            variant: The variant.
            metric: "accuracy" or "macro_f1".
            **axes: ``pair``, ``shots`` or ``student``: only these cells.

        Returns:
            The estimate, or None when there is no such cell.
        """
        return self.levels.get(Slice(variant, metric, **axes))


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
    cells = {(cell.place, cell.variant): cell for group in expand(card, None) for cell in group}
    known = tuple(result for result in results if (result.place, result.variant) in cells)
    if not known:
        needed = f"run them first: l2a experiment run {card.name}"
        raise UsageError(f"results: none of the {len(cells)} cells of card {card.name} is finished; {needed}")
    have = {result.variant for result in known}
    variants = tuple(name for name in card.variants if name in have)
    levels = dict(_levels(card, known, variants))
    return Summary(
        card=card,
        results=known,
        variants=variants,
        best_first=tuple(sorted(variants, key=lambda name: -levels[Slice(name)].mean)),
        outdated=sum(cell_key(cells[result.place, result.variant], result.data) != result.key for result in known),
        other_code=Counter(result.variant for result in known if result.code != code_fingerprint()),
        missing=len(cells) - len(known),
        levels=levels,
        comparisons=tuple(item for metric in METRICS for item in compare(known, variants, metric)),
    )


def _levels(
    card: ExperimentCard, results: Sequence[CellResult], variants: Iterable[str]
) -> Iterable[tuple[Slice, Estimate]]:
    """Overall first, then on each pair, then along each other axis that the card varies."""
    slices: list[tuple[str, Any]] = [("pair", None), *(("pair", pair.name) for pair in card.pairs)]
    slices += [("shots", shots) for shots in card.shots if len(card.shots) > 1]
    slices += [("student", student) for student in card.students if len(card.students) > 1]
    tables = {metric: table_of(results, metric) for metric in METRICS}
    for variant, metric, (axis, value) in itertools.product(variants, METRICS, slices):
        values = tables[metric][variant].dropna()
        chosen = values if value is None else values[values.index.get_level_values(axis) == value]
        if len(chosen):
            yield Slice(variant, metric, **{axis: value}), estimate(chosen)


def write_summary(path: Path, summary: Summary) -> None:
    """Write the summary as JSON, one entry a line, so that changes can be reviewed.

    Args:
        path: Destination.
        summary: The numbers.
    """
    parts: dict[str, Any] = {
        "card": summary.card.name,
        "description": summary.card.description,
        "preset": summary.card.preset,
        "missing": summary.missing,
        "outdated": summary.outdated,
        "cells": [{name: getattr(result, name) for name in CELL_FIELDS} for result in summary.results],
        "means": [{**slice_._asdict(), **asdict(level)} for slice_, level in summary.levels.items()],
        "comparisons": [asdict(comparison) for comparison in summary.comparisons],
    }
    entries = []
    for key, value in parts.items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(f"  {json.dumps(entry, ensure_ascii=False)}" for entry in value) + "\n ]"
        entries.append(f' "{key}": {text}')
    atomic_write_text(path, "{\n" + ",\n".join(entries) + "\n}\n")
