"""The numbers of a report as data: what a card's cells say, in one file that other tools read."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from l2a.errors import UsageError
from l2a.experiments.card import ExperimentCard
from l2a.experiments.cells import cell_key, expand
from l2a.experiments.results import CellResult, Place
from l2a.experiments.statistics import METRICS, Comparison, Estimate, compare, estimate, values_of
from l2a.files import atomic_write_text

CELL_FIELDS = (
    *Place._fields,
    "method",
    "accuracy",
    "macro_f1",
    "parameters",
    "labels_used",
    "seconds",
    "key",
)


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
