"""Accuracy and macro-F1 with bootstrap intervals, and the CPU time of a classifier."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, f1_score
from threadpoolctl import threadpool_limits
from torch import nn

from l2a.data.examples import TextInput

RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A measured value with its 95 % interval.

    Attributes:
        value: The value on all examples.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ClassificationMetrics:
    """How good a classifier is on one set of examples.

    Attributes:
        accuracy: Share of right predictions, in [0, 1].
        macro_f1: Unweighted mean of the classes' F1, in [0, 1].
    """

    accuracy: Interval
    macro_f1: Interval


def classification_metrics(
    labels: NDArray[np.int64], predictions: NDArray[np.int64], classes: int, rng: np.random.Generator
) -> ClassificationMetrics:
    """Measure accuracy and macro-F1 with percentile bootstrap intervals (Efron, 1979).

    Args:
        labels: int64 (N,), the true classes, N at least 1.
        predictions: int64 (N,), the predicted classes.
        classes: C; a class that neither side holds counts as an F1 of 0.
        rng: Source of the resamples.

    Returns:
        Both metrics, each with its 95 % interval over 1000 resamples of the examples.
    """
    cells = np.bincount(labels * classes + predictions, minlength=classes**2)
    # Resampling examples is a multinomial draw over the cells of their contingency table.
    counts = rng.multinomial(len(labels), cells / len(labels), size=RESAMPLES).reshape(RESAMPLES, classes, classes)
    tail = (1.0 - LEVEL) / 2.0
    low, high = np.quantile(_from_confusion(counts), [tail, 1.0 - tail], axis=0)
    points = accuracy_and_macro_f1(labels, predictions, classes)
    accuracy, macro_f1 = (Interval(*map(float, ends)) for ends in zip(points, low, high, strict=True))
    return ClassificationMetrics(accuracy, macro_f1)


def accuracy_and_macro_f1(
    labels: NDArray[np.int64], predictions: NDArray[np.int64], classes: int
) -> tuple[float, float]:
    """Measure how good predictions are.

    Args:
        labels: int64 (N,), the true classes, N at least 1.
        predictions: int64 (N,), the predicted classes.
        classes: C; all count in macro-F1, one that neither side holds as 0.

    Returns:
        Accuracy and macro-F1, both in [0, 1].
    """
    every_class = list(range(classes))
    macro_f1 = f1_score(labels, predictions, labels=every_class, average="macro", zero_division=0)
    return float(accuracy_score(labels, predictions)), float(macro_f1)


def _from_confusion(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Compute accuracy and macro-F1, (R, 2), from confusion tables (R, C, C) with the true class first."""
    right = np.diagonal(counts, axis1=1, axis2=2)
    accuracy = right.sum(axis=1) / counts.sum(axis=(1, 2))
    either = counts.sum(axis=1) + counts.sum(axis=2)
    f1 = np.divide(2.0 * right, either, out=np.zeros(right.shape), where=either > 0)
    return np.stack([accuracy, f1.mean(axis=1)], axis=1)


Predict = Callable[[Sequence[TextInput]], NDArray[np.int64]]

BATCH_SIZES = (1, 32)
LEAST_REPEATS, MOST_REPEATS = 5, 30


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
    predict: Predict, inputs: Sequence[TextInput], module: nn.Module | None = None, seconds: float = 1.2
) -> Mapping[str, float]:
    """Measure the processor time that a text takes on one thread of the CPU, tokenisation included, after a warm-up.

    Args:
        predict: Classifies a list of texts.
        inputs: Texts to classify, at least one; they are cycled through, so give varied ones.
        module: The network that ``predict`` runs, if any; it is on the CPU while it is measured.
        seconds: Time to spend on all batch sizes together; a very slow classifier takes six calls for each.

    Returns:
        ``batch_1`` and ``batch_32``, the medians over the calls in milliseconds of CPU time a text, and
        ``batch_1_spread`` and ``batch_32_spread``, half of their interquartile ranges.
    """
    device = None if module is None else next(module.parameters()).device
    found: dict[str, float] = {}
    try:
        if module is not None:
            module.to("cpu")
        with one_thread(), torch.inference_mode():
            for size in BATCH_SIZES:
                times = _calls(predict, inputs, size, seconds / len(BATCH_SIZES)) * 1000.0 / size
                low, median, high = np.quantile(times, [0.25, 0.5, 0.75])
                found |= {f"batch_{size}": float(median), f"batch_{size}_spread": float(high - low) / 2}
    finally:
        if module is not None:
            module.to(device)
    return found


def _calls(predict: Predict, inputs: Sequence[TextInput], size: int, seconds: float) -> NDArray[np.float64]:
    """Seconds of processor time of each call; the wall clock only says when to stop."""
    texts, durations = itertools.cycle(inputs), list[float]()
    predict(list(itertools.islice(texts, size)))
    deadline = time.perf_counter() + seconds
    while len(durations) < MOST_REPEATS and (len(durations) < LEAST_REPEATS or time.perf_counter() < deadline):
        batch = list(itertools.islice(texts, size))
        started = time.process_time()
        predict(batch)
        durations.append(time.process_time() - started)
    return np.array(durations)
