"""Accuracy and macro-F1 with bootstrap intervals, and the CPU time of a classifier."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from l2a.data import Ints, TextInput


@dataclass(frozen=True)
class Interval:
    """A measured value with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ClassificationMetrics:
    """Share of right predictions, and unweighted mean of the classes' F1, both in [0, 1]."""

    accuracy: Interval
    macro_f1: Interval


def classification_metrics(
    labels: Ints, predictions: Ints, classes: int, rng: np.random.Generator
) -> ClassificationMetrics:
    """Measure accuracy and macro-F1 with percentile bootstrap intervals (Efron, 1979).

    Args:
        labels: int64 (N,), the true classes, N at least 1.
        predictions: int64 (N,), the predicted classes.
        classes: C; a class that neither side holds counts as an F1 of 0.
        rng: Source of 1000 resamples of the examples.
    """
    cells = np.bincount(labels * classes + predictions, minlength=classes**2)
    # Resampling examples is a multinomial draw over the cells of their contingency table, the true class first.
    tables = np.vstack([cells, rng.multinomial(len(labels), cells / len(labels), size=1000)])
    counts = tables.reshape(-1, classes, classes)
    right, either = np.diagonal(counts, axis1=1, axis2=2), counts.sum(axis=1) + counts.sum(axis=2)
    f1 = np.divide(2.0 * right, either, out=np.zeros(right.shape), where=either > 0)
    values = np.stack([right.sum(axis=1) / len(labels), f1.mean(axis=1)])
    lows, highs = np.quantile(values[:, 1:], [0.025, 0.975], axis=1).tolist()
    return ClassificationMetrics(*map(Interval, values[:, 0].tolist(), lows, highs))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch and the linear algebra of numpy and scikit-learn compute on one thread inside the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(limits=1):
            yield
    finally:
        torch.set_num_threads(threads)


def measure_latency(
    predict: Callable[[Sequence[TextInput]], Ints], inputs: Sequence[TextInput],
    module: torch.nn.Module | None = None, seconds: float = 1.2,
) -> Mapping[str, float]:  # fmt: skip
    """Measure the processor time that a text takes on one thread of the CPU, tokenisation included, after a warm-up.

    Args:
        predict: Classifies a list of texts.
        inputs: Texts to cycle through, at least one.
        module: The network that ``predict`` runs, if any; it is on the CPU while it is measured.
        seconds: Time to spend in all; a very slow classifier takes six calls for each size of a batch.

    Returns:
        ``batch_1`` and ``batch_32``, the medians over the calls in milliseconds of CPU time a text, and
        ``batch_1_spread`` and ``batch_32_spread``, half of their interquartile ranges.
    """
    module = module or torch.nn.Linear(1, 1)
    device, texts, found = next(module.parameters()).device, itertools.cycle(inputs), dict[str, float]()
    module.to("cpu")
    with one_thread(), torch.inference_mode():
        for size in (1, 32):
            predict(list(itertools.islice(texts, size)))
            times, deadline = list[float](), time.perf_counter() + seconds / 2  # the wall clock only says when to stop
            while len(times) < 5 or (len(times) < 30 and time.perf_counter() < deadline):
                batch = list(itertools.islice(texts, size))
                started = time.process_time()
                predict(batch)
                times.append((time.process_time() - started) * 1000.0 / size)
            low, median, high = np.quantile(times, [0.25, 0.5, 0.75]).tolist()
            found |= {f"batch_{size}": median, f"batch_{size}_spread": (high - low) / 2}
    module.to(device)
    return found
