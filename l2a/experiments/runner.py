"""What is left to run, what is shared and cached, and roughly what it costs."""

import contextlib
import functools
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
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, get_args

import joblib
import numpy as np
import psutil
import sklearn.metrics  # noqa: F401  (its thread pools must be loaded before they are limited)
import torch
from filelock import Timeout
from sklearn.metrics import accuracy_score, f1_score
from threadpoolctl import threadpool_limits

from l2a import __version__
from l2a.config import DistillConfig
from l2a.experiments.card import Cell, DataFiles, Group, cell_files, cell_key
from l2a.experiments.results import CellResult, Place, find_result, lock_for, save_result
from l2a.util.cache import cache_root, fingerprint
from l2a.util.errors import RunError, UsageError
from l2a.util.files import atomic_write_text
from l2a.util.progress import SILENT, Progress

if TYPE_CHECKING:
    from l2a.pipeline.methods import MethodResult


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


BackendName = Literal["loky", "dask", "ray"]
BACKENDS: tuple[str, ...] = get_args(BackendName)
WORKER_DIED = (
    "a worker process was killed, most often for want of memory; every finished cell is kept: "
    "run the command again to go on, with fewer --workers if it happens again"
)


@dataclass(frozen=True)
class Workers:
    """Where groups of cells run.

    Attributes:
        count: Groups that run side by side; a running cluster's own size comes before it.
        backend: "loky" for processes on this machine, "dask" or "ray" for a cluster.
        address: A running cluster's scheduler; None starts a cluster on this machine.
    """

    count: int
    backend: str = "loky"
    address: str | None = None

    def __post_init__(self) -> None:
        """Check the values once."""
        if self.count < 1:
            raise UsageError(f"workers: {self.count} came; at least 1 is needed")
        if self.backend not in BACKENDS:
            raise UsageError(f"backend: {self.backend!r} came; allowed: {', '.join(BACKENDS)}")
        if self.address is not None and self.backend == "loky":
            raise UsageError("address: the backend loky runs on this machine; choose --backend dask or ray")


def default_count() -> int:
    """Count the cores that this process may use.

    Returns:
        One worker for each core, since a cell runs on one thread.
    """
    return int(joblib.cpu_count())


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
    jobs = workers.count if workers.address is None else -1
    with _cluster(workers), joblib.parallel_config(backend=workers.backend, n_jobs=jobs):
        try:
            yield joblib.Parallel(batch_size=1, return_as="generator_unordered")
        except BrokenProcessPool as error:
            raise RunError(WORKER_DIED) from error


def _cluster(workers: Workers) -> contextlib.AbstractContextManager[None]:
    if workers.backend == "loky":
        return contextlib.nullcontext()
    return _dask_client(workers) if workers.backend == "dask" else _ray_client(workers)


@contextlib.contextmanager
def _dask_client(workers: Workers) -> Iterator[None]:
    distributed = _require("distributed", "dask[distributed]")
    with contextlib.ExitStack() as stack:
        # One thread a process, since a cell seeds the generators of its whole process.
        local = {"n_workers": workers.count, "threads_per_worker": 1, "dashboard_address": None}
        cluster = workers.address or stack.enter_context(distributed.LocalCluster(**local))
        stack.enter_context(_connected(distributed, cluster))
        try:
            yield
        except distributed.KilledWorker as error:
            raise RunError(WORKER_DIED) from error


def _connected(distributed: ModuleType, cluster: Any) -> contextlib.AbstractContextManager[Any]:
    try:
        client: contextlib.AbstractContextManager[Any] = distributed.Client(cluster, timeout="10s")
    except (OSError, ValueError) as error:
        raise RunError(f"address: no Dask scheduler answers at {cluster}; start one, or leave it out") from error
    return client


@contextlib.contextmanager
def _ray_client(workers: Workers) -> Iterator[None]:
    ray = _require("ray", "ray")
    ray.init(address=workers.address, num_cpus=workers.count if workers.address is None else None)
    importlib.import_module("ray.util.joblib").register_ray()
    try:
        yield
    finally:
        ray.shutdown()


def _require(module: str, requirement: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"backend: {module} is not installed; pip install '{requirement}'") from error


