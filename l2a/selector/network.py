"""The policy's network: one multilayer perceptron shared over candidates, so that their order does not matter."""

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Activation = Literal["tanh", "relu"]
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu}


class CandidateNetwork(nn.Module):
    """Scores every candidate of a batch with shared weights and pools them for the value.

    Permuting the candidates permutes the scores and leaves the pooled summary as it is. The batch can have any size.
    """

    def __init__(
        self,
        candidate_width: int,
        state_width: int,
        hidden: Sequence[int],
        keep_rate: float = 0.5,
        activation: Activation = "tanh",
    ) -> None:
        """Make the layers.

        Args:
            candidate_width: Numbers that describe a candidate.
            state_width: Numbers that describe the run.
            hidden: Widths of the hidden layers.
            keep_rate: The untrained network keeps a candidate with this probability.
            activation: Of the hidden layers.
        """
        super().__init__()
        self.candidate_width, self.state_width, self.hidden = candidate_width, state_width, tuple(hidden)
        self.activation = activation
        self.candidate_layer = nn.Linear(candidate_width, hidden[0])
        self.state_layer = nn.Linear(state_width, hidden[0], bias=False)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(hidden))
        self.score = nn.Linear(hidden[-1], 1)
        self.summary_width = hidden[-1] + state_width
        for layer in (self.candidate_layer, self.state_layer, *self.layers):
            nn.init.orthogonal_(layer.weight, math.sqrt(2.0))
        nn.init.orthogonal_(self.score.weight, 0.01)
        nn.init.constant_(self.score.bias, math.log(keep_rate / max(1.0 - keep_rate, 1e-3)))

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Score the candidates of each batch.

        Args:
            observations: float32 (E, B * candidate_width + state_width).

        Returns:
            float32 (E, B) logits of the probability to keep each candidate, and float32 (E, summary_width): the mean
            candidate embedding and the state.
        """
        candidates, state = observations[:, : -self.state_width], observations[:, -self.state_width :]
        candidates = candidates.reshape(len(observations), -1, self.candidate_width)
        activation = ACTIVATIONS[self.activation]
        embedded = activation(self.candidate_layer(candidates) + self.state_layer(state)[:, None])
        for layer in self.layers:
            embedded = activation(layer(embedded))
        return self.score(embedded).squeeze(-1), torch.cat([embedded.mean(dim=1), state], dim=1)


def snapshot(network: CandidateNetwork) -> CandidateNetwork:
    """Copy a network as it is now.

    Args:
        network: It may go on training.

    Returns:
        A copy in evaluation mode.
    """
    return copy.deepcopy(network).eval().requires_grad_(False)
