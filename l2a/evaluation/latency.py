"""CPU time that a classifier takes for one sentence, alone and in batches."""

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from l2a.examples import TextInput

Predict = Callable[[Sequence[TextInput]], NDArray[np.int64]]

BATCH_SIZES = (1, 32)
LEAST_REPEATS = 3
MOST_REPEATS = 30


def measure_latency(predict: Predict, inputs: Sequence[TextInput], seconds: float = 1.2) -> Mapping[str, float]:
    """Measure the median time a sentence takes, tokenisation included, after a warm-up call.

    Args:
        predict: Classifies a list of texts on the CPU.
        inputs: Texts to classify, at least one; they are cycled through, so give varied ones.
        seconds: Time to spend on all batch sizes together; a very slow classifier takes four calls for each.

    Returns:
        ``batch_1`` and ``batch_32``, milliseconds per sentence, with the threads that torch is set to use.
    """
    return {f"batch_{size}": _per_sentence(predict, inputs, size, seconds / 2) for size in BATCH_SIZES}


def _per_sentence(predict: Predict, inputs: Sequence[TextInput], size: int, seconds: float) -> float:
    durations: list[float] = []
    deadline = time.perf_counter() + seconds
    with torch.inference_mode():
        predict(_batch(inputs, 0, size))
        while len(durations) < MOST_REPEATS and (len(durations) < LEAST_REPEATS or time.perf_counter() < deadline):
            batch = _batch(inputs, len(durations) * size, size)
            started = time.perf_counter()
            predict(batch)
            durations.append(time.perf_counter() - started)
    return float(np.median(durations)) * 1000.0 / size


def _batch(inputs: Sequence[TextInput], start: int, size: int) -> list[TextInput]:
    return [inputs[(start + offset) % len(inputs)] for offset in range(size)]