@contextlib.contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Run a block on one thread with freshly seeded global generators.

    Sums in another order differ in the last bits, so the number of threads is part of a result: one thread a cell, and
    as many cells side by side as there are cores, gives the same numbers on any machine and with any number of workers.

    Args:
        seed: Of the generators that libraries draw from without being given one, such as those of dropout.

    Yields:
        Nothing.
    """
    threads = torch.get_num_threads()
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (libraries that are given no generator draw from this one)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    try:
        with threadpool_limits(limits=1):
            yield
    finally:
        torch.set_num_threads(threads)


RunMethod = Callable[[DistillConfig, str], "MethodResult"]
"""Trains and evaluates one row of one configuration; it alone opens the test split, at its end."""

PACKAGES = ("torch", "transformers", "tokenizers", "stable-baselines3", "scikit-learn", "numpy")


def measure(cell: Cell, key: str, data: DataFiles, run_method: RunMethod) -> CellResult:
    """Run one cell by itself: one thread, its own seed.

    Args:
        cell: The cell.
        key: Fingerprint that its result will have.
        data: Its data files.
        run_method: Runs the row.

    Returns:
        The finished cell.

    Raises:
        UsageError: If the row refuses its data or settings.
        RunError: If the row fails.
    """
    started = time.perf_counter()
    with isolated(cell.config.seed):
        row = run_method(cell.config, cell.row)
    wall_seconds = time.perf_counter() - started
    config = cell.config
    return CellResult(
        **cell.place._asdict(),
        method=cell.method,
        row=cell.row,
        key=key,
        preset=cell.preset,
        accuracy=float(accuracy_score(row.labels, row.predictions)),
        macro_f1=float(f1_score(row.labels, row.predictions, average="macro")),
        test_examples=len(row.labels),
        predictions=fingerprint(row.predictions),
        parameters=row.parameters,
        labels_used=((config.shots or 0) + 2 * config.dev_shots) * len(row.label_names),
        seconds=round(row.seconds, 2),
        wall_seconds=round(wall_seconds, 2),
        data=dict(data),
        versions=_versions(),
        machine=describe_machine(),
        diagnostics=dict(row.diagnostics),
    )


def describe_machine() -> dict[str, str | int | float]:
    """Describe the machine as far as it bears on time and rounding; nothing in it names the machine.

    Returns:
        Processor architecture, cores, memory in GiB and device.
    """
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count() or 1,
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


@functools.cache
def _versions() -> dict[str, str]:
    installed = {name: version(name) for name in PACKAGES}
    return {"l2a": __version__, "python": platform.python_version(), **installed}


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
            calls = [joblib.delayed(_run_or_return)(group, data, folder, run_method, wait) for group in left]
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
    group: PlannedGroup, data: DataFiles, folder: Path, run_method: RunMethod, wait: bool
) -> tuple[Outcome, ...] | None:
    """Run the cells of a group one after another, saving each; a failed one does not stop the others.

    Args:
        group: Cells that share their teachers.
        data: Their data files.
        folder: The card's results folder.
        run_method: Runs a row.
        wait: Wait for another runner that holds the group, instead of giving up.

    Returns:
        An outcome a cell, or None when another runner holds the group.
    """
    place = group[0].cell.place
    lock = lock_for(folder, fingerprint(place.pair, place.shots, place.seed))
    try:
        with lock.acquire(timeout=-1 if wait else 0):
            return tuple(_run_or_find(cell, data, folder, run_method) for cell in group)
    except Timeout:
        return None


def _run_or_return(group: PlannedGroup, data: Mapping[str, DataFiles], *arguments: Any) -> tuple[PlannedGroup, Any]:
    """Give the group back with its outcomes, since results come in any order."""
    return group, run_group(group, data[group[0].cell.place.pair], *arguments)


def _run_or_find(planned: PlannedCell, data: DataFiles, folder: Path, run_method: RunMethod) -> Outcome:
    cell = planned.cell
    # A method without a student has one result for all students, and cards share methods: run once and copied.
    known = find_result(folder, planned.key)
    if known is not None:
        save_result(folder, known.moved(cell.place, cell.method))
        return Outcome(cell, "found")
    try:
        save_result(folder, measure(cell, planned.key, cell_files(cell, data), run_method))
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
