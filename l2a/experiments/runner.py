"""Runs what is left of a grid: the plan with its cost, the workers, and a single cell."""

import contextlib
import importlib
import logging
import os
import platform
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import joblib
import numpy as np
import psutil
import torch
from filelock import Timeout

from l2a import __version__
from l2a.config import DistillConfig
from l2a.evaluation.metrics import accuracy_and_macro_f1, one_thread
from l2a.experiments.card import Cell, DataFiles, Group, cell_files, cell_key
from l2a.experiments.results import CellResult, code_fingerprint, find_result, lock_for, save_result
from l2a.pipeline.methods import METHODS
from l2a.util.errors import RunError, UsageError
from l2a.util.files import atomic_write_text, cache_root, fingerprint
from l2a.util.progress import SILENT, Progress

if TYPE_CHECKING:
    from l2a.pipeline.methods import MethodResult

FIRST_GUESS = 30.0
"""Seconds of a cell, and of a teacher, before any has been timed."""
BACKENDS = ("loky", "dask")
PACKAGES = ("torch", "transformers", "tokenizers", "stable-baselines3", "scikit-learn", "numpy")
WORKER_DIED = (
    "a worker process was killed, most often because memory ran out; finished cells are kept, "
    "so run the command again, with fewer --workers if it happens again"
)
RunMethod = Callable[[DistillConfig, str], "MethodResult"]
"""Trains and evaluates one method with one configuration; it alone opens the test split, at its end."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedCell:
    """A cell before a run.

    Attributes:
        cell: The cell.
        key: Fingerprint that its result must have.
        is_finished: A result with this key exists already.
        is_teacher_cached: Whether its teacher is in this machine's cache; None for methods that train no teacher.
        seconds: Estimate of its work, that of its teacher included where no earlier cell trains it.
    """

    cell: Cell
    key: str
    is_finished: bool
    is_teacher_cached: bool | None
    seconds: float


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
    keys = {(result.place, result.variant): result.key for result in finished}
    # A cell that trained a teacher took longer than its own work: the longest such wait counts as typical.
    wait = max((result.wall_seconds - result.seconds for result in finished), default=FIRST_GUESS)
    claimed: set[Path] = set()  # teachers that an earlier cell of the plan will have trained

    def planned(cell: Cell) -> PlannedCell:
        key, mark = cell_key(cell, data[cell.place.pair]), teacher_mark(cell, data[cell.place.pair])
        is_finished, is_cached = keys.get((cell.place, cell.variant)) == key, None if mark is None else mark.exists()
        timed = [result.seconds for result in finished if result.variant == cell.variant] or [FIRST_GUESS]
        seconds = sum(timed) / len(timed)
        if mark is not None and not (is_cached or is_finished or mark in claimed):
            claimed.add(mark)
            seconds += wait
        return PlannedCell(cell, key, is_finished, is_cached, seconds)

    return tuple(tuple(planned(cell) for cell in group) for group in groups)


def cost_seconds(planned: Sequence[PlannedGroup], workers: int) -> float:
    """Estimate the wall time of what is left.

    Args:
        planned: The plan.
        workers: Groups that run side by side.

    Returns:
        Seconds.
    """
    left = [sum(cell.seconds for cell in group if not cell.is_finished) for group in planned]
    return max([sum(left) / workers, *left], default=0.0)


def teacher_mark(cell: Cell, data: DataFiles) -> Path | None:
    """Locate the mark that tells that a cell's teacher was trained and kept in this machine's cache.

    Args:
        cell: The cell.
        data: Its data files.

    Returns:
        An empty file that exists once the teacher is cached; None for methods that train no teacher.
    """
    teacher = METHODS[cell.method].teacher
    return None if teacher is None else cache_root() / "experiments" / cell_key(replace(cell, method=teacher), data)


@dataclass(frozen=True)
class Workers:
    """Where groups of cells run.

    Attributes:
        count: Groups that run side by side; a running cluster's own size comes before it.
        backend: "loky" for processes on this machine, "dask" for a cluster.
        address: A running cluster's scheduler; None starts a cluster on this machine.
    """

    count: int
    backend: str = "loky"
    address: str | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"--workers is {self.count}; give at least 1")
        if self.backend not in BACKENDS:
            raise UsageError(f"--backend is {self.backend!r}; give one of {', '.join(BACKENDS)}")
        if self.address is not None and self.backend == "loky":
            raise UsageError("--address is given, but the backend loky runs on this machine; add --backend dask")


@contextlib.contextmanager
def parallel(workers: Workers) -> Iterator[joblib.Parallel]:
    """Start workers.

    Args:
        workers: Which and how many.

    Yields:
        Runs delayed calls and gives their results as they come.

    Raises:
        UsageError: If the backend is not installed.
        RunError: If no cluster answers, or a worker process dies.
    """
    cluster = _dask_cluster(workers) if workers.backend == "dask" else contextlib.nullcontext()
    jobs = workers.count if workers.address is None else -1
    with cluster, joblib.parallel_config(backend=workers.backend, n_jobs=jobs):
        try:
            yield joblib.Parallel(batch_size=1, return_as="generator_unordered")
        except BrokenProcessPool as error:
            raise RunError(WORKER_DIED) from error


@contextlib.contextmanager
def _dask_cluster(workers: Workers) -> Iterator[None]:
    try:
        distributed = importlib.import_module("distributed")
    except ImportError as error:
        raise UsageError("--backend dask: distributed is not installed; pip install 'dask[distributed]'") from error
    with contextlib.ExitStack() as stack:
        # One thread a process, since a cell seeds the generators of its whole process.
        local = {"n_workers": workers.count, "threads_per_worker": 1, "dashboard_address": None}
        cluster = workers.address or stack.enter_context(distributed.LocalCluster(**local))
        try:
            stack.enter_context(distributed.Client(cluster, timeout="10s"))
        except (OSError, ValueError) as error:
            raise RunError(f"--address: no Dask scheduler answers at {cluster}; start one, or leave it out") from error
        try:
            yield
        except distributed.KilledWorker as error:
            raise RunError(WORKER_DIED) from error


def measure(cell: Cell, key: str, data: DataFiles, run_method: RunMethod) -> CellResult:
    """Run one cell on one thread, with freshly seeded global generators.

    Sums in another order differ in the last bits, so the number of threads is part of a result: one thread a cell, and
    as many cells side by side as there are cores, gives the same numbers on any machine and with any number of workers.

    Args:
        cell: The cell.
        key: Fingerprint that its result will have.
        data: Its data files.
        run_method: Runs the method.

    Returns:
        The finished cell.

    Raises:
        UsageError: If the method refuses its data or settings.
        RunError: If the method fails.
    """
    random.seed(cell.config.seed)
    np.random.seed(cell.config.seed)  # noqa: NPY002  (libraries that are given no generator draw from this one)
    torch.manual_seed(cell.config.seed)
    started = time.perf_counter()
    with one_thread():
        result = run_method(cell.config, cell.method)
    wall_seconds = time.perf_counter() - started
    accuracy, macro_f1 = accuracy_and_macro_f1(result.labels, result.predictions, len(result.label_names))
    return CellResult(
        **cell.place._asdict(),
        variant=cell.variant,
        method=cell.method,
        key=key,
        preset=cell.preset,
        accuracy=accuracy,
        macro_f1=macro_f1,
        test_examples=len(result.labels),
        predictions=fingerprint(result.predictions),
        parameters=result.parameters,
        labels_used=result.labels_used,
        seconds=round(result.seconds, 2),
        wall_seconds=round(wall_seconds, 2),
        data=dict(data),
        versions={"l2a": __version__, "python": platform.python_version(), **{it: version(it) for it in PACKAGES}},
        machine=_machine(),
        diagnostics=dict(result.diagnostics),
        code=code_fingerprint(),
    )


def _machine() -> dict[str, str | int | float]:
    """Describe the machine as far as it bears on time and rounding; nothing in it names the machine."""
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count() or 1,
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


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
    run_method: RunMethod,
    workers: Workers,
    progress: Progress = SILENT,
) -> tuple[Outcome, ...]:
    """Run what is left of a grid; the results do not depend on the number of workers.

    Groups that another live runner of the same folder holds are left to it first, and waited for at the end.

    Args:
        planned: The plan, in the order of the run.
        data: Data files by pair.
        folder: The card's results folder; every finished cell is written to it at once.
        run_method: Called in worker processes, which import it by name.
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
            run = joblib.delayed(_run_group)
            calls = [run(group, data[group[0].cell.place.pair], folder, run_method, wait) for group in left]
            left = []
            for group, found in pool(calls):
                if not found:
                    left.append(group)
                outcomes += found
                advance(len(found))
                for outcome in found:
                    facts = {**outcome.cell.place._asdict(), "variant": outcome.cell.variant}
                    progress.event("cell", **facts, status=outcome.status, message=outcome.message)
    return tuple(outcomes)


