"""A cell's own conditions: one thread and its own seed, whatever ran before it or runs beside it."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import sklearn.metrics  # noqa: F401  (its thread pools must be loaded before they are limited)
import torch
from threadpoolctl import threadpool_limits


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
