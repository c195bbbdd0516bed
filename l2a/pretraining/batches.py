"""The order of training: batches of a token budget, a pure function of seed and step, so that a resume is exact."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from l2a.encoding import bucket_of

WINDOW = 64
"""Batches' worth of tokens that are sorted by length together."""


def epoch_batches(
    lengths: NDArray[np.int64], tokens_per_batch: int, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Shuffle one epoch into batches of texts of similar length.

    Args:
        lengths: int64 (N,), tokens in each text.
        tokens_per_batch: Padded tokens in a batch, at most (a single longer text is a batch of its own).
        rng: Source of the order.

    Returns:
        int64 positions of each batch; every text occurs once.
    """
    order = rng.permutation(len(lengths))
    windows = max(1, int(lengths.sum()) // (WINDOW * tokens_per_batch))
    batches: list[NDArray[np.int64]] = []
    for chunk in np.array_split(order, windows):
        batches.extend(_split_sorted(chunk[np.argsort(lengths[chunk], kind="stable")], lengths, tokens_per_batch))
    return [batches[position] for position in rng.permutation(len(batches))]


def _split_sorted(
    chunk: NDArray[np.int64], lengths: NDArray[np.int64], tokens_per_batch: int
) -> Iterator[NDArray[np.int64]]:
    start = 0
    while start < len(chunk):
        end = start + 1
        while end < len(chunk) and bucket_of(int(lengths[chunk[end]])) * (end - start + 1) <= tokens_per_batch:
            end += 1
        yield chunk[start:end]
        start = end


def batch_stream(
    lengths: NDArray[np.int64], tokens_per_batch: int, seed: int, first_step: int, last_step: int
) -> Iterator[NDArray[np.int64]]:
    """Give the batches of a range of steps.

    Args:
        lengths: int64 (N,), tokens in each text.
        tokens_per_batch: Padded tokens in a batch.
        seed: Of the order; epoch e is drawn from (seed, e).
        first_step: The first step wanted.
        last_step: One past the last.

    Yields:
        int64 positions of one batch a step.
    """
    step, epoch = 0, 0
    while step < last_step:
        batches = epoch_batches(lengths, tokens_per_batch, np.random.default_rng([seed, epoch]))
        yield from batches[max(0, first_step - step) : last_step - step]
        step, epoch = step + len(batches), epoch + 1