def _run_group(
    group: PlannedGroup, data: DataFiles, folder: Path, run_method: RunMethod, wait: bool
) -> tuple[PlannedGroup, list[Outcome]]:
    """Run cells one after another, saving each; no outcomes where another runner holds the group.

    The group is given back, since results come in any order.
    """
    place = group[0].cell.place
    lock = lock_for(folder, fingerprint(place.pair, place.shots, place.seed))
    try:
        with lock.acquire(timeout=-1 if wait else 0):
            return group, [_run_or_find(cell, data, folder, run_method) for cell in group]
    except Timeout:
        return group, []


def _run_or_find(planned: PlannedCell, data: DataFiles, folder: Path, run_method: RunMethod) -> Outcome:
    """Run a cell; a failed one, of whatever kind, must not cost the others."""
    cell = planned.cell
    # A method without a student has one result for all students, and cards share variants: run once and copied.
    known = find_result(folder, planned.key)
    if known is not None:
        save_result(folder, replace(known, **cell.place._asdict(), variant=cell.variant))
        return Outcome(cell, "found")
    try:
        save_result(folder, measure(cell, planned.key, cell_files(cell, data), run_method))
    except (UsageError, RunError) as error:
        return Outcome(cell, "failed", str(error))
    except Exception as error:
        logger.error("cell %s %s failed", cell.place, cell.variant, exc_info=error)
        return Outcome(cell, "failed", f"{type(error).__name__}: {error}")
    mark = teacher_mark(cell, data)
    if mark is not None:
        atomic_write_text(mark, "")
    return Outcome(cell, "ran")
