"""Where groups of cells run: local processes, a Dask cluster or a Ray cluster, all through joblib."""

import contextlib
import importlib
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, get_args

import joblib

from l2a.errors import RunError, UsageError

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
