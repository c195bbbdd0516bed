"""Work spread over a Dask cluster, one that runs already or one started on this machine."""

import importlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from l2a.util.errors import RunError, UsageError

AHEAD = 2  # pieces in hand for each thread of the cluster: none idles, and memory stays the same
SECONDS_TO_ANSWER = 10
WORKER_DIED = "a worker process was killed, most often because memory ran out"
Kept = TypeVar("Kept")
Found = TypeVar("Found")


@contextmanager
def open_client(workers: int | None = None, address: str | None = None) -> Iterator[Any]:
    """Connect to a cluster; what it was asked for is cancelled at the end of the block.

    Args:
        workers: Processes of a cluster that is started on this machine, each with one thread, and ends with the block.
        address: The scheduler of a cluster that runs already, such as tcp://10.0.0.1:8786.

    Yields:
        A ``distributed.Client``; None where neither is given, for work in this process.

    Raises:
        UsageError: If both are given.
        ImportError: If the package distributed, of the extra "experiments", is missing.
        RunError: If no cluster answers, it is lost, or its workers die of the same piece of work again and again.
    """
    if workers is not None and address is not None:
        raise UsageError(f"--workers {workers} starts a cluster here, --address {address} names another; give only one")
    if workers is None and address is None:
        yield None
        return
    distributed = importlib.import_module("distributed")
    with ExitStack() as stack:
        local = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": None}
        at = address or stack.enter_context(distributed.LocalCluster(**local))
        try:
            client = stack.enter_context(distributed.Client(at, timeout=SECONDS_TO_ANSWER))
            client.wait_for_workers(1, timeout=SECONDS_TO_ANSWER)
        except (OSError, ValueError, MemoryError) as error:  # the last from what another server says
            why = f"no Dask scheduler answers at {at}, or none that has a worker; start both there, or leave it out"
            raise RunError(f"--address: {why}") from error
        try:
            yield client
        except distributed.KilledWorker as error:
            raise RunError(f"{WORKER_DIED}, and so were those that took over; give each worker more memory") from error
        except distributed.CancelledError as error:
            raise RunError(f"the Dask scheduler at {at} was lost; start it again, and run the command again") from error


def spread(
    client: Any, function: Callable[[Any, Any], Found], model: Any, pairs: Iterable[tuple[Kept, Any]]
) -> Iterator[tuple[Kept, Found]]:
    """Apply a function to pieces of work, each once and in their order, with a few pieces in memory at a time.

    The cluster keeps model and pieces until their results are here: those of a worker that dies are computed again.

    Args:
        client: Of a cluster; None to compute in this process.
        function: One of a module, which depends on its arguments alone.
        model: Its first argument, sent to each worker once.
        pairs: What stays here and what is sent.

    Yields:
        What stayed here, and what the function gave.
    """
    if client is None:
        yield from ((kept, function(model, sent)) for kept, sent in pairs)
        return
    held, waiting = client.submit(_same, model, pure=False), deque[tuple[Kept, Any]]()
    for kept, sent in pairs:
        waiting.append((kept, client.submit(function, held, sent, pure=False)))
        while len(waiting) > AHEAD * max(1, sum(client.nthreads().values())):
            first, future = waiting.popleft()
            yield first, future.result()
    for first, future in waiting:
        yield first, future.result()


def _same(model: Any) -> Any:
    return model
