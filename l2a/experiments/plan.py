"""What is left to run, what is shared and cached, and roughly what it costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from l2a.cache import cache_root
from l2a.experiments.cells import Cell, DataFiles, Group, cell_key
from l2a.experiments.results import CellResult, Place

FIRST_GUESS = 30.0
"""Seconds of a cell, and of a teacher, before any has been timed."""

ROWS_WITHOUT_TEACHER_TRAINING = ("tfidf_logreg", "frozen_teacher_logreg", "augmented_fine_tuned_student")


@dataclass(frozen=True)
class PlannedCell:
    """A cell before a run.

    Attributes:
        cell: The cell.
        key: Fingerprint that its result must have.
        is_finished: A result with this key exists already.
        is_teacher_cached: Whether its teacher is in this machine's cache; None for rows that train no teacher.
        seconds: Estimate of the cell's own work.
        teacher_seconds: Estimate of the teacher work that it finds missing; 0 when an earlier cell does it.
    """

    cell: Cell
    key: str
    is_finished: bool
    is_teacher_cached: bool | None
    seconds: float
    teacher_seconds: float


PlannedGroup = tuple[PlannedCell, ...]


def plan(
    groups: Sequence[Group], data: Mapping[str, DataFiles], finished: Sequence[CellResult]
) -> tuple[PlannedGroup, ...]:
    """Find out what is left of a grid.

    Args:
        groups: Groups of cells, in the order of the run.
        data: Data files by pair.
        finished: Results at hand.

    Returns:
        Every cell, finished ones included, in the groups that came.
    """
    keys = {(result.place, result.method): result.key for result in finished}
    planned = []
    claimed: set[Path] = set()  # teachers that an earlier cell of the plan will have trained
    for group in groups:
        files = data[group[0].place.pair]
        planned.append(tuple(_plan_cell(cell, files, finished, keys, claimed) for cell in group))
    return tuple(planned)


def _plan_cell(
    cell: Cell,
    files: DataFiles,
    finished: Sequence[CellResult],
    keys: Mapping[tuple[Place, str], str],
    claimed: set[Path],
) -> PlannedCell:
    key, mark = cell_key(cell, files), teacher_mark(cell, files)
    is_finished = keys.get((cell.place, cell.method)) == key
    is_cached = None if mark is None else mark.exists()
    teacher_seconds = 0.0
    if mark is not None and not is_cached and not is_finished and mark not in claimed:
        claimed.add(mark)
        teacher_seconds = _teacher_seconds(finished)
    return PlannedCell(cell, key, is_finished, is_cached, _own_seconds(cell.method, finished), teacher_seconds)


def cost_seconds(planned: Sequence[PlannedGroup], workers: int) -> float:
    """Estimate the wall time of what is left.

    Args:
        planned: The plan.
        workers: Groups that run side by side.

    Returns:
        Seconds.
    """
    left = [sum(cell.seconds + cell.teacher_seconds for cell in group if not cell.is_finished) for group in planned]
    return max([sum(left) / workers, *left], default=0.0)


def teacher_mark(cell: Cell, data: DataFiles) -> Path | None:
    """Locate the mark that tells that a cell's teacher was trained and kept in this machine's cache.

    Args:
        cell: The cell.
        data: Its data files.

    Returns:
        An empty file that exists once the teacher is cached; None for rows that train no teacher.
    """
    if cell.row in ROWS_WITHOUT_TEACHER_TRAINING:
        return None
    teacher = "target_only_teacher" if cell.row == "target_only_teacher" else "cross_domain_teacher"
    return cache_root() / "experiments" / cell_key(replace(cell, row=teacher), data)


def _own_seconds(method: str, finished: Sequence[CellResult]) -> float:
    timed = [result.seconds for result in finished if result.method == method]
    return sum(timed) / len(timed) if timed else FIRST_GUESS


def _teacher_seconds(finished: Sequence[CellResult]) -> float:
    """A cell that trained a teacher took longer than its own work: take the longest such wait as typical."""
    waits = [result.wall_seconds - result.seconds for result in finished]
    return max(waits, default=FIRST_GUESS)
