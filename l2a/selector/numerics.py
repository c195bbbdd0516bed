"""Probability arithmetic shared by the features and the rules."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
SMALLEST_PROBABILITY = 1e-7


def softmax(logits: Floats) -> Floats:
    """Normalise logits over the last axis.

    Args:
        logits: float32 (..., C).

    Returns:
        float32 (..., C), summing to 1.
    """
    exponents = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: Floats = exponents / exponents.sum(axis=-1, keepdims=True)
    return probabilities


def entropy(probabilities: Floats) -> Floats:
    """Shannon entropy over the last axis as a share of its maximum, log C.

    Args:
        probabilities: float32 (..., C), C >= 2.

    Returns:
        float32 (...), in [0, 1].
    """
    logarithms = np.log(np.maximum(probabilities, SMALLEST_PROBABILITY))
    nats: Floats = -(probabilities * logarithms).sum(axis=-1)
    return nats / np.float32(np.log(probabilities.shape[-1]))


def kl_divergence(first: Floats, second: Floats) -> Floats:
    """KL(first || second) in nats over the last axis.

    Args:
        first: float32 (..., C) probabilities.
        second: float32 (..., C) probabilities.

    Returns:
        float32 (...), at least 0.
    """
    logarithms = np.log(np.maximum(first, SMALLEST_PROBABILITY)) - np.log(np.maximum(second, SMALLEST_PROBABILITY))
    nats: Floats = np.maximum((first * logarithms).sum(axis=-1), np.float32(0.0))
    return nats


def ranks_within(values: Floats, groups: NDArray[np.int64]) -> Floats:
    """Rank values inside each group, as quantiles.

    Args:
        values: float32 (N,).
        groups: int64 (N,), the group of each value.

    Returns:
        float32 (N,) in (0, 1]; 1 marks a group's largest value.
    """
    quantiles = np.empty(len(values), np.float32)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        order = values[members].argsort(kind="stable")
        quantiles[members[order]] = np.arange(1, len(members) + 1) / len(members)
    return quantiles
