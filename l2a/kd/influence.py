"""How much each text would help if the student took a step on it, to first order (Koh and Liang, ICML 2017, and after).

A whole round cannot be run for every choice of texts. But a few optimiser steps are nearly linear in the gradients of
the texts they are taken on, so that one number a text says what it adds.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from l2a.encoding import inference_batches
from l2a.kd.data import DistillationSet
from l2a.kd.inference import run_student
from l2a.kd.separation import separation
from l2a.kd.trainer import KDTrainer
from l2a.students.student import Student

STEP = 1e-3
"""Length of the trial step as a share of the weights' own: long enough for float32, short enough to be linear."""


def influences(
    trainer: KDTrainer, texts: DistillationSet, moves: Sequence[torch.Tensor], judge: DistillationSet
) -> NDArray[np.float32]:
    """Say how much the student's separation of some labelled texts rises for each text that an update is made of.

    With s the gradient of the separation, D the moves and g_i the gradient of a text's loss, it is -s' D g_i: how far
    the text's loss falls when the weights move along D s. Two passes without gradients give that for all texts.

    Args:
        trainer: Its student is left as it came.
        texts: N texts that updates can be made of.
        moves: D, of the shapes of the model's parameters (``KDTrainer.moves_per_gradient``).
        judge: Labelled texts.

    Returns:
        float32 (N,), nats for an update that consists of this text alone.
    """
    student = trainer.student
    direction = [move * slope for move, slope in zip(moves, separation_gradient(student, judge), strict=True)]
    length, weights = _length(direction), _length(list(student.model.parameters()))
    if length == 0:
        return np.zeros(len(texts), np.float32)
    reach, before = STEP * weights / length, student.snapshot()
    ahead = _losses_after(trainer, texts, direction, reach)
    behind = _losses_after(trainer, texts, direction, -2 * reach)
    student.restore(before)
    falls: NDArray[np.float32] = ((behind - ahead) / (2 * reach)).astype(np.float32)
    return falls


def separation_gradient(student: Student, judge: DistillationSet) -> list[torch.Tensor]:
    """Differentiate the separation of labelled texts by the student's weights, without dropout.

    The separation is of all texts at once: it is differentiated by their logits first, and those batch by batch.

    Args:
        student: Any student; it has no gradients afterwards.
        judge: M labelled texts.

    Returns:
        float32 tensors of the shapes of ``student.model.parameters()``, in their order.
    """
    device, parameters = student.output.weight.device, list(student.model.parameters())
    logits = torch.from_numpy(run_student(student, judge.encoded)[0]).requires_grad_(True)
    (by_logits,) = torch.autograd.grad(separation(logits, torch.from_numpy(judge.labels)), logits)
    training = student.model.training
    student.model.eval()
    student.model.zero_grad(set_to_none=True)
    for indices in inference_batches(judge.encoded):
        found, _ = student(judge.encoded.padded(indices, device))
        (found.float() * by_logits[indices.tolist()].to(device)).sum().backward()  # type: ignore[no-untyped-call]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    student.model.zero_grad(set_to_none=True)
    student.model.train(training)
    return gradients


def _losses_after(
    trainer: KDTrainer, texts: DistillationSet, direction: Sequence[torch.Tensor], reach: float
) -> NDArray[np.float64]:
    with torch.no_grad():
        for parameter, way in zip(trainer.student.model.parameters(), direction, strict=True):
            parameter.add_(way, alpha=reach)
    return trainer.losses(texts).astype(np.float64)


def _length(tensors: Sequence[torch.Tensor]) -> float:
    return float(torch.stack([tensor.detach().square().sum() for tensor in tensors]).sum().sqrt())
