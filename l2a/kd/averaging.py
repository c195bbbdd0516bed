"""A running average of the student's weights: the state that is judged and kept, smoother than any single step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


class WeightAverage:
    """Exponential moving average of trained parameters (Polyak and Juditsky, 1992).

    The decay grows from 2/11 at the first step to its final value, so that the untrained start is soon forgotten.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        """Start at the present weights.

        Args:
            parameters: Averaged; their values may change, their shapes not.
            decay: Weight of the past, 0 (no average) to below 1.
        """
        self._parameters = list(parameters)
        self._decay = decay
        self._steps = 0
        self._average = [parameter.detach().clone() for parameter in self._parameters]

    def update(self) -> None:
        """Take the present weights in, after an optimiser step."""
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        with torch.no_grad():
            torch._foreach_lerp_(self._average, [p.detach() for p in self._parameters], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average in place of the weights, and the weights back afterwards."""
        present = [parameter.detach().clone() for parameter in self._parameters]
        self._load(self._average)
        try:
            yield
        finally:
            self._load(present)

    def _load(self, values: Sequence[torch.Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_([parameter.detach() for parameter in self._parameters], list(values))
