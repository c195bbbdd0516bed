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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from filelock import FileLock
from scipy import stats
from statsmodels.stats.multitest import multipletests

from l2a.experiments.card import ExperimentCard, Place, cell_key, expand
from l2a.util.cards import PACKAGE
from l2a.util.errors import UsageError
from l2a.util.files import atomic_write_text, fingerprint

RESULTS_FILE = "cells.jsonl"
CHECKSUM, END = ', "checksum": "', '"}'
METRICS = ("accuracy", "macro_f1")
RESAMPLES, LEVEL = 2000, 0.95
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
    locks = folder / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    if not (locks / ".gitignore").exists():
        atomic_write_text(locks / ".gitignore", "*\n")
    return FileLock(locks / f"{name}.lock")


def _order(result: CellResult) -> tuple[Place, str]:
    return (result.place, result.variant)


class Estimate(NamedTuple):
    """Level of a variant over some cells: their number, the mean as a fraction and the ends of its interval."""

    cells: int
    mean: float
    low: float
    high: float


class Comparison(NamedTuple):
    """One variant against another on the cells that both have.

    Attributes:
        variant: The variant.
        baseline: What it is compared with.
        metric: "accuracy" or "macro_f1".
        mean_difference: Variant minus baseline, mean over the cells, as a fraction.
        low: Lower end of its interval.
        high: Upper end of its interval.
        p_value: Two-sided Wilcoxon signed-rank test on the cells, Holm-corrected over all pairs of variants.
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


def estimate(values: pd.Series) -> Estimate:
    """Estimate a mean with its two-level bootstrap interval.

    Args:
        values: One value a cell, by place; at least one.

    Returns:
        The estimate.
    """
    axes = ("pair", "seed", ["shots", "student"])
    places = tuple(values.groupby(level=axis).ngroup().to_numpy() for axis in axes)
    cube = np.full([place.max() + 1 for place in places], np.nan)  # NaN where a cell is missing
    cube[places] = values
    pairs, seeds, _ = cube.shape
    rng = np.random.default_rng(0)  # the same draws for every interval, so that adding a variant moves no other
    drawn_pairs = rng.integers(pairs, size=(RESAMPLES, pairs, 1))
    replicates = cube[drawn_pairs, rng.integers(seeds, size=(RESAMPLES, pairs, seeds))].reshape(RESAMPLES, -1)
    means = np.nanmean(replicates[~np.isnan(replicates).all(axis=1)], axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(len(values), float(np.nanmean(cube)), float(low), float(high))


def compare(results: Sequence[CellResult], variants: Sequence[str], metric: str) -> tuple[Comparison, ...]:
    """Compare every variant with every other one on the cells that both have.

    Args:
        results: Finished cells.
        variants: Names, in the order of the report.
        metric: "accuracy" or "macro_f1".

    Returns:
        Both directions of every pair of variants with a common cell, in the given order.
    """
    table = _table(results, metric)
    differences: dict[tuple[str, str], pd.Series] = {}
    for both in itertools.combinations(variants, 2):
        # Rounded, so that equal differences of fractions tie in the ranks of the test.
        found = (table[both[0]] - table[both[1]]).dropna().round(12)
        differences |= {both: found} if len(found) else {}
    if not differences:
        return ()
    p_values = [stats.wilcoxon(found).pvalue if found.any() else 1.0 for found in differences.values()]
    comparisons = []
    for (both, found), p in zip(differences.items(), multipletests(p_values, method="holm")[1], strict=True):
        cells, mean, low, high = estimate(found)
        wins, losses = int((found > 0).sum()), int((found < 0).sum())
        ties = cells - wins - losses
        forward = Comparison(*both, metric, mean, low, high, float(p), wins, ties, losses, cells)
        ends = (0.0 - mean, 0.0 - high, 0.0 - low)
        comparisons += [forward, Comparison(*both[::-1], metric, *ends, float(p), losses, ties, wins, cells)]
    return tuple(sorted(comparisons, key=lambda it: (variants.index(it.variant), variants.index(it.baseline))))


def _table(results: Sequence[CellResult], metric: str) -> pd.DataFrame:
    """A row for each place, a column for each variant, NaN where a cell is missing."""
    rows = [(*result.place, result.variant, float(getattr(result, metric))) for result in results]
    frame = pd.DataFrame(rows, columns=[*Place._fields, "variant", metric])
    return frame.pivot(index=list(Place._fields), columns="variant", values=metric)


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

    def level(self, variant: str, metric: str = "accuracy", **axis: Any) -> Estimate | None:
        """Look up the mean of a variant, of one ``pair``, number of ``shots`` or ``student`` if one is named."""
        return self.levels.get(Slice(variant, metric, **axis))


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
    axes: list[tuple[str, Any]] = [("pair", None), *(("pair", pair.name) for pair in card.pairs)]
    axes += [("shots", shots) for shots in card.shots if len(card.shots) > 1]
    axes += [("student", student) for student in card.students if len(card.students) > 1]
    tables, levels = {metric: _table(known, metric) for metric in METRICS}, {}
    for variant, metric, (axis, value) in itertools.product(variants, METRICS, axes):
        values = tables[metric][variant].dropna()
        chosen = values if value is None else values[values.index.get_level_values(axis) == value]
        if len(chosen):
            levels[Slice(variant, metric, **{axis: value})] = estimate(chosen)
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


def write_summary(path: Path, summary: Summary) -> None:
    """Write the summary as JSON, one entry a line, so that changes can be reviewed.

    Args:
        path: Destination.
        summary: The numbers.
    """
    shown = (*Place._fields, "variant", "accuracy", "macro_f1", "parameters", "labels_used", "seconds", "key")
    parts: dict[str, Any] = {
        "card": summary.card.name,
        "description": summary.card.description,
        "preset": summary.card.preset,
        "missing": summary.missing,
        "outdated": summary.outdated,
        "cells": [{name: getattr(result, name) for name in shown} for result in summary.results],
        "means": [{**which._asdict(), **level._asdict()} for which, level in summary.levels.items()],
        "comparisons": [item._asdict() for item in summary.comparisons],
    }
    lines = []
    for key, value in parts.items():
        entries = value if isinstance(value, list) else []
        rows = ",\n".join(f"  {json.dumps(entry, ensure_ascii=False)}" for entry in entries)
        lines.append(f' "{key}": ' + (f"[\n{rows}\n ]" if entries else json.dumps(value, ensure_ascii=False)))
    atomic_write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")
