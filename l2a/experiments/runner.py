"""Runs what is left of a grid and keeps what is finished, one line of JSON a cell, safe against kills and damage."""

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import joblib
import numpy as np
import psutil
import torch
from filelock import FileLock, Timeout
from transformers import set_seed

from l2a.config import DistillConfig
from l2a.evaluation.metrics import classification_metrics, one_thread
from l2a.experiments.card import Cell, DataFiles, Group, Place, cell_files, cell_key
from l2a.pipeline.methods import METHODS, MethodResult
from l2a.util import SILENT, Progress, RunError, UsageError, cluster, logger, to_json
from l2a.util.files import Checkpoint, atomic_write_text, cache_root, code_fingerprint, fingerprint

RESULTS_FILE = "cells.jsonl"
FIRST_GUESS = 30.0  # seconds of a cell, and of a teacher, before any has been timed
RunMethod = Callable[[DistillConfig, str, Progress], MethodResult]
"""Trains and evaluates one method with one configuration; it alone opens the test split, at its end. The progress has
the checkpoint of the cell."""


@dataclass(frozen=True)
class CellResult:
    """What one cell gave, and everything needed to judge and repeat it."""

    pair: str
    shots: int
    seed: int
    variant: str
    method: str
    key: str  # fingerprint of the configuration and the data; another key means another result
    preset: str
    accuracy: float  # like macro_f1 a fraction on the target's test split
    macro_f1: float
    test_examples: int
    predictions: str  # fingerprint of the predicted labels, in the order of the test split
    parameters: int
    labels_used: int  # of the target, those of the reward and validation splits included
    seconds: float  # the method's own training and selection, shared teacher work aside
    wall_seconds: float  # the whole cell, with whatever teacher work it found missing in the cache
    data: Mapping[str, str]
    versions: Mapping[str, str]
    machine: Mapping[str, str | int | float]
    diagnostics: Mapping[str, float | int | str]  # what the method says about its own run
    code: str = ""  # fingerprint of the package's sources; empty where none was noted

    @property
    def place(self) -> Place:
        """The cell's place in the grid, by which results are sorted."""
        return Place(self.pair, self.shots, self.seed, self.variant)


def to_line(result: CellResult) -> str:
    """Write a result as one line of JSON that carries its own checksum as its last field."""
    body = to_json(asdict(result))[:-1]
    return body + _last_field(body.encode())


def from_line(line: bytes) -> CellResult:
    """Read one line, checking that it is what was written.

    Raises:
        ValueError: If the line is damaged.
        TypeError: If it is of another version of this file.
    """
    end = len(line) - len(_last_field(b""))
    if line[end:] != _last_field(line[:end]).encode():
        raise ValueError("the checksum does not match")
    fields = json.loads(line[:end] + b"}")
    fields.pop("student", None)  # "auto" in older lines; now a variant alone says which student it is
    return CellResult(**fields)


def _last_field(body: bytes) -> str:
    return f', "checksum": "{hashlib.sha256(body).hexdigest()[:16]}"}}'


def read_results(folder: Path) -> tuple[CellResult, ...]:
    """Read the finished cells of a card, sorted; damaged lines are reported and left out, so that they run again.

    Args:
        folder: The card's results folder, which may not exist yet.
    """
    path, results = folder / RESULTS_FILE, []
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.exists() else (), start=1):
        try:
            if line.strip():
                results.append(from_line(line))
        except (ValueError, TypeError) as error:
            logger.warning("%s line %d is damaged (%s); its cell will run again", path, number, error)
    return tuple(sorted(results, key=lambda result: result.place))


def save_result(folder: Path, result: CellResult) -> None:
    """Add a finished cell to the results file in one step; an older result of the same cell is replaced.

    Raises:
        RunError: If the disk is full; the file keeps its old content.
    """
    with lock_for(folder, "results"):
        known = {other.place: other for other in read_results(folder)} | {result.place: result}
        atomic_write_text(folder / RESULTS_FILE, "".join(f"{to_line(known[place])}\n" for place in sorted(known)))


def lock_for(folder: Path, name: str) -> FileLock:
    """Make a lock that all runners of one results folder share; it opens by itself when its holder dies.

    Args:
        folder: The card's results folder; it is made with the first lock.
        name: What is locked: a group of cells, or "results" for the file.
    """
    locks = folder / ".locks"
    if not (locks / ".gitignore").exists():
        atomic_write_text(locks / ".gitignore", "*\n")
    return FileLock(locks / f"{name}.lock")


