"""Distillation losses: sums over classes; one loss an example, or their mean."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Reduction = Literal["mean", "none"]
"""The mean over the examples, or one loss an example."""


def _reduced(losses: Tensor, reduction: Reduction) -> Tensor:
    return losses.mean() if reduction == "mean" else losses


def soft_label_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, reduction: Reduction = "mean"
) -> Tensor:
    """T^2 KL(softmax(z_T / T) || softmax(z_S / T)), so that the gradient's size hardly depends on T.

    Source: Hinton, Vinyals and Dean (2015), equation 4 and the remark on T^2.

    Args:
        student_logits: float32 (B, C).
        teacher_logits: float32 (B, C).
        temperature: T, above 0.
        reduction: "mean" over the B examples, or "none".

    Returns:
        float32 (), or (B,) without reduction; 0 iff the two distributions are equal.
    """
    student = functional.log_softmax(student_logits / temperature, dim=1)
    teacher = functional.log_softmax(teacher_logits / temperature, dim=1)
    losses = temperature**2 * functional.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
    return _reduced(losses, reduction)


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, alpha: float,
    reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
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
    soft = soft_label_loss(student_logits, teacher_logits, temperature, "none")
    hard = functional.cross_entropy(student_logits, labels.clamp(min=0), reduction="none")
    real = (labels >= 0).to(soft.dtype)
    return _reduced(soft * (1 - real * (1 - alpha)) + hard * real * (1 - alpha), reduction)


def hidden_state_loss(
    student_states: Tensor, teacher_states: Tensor, projection: Tensor, reduction: Reduction = "mean"
) -> Tensor:
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
    return _reduced((projected - functional.normalize(teacher_states, dim=1)).pow(2).sum(1), reduction)


def subclass_loss(
    features: Tensor, head: nn.Linear, output: nn.Linear, targets: Tensor, counts: tuple[int, ...],
    reduction: Reduction = "mean",
) -> Tensor:  # fmt: skip
    """-sum t(c, s) log p(c, s), and a term that teaches the output layer alone what the head says of the classes.

    The second term is KL(folded head || output(features)) with the gradient stopped at both; the body never feels it,
    and the student is an ordinary C-class model at every step (our derivation).

    Args:
        features: float32 (B, h), what the student's output layer reads.
        head: The training head, (h) -> (K).
        output: The student's output layer, (h) -> (C).
        targets: float32 (B, K).
        counts: S_c for each class.
        reduction: "mean" over the B examples, or "none".

    Returns:
        float32 (), or (B,) without reduction.
    """
    logits = head(features)
    followed = functional.linear(features.detach(), output.weight, output.bias)
    classes = fold(logits.detach(), counts).softmax(dim=1)
    first = functional.cross_entropy(logits, targets, reduction=reduction)
    second = functional.cross_entropy(followed, classes, reduction=reduction)
    # Less the entropy of the folded head, which has no gradient here: the term is 0 where the layer follows the head.
    return first + second - _reduced(torch.special.entr(classes).sum(1), reduction)


def fold(subclass_logits: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Sum the subclasses' probabilities: z_c = logsumexp_s z(c, s), so that softmax(z)_c = sum_s p(c, s).

    Args:
        subclass_logits: float32 (B, K).
        counts: S_c for each class.

    Returns:
        float32 (B, C).
    """
    return torch.stack([part.logsumexp(dim=1) for part in torch.split(subclass_logits, list(counts), dim=1)], dim=1)
