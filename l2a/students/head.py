"""Starts the square layer before the output layer so that it passes on what the body tells."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from l2a.encoding import encode, inference_batches
from l2a.examples import TextInput
from l2a.students.student import Student

GAIN = 0.5
"""Keeps the inputs of tanh and gelu small enough for them to be nearly linear."""
MEASURED_SIDES = 512
LEAST_SIZE = 0.1
"""Part of the mean size that entries are taken to have at least, so that those near 0 are not blown up."""


def open_head(student: Student, texts: Sequence[TextInput] = ()) -> None:
    """Let the square layer start as the identity, or centre and scale what it reads on some texts.

    A trained body's entries differ widely in size; a fresh body's do not. They are divided by their size, not by their
    deviation between texts, which may be a hundredth of it: the body would then be too sensitive to be trained.

    Args:
        student: A student in eval mode, its square layer changed in place where it has one.
        texts: Texts to measure on; none for the identity.
    """
    dense = _square_layer(student)
    if dense is None:
        return
    mean, size = torch.zeros(dense.in_features), torch.ones(dense.in_features)
    if texts and dense.bias is not None:
        states = _inputs_of(dense, student, texts)
        mean, size = states.mean(0), states.square().mean(0).sqrt()
        size = size.clamp_min(LEAST_SIZE * float(size.mean()))
    with torch.no_grad():
        dense.weight.copy_(torch.diag(GAIN / size))
        if dense.bias is not None:
            dense.bias.copy_(-GAIN * mean / size)


def _square_layer(student: Student) -> nn.Linear | None:
    dense = [module for module in student.model.modules() if isinstance(module, nn.Linear)][-2]
    return dense if dense.in_features == dense.out_features == student.output.in_features else None


@torch.inference_mode()
def _inputs_of(layer: nn.Linear, student: Student, texts: Sequence[TextInput]) -> torch.Tensor:
    sides = [(side,) for text in texts for side in text]
    sample = [sides[i] for i in np.linspace(0, len(sides) - 1, min(MEASURED_SIDES, len(sides)), dtype=int)]
    encoded, states = encode(student.tokenizer, sample, max_length=64), list[torch.Tensor]()
    hook = layer.register_forward_pre_hook(lambda module, arguments: states.append(arguments[0]))
    for indices in inference_batches(encoded):
        student(encoded.padded(indices))
    hook.remove()
    return torch.cat(states)
