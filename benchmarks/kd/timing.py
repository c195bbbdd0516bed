"""How long a piece of work takes."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Seconds:
    """Duration of a piece of work.

    Attributes:
        wall: As a clock shows it.
        cpu: Processor time of all threads; at one thread it hardly depends on what else the machine does.
    """

    wall: float
    cpu: float


def timed(work: Callable[[], Any]) -> Seconds:
    """Do some work and time it."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)
