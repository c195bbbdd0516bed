"""Log-likelihood whatever the confidence and the thresholds of the student.

A few distillation steps move a student's thresholds and its confidence far more than its order of the texts, back and
forth, and whichever texts they are taken on. What outlasts the next steps is how well it tells the classes apart.
"""

import numpy as np
from numpy.typing import NDArray

from l2a.selector.numerics import SMALLEST_PROBABILITY, Floats, softmax

SCALES = np.geomspace(0.25, 8.0, 8).astype(np.float32)


def separation(logits: Floats, labels: NDArray[np.int64]) -> Floats:
    """Say how well logits tell the classes apart (after temperature scaling: Guo et al., ICML 2017).

    Each class's logits are centred on the texts and given its share of the labels, and the temperature is the one
    that suits them best.

    Args:
        logits: float32 (..., M, C).
        labels: int64 (M,).

    Returns:
        float32 (...), mean log-likelihood of the labels, in nats, at most 0.
    """
    shares = np.bincount(labels, minlength=logits.shape[-1]) / len(labels)
    offsets = np.log(np.maximum(shares, SMALLEST_PROBABILITY)).astype(np.float32)
    centred = logits - logits.mean(axis=-2, keepdims=True)
    standard = centred / np.maximum(centred.std(axis=(-2, -1), keepdims=True), 1e-12)
    probabilities = softmax(SCALES[:, None, None] * standard[..., None, :, :] + offsets)
    of_labels = probabilities[..., np.arange(len(labels)), labels]
    likelihoods: Floats = np.log(np.maximum(of_labels, SMALLEST_PROBABILITY)).mean(axis=-1).max(axis=-1)
    return likelihoods
