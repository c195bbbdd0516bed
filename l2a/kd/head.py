"""Fits a linear head on fixed features and soft labels."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from l2a.kd.data import DistillationSet
from l2a.kd.inference import run_student
from l2a.students.student import Student

UPDATES = 300


def _fit_head(
    features: NDArray[np.float32], targets: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Fit a linear head on fixed features and soft labels by full-batch Adam on the cross-entropy.

    Args:
        features: float32 (N, h).
        targets: float32 (N, C), class probabilities.

    Returns:
        Weight, float32 (C, h), and bias, float32 (C,).
    """
    inputs, goals = torch.from_numpy(features), torch.from_numpy(targets)
    weight = torch.zeros(goals.shape[1], inputs.shape[1], requires_grad=True)
    bias = torch.zeros(goals.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=0.05)
    for _ in range(UPDATES):
        loss = nn.functional.cross_entropy(inputs @ weight.T + bias, goals) + 1e-3 * weight.pow(2).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return weight.detach().numpy(), bias.detach().numpy()


def fit_output_layer(student: Student, data: DistillationSet) -> None:
    """Fit the output layer on frozen features and soft labels, before the body is trained.

    Training the head first keeps a pretrained body from being distorted (Kumar et al., 2022, "LP-FT").

    Args:
        student: Changed in place.
        data: Texts with teacher outputs.
    """
    weight, bias = _fit_head(run_student(student, data.encoded)[1], data.teacher.probabilities())
    with torch.no_grad():
        student.output.weight.copy_(torch.from_numpy(weight))
        student.output.bias.copy_(torch.from_numpy(bias))