class PlannedCell(NamedTuple):
    """A cell before a run."""

    cell: Cell
    files: dict[str, str]  # those that it reads, with their sha256
    key: str  # that its result must have
    teacher_key: str | None  # that of the teacher that is trained for it; None where there is none
    is_finished: bool
    seconds: float  # estimate of its work, that of its teacher included where no earlier cell trains it

    @property
    def teacher_mark(self) -> Path | None:
        """An empty file that exists once the teacher is in this machine's cache."""
        return None if self.teacher_key is None else cache_root() / "experiments" / self.teacher_key


PlannedGroup = list[PlannedCell]


def plan(groups: Iterable[Group], data: Mapping[str, DataFiles], finished: Sequence[CellResult]) -> list[PlannedGroup]:
    """Find out what is left of a grid: every cell, finished ones included, in the groups that came.

    The groups are in the order of the run; ``data`` holds the data files of each pair.
    """
    keys = {result.place: result.key for result in finished}
    # A cell that trained a teacher took longer than its own work: the longest such wait counts as typical.
    wait = max((result.wall_seconds - result.seconds for result in finished), default=FIRST_GUESS)
    claimed: set[Path] = set()  # teachers that an earlier cell of the plan will have trained

    def planned(cell: Cell) -> PlannedCell:
        files = data[cell.place.pair]
        teacher = next((part for part in METHODS[cell.method].needs if part.endswith("_teacher")), None)
        key, teacher_key = cell_key(cell, files), teacher and cell_key(replace(cell, method=teacher), files)
        timed = [result.seconds for result in finished if result.variant == cell.place.variant] or [FIRST_GUESS]
        is_finished, seconds = keys.get(cell.place) == key, sum(timed) / len(timed)
        found = PlannedCell(cell, cell_files(cell, files), key, teacher_key, is_finished, seconds)
        mark = found.teacher_mark
        if mark is None or is_finished or mark in claimed or mark.exists():
            return found
        claimed.add(mark)
        return found._replace(seconds=seconds + wait)

    return [[planned(cell) for cell in group] for group in groups]


def cost_seconds(planned: Sequence[PlannedGroup], workers: int) -> float:
    """Estimate the wall time of what is left, with so many groups side by side."""
    left = [sum(cell.seconds for cell in group if not cell.is_finished) for group in planned]
    return max([sum(left) / workers, *left], default=0.0)


@dataclass(frozen=True)
class Workers:
    """Where groups of cells run: ``count`` side by side, at least 1, but all of a running cluster."""

    count: int
    backend: str = "loky"  # processes on this machine; "dask" for a cluster
    address: str | None = None  # a running cluster's scheduler; None starts a cluster on this machine

    def __post_init__(self) -> None:
        if self.backend not in ("loky", "dask"):
            raise UsageError(f"--backend is {self.backend!r}; give one of loky, dask")
        if self.address is not None and self.backend == "loky":
            raise UsageError("--address is given, but the backend loky runs on this machine; add --backend dask")


class Outcome(NamedTuple):
    """What became of one cell in this run: it ran, was found finished by the time its turn came, or failed."""

    cell: Cell
    status: Literal["ran", "found", "failed"]
    message: str = ""  # the error


def run_groups(
    planned: Sequence[PlannedGroup], folder: Path, run_method: RunMethod, workers: Workers, progress: Progress = SILENT
) -> list[Outcome]:
    """Run what is left of a grid, one outcome a cell; the results do not depend on the number of workers.

    Groups that another live runner of the same folder holds are left to it first, and waited for at the end.

    Args:
        planned: The plan, in the order of the run.
        folder: The card's results folder; every finished cell is written to it at once.
        run_method: Called in worker processes, which import it by name.
        workers: Where groups run.
        progress: Shows finished cells.

    Raises:
        RunError: If no cluster answers, or a worker process died; what had finished is kept.
    """
    left = [chosen for group in planned if (chosen := [cell for cell in group if not cell.is_finished])]
    outcomes: list[Outcome] = []
    run, count = joblib.delayed(_run_group), workers.count if workers.address is None else None
    with (
        progress.stage("cells", sum(map(len, left))) as advance,
        # One thread a process, since a cell seeds the generators of its whole process.
        cluster.open_client(count if workers.backend == "dask" else None, workers.address),
        joblib.parallel_config(backend=workers.backend, n_jobs=count or -1),
    ):
        try:
            for wait in (False, True):
                calls, left = [run(group, folder, run_method, wait) for group in left], []
                for group, found in joblib.Parallel(batch_size=1, return_as="generator_unordered")(calls):
                    left += [] if found else [group]
                    outcomes += found
                    advance(len(found))
        except BrokenProcessPool as error:
            again = "finished cells are kept, so run the command again, with fewer --workers if it happens again"
            raise RunError(f"{cluster.WORKER_DIED}; {again}") from error
    return outcomes


