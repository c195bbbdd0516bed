"""How much each text would help if the student took a step on it, to first order (Koh and Liang, ICML 2017, and after).

A whole round cannot be run for every choice of texts. But a few optimiser steps are nearly linear in the gradients of
the texts they are taken on, so that one number a text says what it adds.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from l2a.kd.data import DistillationSet
from l2a.kd.separation import separation
from l2a.kd.trainer import KDTrainer
from l2a.students.student import Student

STEP = 1e-3
"""Length of the trial step as a share of the weights' own: long enough for float32, short enough to be linear."""


def influences(
    trainer: KDTrainer, texts: DistillationSet, slopes: Sequence[torch.Tensor], judge: DistillationSet
) -> NDArray[np.float32]:
    """Say how much the student's separation of some labelled texts rises for each text that an update is made of.

    With s the gradient of the separation, D the slopes and g_i the gradient of a text's loss, it is -s' D g_i: how far
    the text's loss falls when the weights move along D s. Two passes without gradients give that for all texts.

    Args:
        trainer: Its student is left as it came.
        texts: N texts that updates can be made of.
        slopes: D, of the shapes of the model's parameters (``KDTrainer.step_per_gradient``).
        judge: Labelled texts.

    Returns:
        float32 (N,), nats for an update at a rate of 1 that consists of this text alone.
    """
    student = trainer.student
    gradients = separation_gradient(student, judge)
    direction = [slope * gradient for slope, gradient in zip(slopes, gradients, strict=True)]
    length, weights = _length(direction), _length(list(student.model.parameters()))
    if not length > 0:
        return np.zeros(len(texts), np.float32)
    reach = STEP * weights / length
    before = student.snapshot()
    ahead = _losses_after(trainer, texts, direction, reach)
    behind = _losses_after(trainer, texts, direction, -2 * reach)
    student.restore(before)
    change: NDArray[np.float32] = ((behind - ahead) / (2 * reach)).astype(np.float32)
    return change


def separation_gradient(student: Student, judge: DistillationSet) -> list[torch.Tensor]:
    """Differentiate the separation of labelled texts by the student's weights, without dropout.

    Args:
        student: Any student; its gradients are left alone.
        judge: M labelled texts.

    Returns:
        Tensors of the shapes of ``student.model.parameters()``, in their order.
    """
    training, device = student.model.training, student.output.weight.device
    student.model.eval()
    logits, _ = student(judge.encoded.padded(np.arange(len(judge)), device))
    score = separation(logits.float(), torch.from_numpy(judge.labels).to(device))
    parameters = list(student.model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    found = dict(zip(trained, torch.autograd.grad(score, trained, allow_unused=True), strict=True))
    student.model.train(training)
    return [torch.zeros_like(p) if found.get(p) is None else found[p] for p in parameters]


def _losses_after(
    trainer: KDTrainer, texts: DistillationSet, direction: Sequence[torch.Tensor], reach: float
) -> NDArray[np.float64]:
    with torch.no_grad():
        for parameter, way in zip(trainer.student.model.parameters(), direction, strict=True):
            parameter.add_(way, alpha=reach)
    return trainer.losses(texts).astype(np.float64)


def _length(tensors: Sequence[torch.Tensor]) -> float:
    return float(torch.stack([tensor.detach().square().sum() for tensor in tensors]).sum().sqrt())
