"""Seeds torch's own generators for a while: what is drawn inside repeats, and the caller's draws are undisturbed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch on the CPU and every GPU, and put its generators back afterwards.

    Args:
        seed: Of weights and dropout drawn inside.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
