"""Distillation losses: sums over classes, means over examples."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Reduction = Literal["mean", "none"]
"""The mean over the examples, or one loss an example."""


def soft_label_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(softmax(z_T / T) || softmax(z_S / T)), so that the gradient's size hardly depends on T.

    Source: Hinton, Vinyals and Dean (2015), equation 4 and the remark on T^2.

    Args:
        student_logits: float32 (B, C).
        teacher_logits: float32 (B, C).
        temperature: T, above 0.

    Returns:
        float32 (), mean over the B examples; 0 iff the two distributions are equal.
    """
    student = functional.log_softmax(student_logits / temperature, dim=1)
    teacher = functional.log_softmax(teacher_logits / temperature, dim=1)
    return temperature**2 * functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    alpha: float,
    reduction: Reduction = "mean",
) -> torch.Tensor:
    """Soft labels everywhere, cross-entropy where a real label exists.

    L_i = alpha T^2 KL_i + (1 - alpha) CE_i with a real label, L_i = T^2 KL_i without one. Source: Hinton et al. (2015),
    section 2; which texts have a real label is ours.

    Args:
        student_logits: float32 (B, C).
        teacher_logits: float32 (B, C).
        labels: int64 (B,), -1 where only the teacher's label exists (augmented text).
        temperature: T, above 0.
        alpha: Weight of the soft-label term, 0 to 1.
        reduction: "mean" over the B examples, or "none".

    Returns:
        float32 (), or (B,) without reduction.
    """
    student = functional.log_softmax(student_logits / temperature, dim=1)
    teacher = functional.log_softmax(teacher_logits / temperature, dim=1)
    soft = temperature**2 * functional.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
    hard = functional.cross_entropy(student_logits, labels.clamp(min=0), reduction="none")
    real = (labels >= 0).to(soft.dtype)
    losses = soft * (1 - real * (1 - alpha)) + hard * real * (1 - alpha)
    return losses.mean() if reduction == "mean" else losses


def hidden_state_loss(
    student_states: torch.Tensor, teacher_states: torch.Tensor, projection: torch.Tensor, reduction: Reduction = "mean"
) -> torch.Tensor:
    """Mean squared distance of projected student states to teacher states, both on the unit sphere.

    Source: the hidden-state loss of TinyBERT (Jiao et al., 2020, equation 8) on pooled states; the normalisation,
    which makes the weight independent of the teacher's scale, is our own.

    Args:
        student_states: float32 (B, h).
        teacher_states: float32 (B, d).
        projection: float32 (h, d), learned and dropped on export.
        reduction: "mean" over the B examples, or "none".

    Returns:
        float32 (), or (B,) without reduction, 0 to 4.
    """
    projected = functional.normalize(student_states @ projection, dim=1)
    losses = (projected - functional.normalize(teacher_states, dim=1)).pow(2).sum(1)
    return losses.mean() if reduction == "mean" else losses


def attention_loss(
    student_attention: torch.Tensor,
    teacher_attention: torch.Tensor,
    attention_mask: torch.Tensor,
    reduction: Reduction = "mean",
) -> torch.Tensor:
    """Mean squared difference of the head-averaged attention of the last layers, over pairs of real tokens.

    L_i = 1 / n_i^2 sum_{j,k <= n_i} (A_S - A_T)_jk^2, A = mean over heads of softmax(QK' / sqrt(d_k)). Source: TinyBERT
    (Jiao et al., 2020, equation 7), which compares head by head and before the softmax; averaging over heads lets
    their numbers differ, and transformers returns attention after the softmax only (both changes are our own).

    Both models must read the same tokens without the fused kernels, which return no attention (``AttentionTransfer``
    sees to it), so this loss costs their speed.

    Args:
        student_attention: float32 (B, H_S, L, L), rows sum to 1.
        teacher_attention: float32 (B, H_T, L, L).
        attention_mask: int64 (B, L), 1 for real tokens.
        reduction: "mean" over the B examples, or "none".

    Returns:
        float32 (), or (B,) without reduction, 0 iff the averaged maps agree on all pairs of real tokens.
    """
    real = attention_mask.bool()
    pairs = real[:, :, None] & real[:, None, :]
    difference = (student_attention.mean(dim=1) - teacher_attention.mean(dim=1)).masked_fill(~pairs, 0.0)
    losses = difference.pow(2).sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp(min=1)
    return losses.mean() if reduction == "mean" else losses


SCALES = tuple(0.25 * 32 ** (i / 7) for i in range(8))
"""Inverse temperatures, from 0.25 to 8."""


def threshold_free_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
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
