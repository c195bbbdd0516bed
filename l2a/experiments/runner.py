"""Runs the cells of a card: groups side by side, each cell saved as it finishes, none twice."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import joblib
from filelock import Timeout

from l2a.cache import fingerprint
from l2a.errors import RunError, UsageError
from l2a.experiments.backends import Workers, parallel
from l2a.experiments.cells import Cell, DataFiles, cell_files
from l2a.experiments.measure import RunRow, measure
from l2a.experiments.plan import PlannedCell, PlannedGroup, teacher_mark
from l2a.experiments.results import find_result, lock_for, save_result
from l2a.files import atomic_write_text
from l2a.progress import SILENT, Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What became of one cell in this run.

    Attributes:
        cell: The cell.
        status: "ran", "found" finished by the time its turn came, or "failed".
        message: The error of a failed cell.
    """

    cell: Cell
    status: Literal["ran", "found", "failed"]
    message: str = ""


def run_groups(
    planned: Sequence[PlannedGroup],
    data: Mapping[str, DataFiles],
    folder: Path,
    run_row: RunRow,
    workers: Workers,
    progress: Progress = SILENT,
) -> tuple[Outcome, ...]:
    """Run what is left of a grid; the results do not depend on the number of workers.

    Groups that another live runner of the same folder holds are left to it first, and waited for at the end.

    Args:
        planned: The plan, in the order of the run.
        data: Data files by pair.
        folder: The card's results folder; every finished cell is written to it at once.
        run_row: Called in worker processes, which import it by name.
        workers: Where groups run.
        progress: Shows finished cells.

    Returns:
        One outcome for each cell that was left.

    Raises:
        UsageError: If the backend cannot be used.
        RunError: If a worker process died; what had finished is kept.
    """
    unfinished = (tuple(cell for cell in group if not cell.is_finished) for group in planned)
    left = [group for group in unfinished if group]
    outcomes: list[Outcome] = []
    with progress.stage("cells", sum(map(len, left))) as advance, parallel(workers) as pool:
        for wait in (False, True):
            calls = [joblib.delayed(_run_or_return)(group, data, folder, run_row, wait) for group in left]
            left = []
            for group, found in pool(calls):
                if found is None:
                    left.append(group)
                    continue
                outcomes += found
                advance(len(found))
                _tell(found, progress)
    return tuple(outcomes)


def run_group(
    group: PlannedGroup, data: DataFiles, folder: Path, run_row: RunRow, wait: bool
) -> tuple[Outcome, ...] | None:
    """Run the cells of a group one after another, saving each; a failed one does not stop the others.

    Args:
        group: Cells that share their teachers.
        data: Their data files.
        folder: The card's results folder.
        run_row: Runs a row.
        wait: Wait for another runner that holds the group, instead of giving up.

    Returns:
        An outcome a cell, or None when another runner holds the group.
    """
    place = group[0].cell.place
    lock = lock_for(folder, fingerprint(place.pair, place.shots, place.seed))
    try:
        with lock.acquire(timeout=-1 if wait else 0):
            return tuple(_run_or_find(cell, data, folder, run_row) for cell in group)
    except Timeout:
        return None


def _run_or_return(group: PlannedGroup, data: Mapping[str, DataFiles], *arguments: Any) -> tuple[PlannedGroup, Any]:
    """Give the group back with its outcomes, since results come in any order."""
    return group, run_group(group, data[group[0].cell.place.pair], *arguments)


def _run_or_find(planned: PlannedCell, data: DataFiles, folder: Path, run_row: RunRow) -> Outcome:
    cell = planned.cell
    # A method without a student has one result for all students, and cards share methods: run once and copied.
    known = find_result(folder, planned.key)
    if known is not None:
        save_result(folder, known.moved(cell.place, cell.method))
        return Outcome(cell, "found")
    try:
        save_result(folder, measure(cell, planned.key, cell_files(cell, data), run_row))
    except Exception as error:  # one cell's failure, of whatever kind, must not cost the others
        return _failed(cell, error)
    mark = teacher_mark(cell, data)
    if mark is not None:
        atomic_write_text(mark, "")
    return Outcome(cell, "ran")


def _failed(cell: Cell, error: Exception) -> Outcome:
    if isinstance(error, UsageError | RunError):
        return Outcome(cell, "failed", str(error))
    logger.error("cell %s %s failed", cell.place, cell.method, exc_info=error)
    return Outcome(cell, "failed", f"{type(error).__name__}: {error}")


def _tell(outcomes: Sequence[Outcome], progress: Progress) -> None:
    for outcome in outcomes:
        facts = outcome.cell.place._asdict()
        progress.event("cell", **facts, method=outcome.cell.method, status=outcome.status, message=outcome.message)
