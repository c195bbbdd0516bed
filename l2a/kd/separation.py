"""Log-likelihood whatever the confidence and the thresholds of the student.

A few distillation steps move a student's thresholds and its confidence far more than its order of the texts, back and
forth, and whichever texts they are taken on. What outlasts the next steps is how well it tells the classes apart.
"""

import torch
from torch import Tensor

SCALES = tuple(0.25 * 32 ** (i / 7) for i in range(8))
"""Inverse temperatures, from 0.25 to 8."""


def separation(logits: Tensor, labels: Tensor) -> Tensor:
    """Say how well logits tell the classes apart (after temperature scaling: Guo et al., ICML 2017).

    Each class's logits are centred on the texts and given its share of the labels, and the temperature is the one
    that suits them best.

    Args:
        logits: float32 (M, C).
        labels: int64 (M,).

    Returns:
        float32 (), mean log-likelihood of the labels, in nats, at most 0; differentiable.
    """
    shares = torch.bincount(labels, minlength=logits.shape[1]) / len(labels)
    centred = logits - logits.mean(dim=0)
    standard = centred / centred.std(correction=0).clamp(min=1e-12)
    scales = torch.tensor(SCALES, dtype=logits.dtype, device=logits.device)
    scaled = scales[:, None, None] * standard + shares.clamp(min=1e-7).log()
    of_labels = scaled.log_softmax(dim=2)[:, torch.arange(len(labels), device=labels.device), labels]
    return of_labels.mean(dim=1).max()