def _run_group(group: PlannedGroup, folder: Path, run: RunMethod, wait: bool) -> tuple[PlannedGroup, list[Outcome]]:
    """Run cells one after another, saving each; no outcomes where another runner holds the group."""
    # The group is given back, since results come in any order.
    try:
        with lock_for(folder, fingerprint(*group[0].cell.place[:3])).acquire(timeout=-1 if wait else 0):
            return group, [_run_or_find(cell, folder, run) for cell in group]
    except Timeout:
        return group, []


def _run_or_find(planned: PlannedCell, folder: Path, run_method: RunMethod) -> Outcome:
    """Run a cell; a failed one, of whatever kind, must not cost the others."""
    cell, key, mark = planned.cell, planned.key, planned.teacher_mark
    # Cards share variants, and some differ only in what their method does not read: run once and copied.
    folders = [folder, *sorted(other for other in folder.parent.glob("*/") if other != folder)]
    known = next((result for place in folders for result in read_results(place) if result.key == key), None)
    if known is not None:
        save_result(folder, replace(known, **cell.place._asdict()))
        return Outcome(cell, "found")
    try:  # another version of the package starts a cell anew
        checkpoint = Checkpoint(folder / ".locks" / f"{key}-{code_fingerprint()[:12]}", {"cell": key})
        save_result(folder, _measure(planned, run_method, SILENT.keeping(checkpoint)))
    except (UsageError, RunError) as error:
        return Outcome(cell, "failed", str(error))
    except Exception as error:
        logger.error("cell %s failed", cell.place, exc_info=error)
        return Outcome(cell, "failed", f"{type(error).__name__}: {error}")
    shutil.rmtree(checkpoint.folder, ignore_errors=True)
    if mark is not None:
        atomic_write_text(mark, "")
    return Outcome(cell, "ran")


def _measure(planned: PlannedCell, run_method: RunMethod, progress: Progress) -> CellResult:
    """Run one cell on one thread, with freshly seeded global generators."""
    # Sums in another order differ in the last bits, so the threads are part of a result: one thread a cell, and as many
    # cells side by side as there are cores, gives the same numbers on any machine and with any number of workers.
    cell = planned.cell
    set_seed(cell.config.seed)  # for libraries that are given no generator
    started = time.perf_counter()
    with one_thread():
        result = run_method(cell.config, cell.method, progress)
    wall_seconds = time.perf_counter() - started
    test = result.test
    found = classification_metrics(test.labels, result.predictions, len(test.label_names), np.random.default_rng(0))
    packages = ("torch", "transformers", "tokenizers", "stable-baselines3", "scikit-learn", "numpy")
    machine: dict[str, str | int | float] = {  # what bears on time and rounding; nothing names the machine
        "platform": f"{platform.system()} {platform.machine()}", "cores": psutil.cpu_count() or 1,
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }  # fmt: skip
    return CellResult(
        **cell.place._asdict(), method=cell.method, key=planned.key, preset=cell.preset,
        accuracy=found.accuracy.value, macro_f1=found.macro_f1.value, test_examples=len(test),
        predictions=fingerprint(result.predictions), parameters=result.parameters, labels_used=result.labels_used,
        seconds=round(result.seconds, 2), wall_seconds=round(wall_seconds, 2), data=planned.files, machine=machine,
        versions={"l2a": version("l2a"), "python": platform.python_version(), **{it: version(it) for it in packages}},
        diagnostics=dict(result.diagnostics), code=code_fingerprint(),
    )  # fmt: skip
