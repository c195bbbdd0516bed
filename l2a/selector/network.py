"""The policy: one multilayer perceptron shared over candidates, so that their order does not matter; and its files."""

import contextlib
import copy
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from gymnasium import spaces
from safetensors import SafetensorError
from safetensors.torch import load, save
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn

from l2a.selector.agents import DESCRIPTION, WEIGHTS
from l2a.selector.environment import CHANGING_FEATURES, STATE_FEATURES
from l2a.selector.problem import Floats
from l2a.util.errors import RunError
from l2a.util.files import atomic_write_bytes, atomic_write_text, to_json
from l2a.util.training import seeded

FORMAT = 1
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
        self.candidate_width, self.state_width = candidate_width, state_width
        self.hidden, self.activation = tuple(hidden), activation
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


@dataclass(frozen=True)
class TrainedPolicy:
    """A policy that can score the candidates of any pool.

    Attributes:
        network: The shared network.
        feature_names: Columns of the candidates' fixed features that it was trained on, in order.
        agent: Name of the card that trained it.
    """

    network: CandidateNetwork
    feature_names: tuple[str, ...]
    agent: str

    @torch.no_grad()
    def logits(self, observations: Floats) -> Floats:
        """Score batches of candidates.

        Args:
            observations: float32 (E, B * candidate_width + state_width), see ``Episodes.observe``.

        Returns:
            float32 (E, B), logits of the probability to keep each candidate.
        """
        scores: Floats = self.network(torch.from_numpy(observations))[0].numpy()
        return scores


def snapshot(network: CandidateNetwork) -> CandidateNetwork:
    """Copy a network as it is now, in evaluation mode."""
    return copy.deepcopy(network).eval().requires_grad_(False)


def save_policy(policy: TrainedPolicy, folder: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Write a policy: weights as safetensors, the rest as JSON.

    Args:
        policy: The policy.
        folder: Made where it is missing; its two files are replaced, other files stay.
        facts: How it was trained, such as pairs and reward curve; values that JSON can hold.
    """
    description = {
        "format": FORMAT,
        "agent": policy.agent,
        "feature_names": list(policy.feature_names),
        "changing_features": list(CHANGING_FEATURES),
        "state_features": list(STATE_FEATURES),
        "hidden": list(policy.network.hidden),
        "activation": policy.network.activation,
        "facts": dict(facts or {}),
    }
    weights = {name: value.contiguous() for name, value in policy.network.state_dict().items()}
    atomic_write_bytes(folder / WEIGHTS, save(weights))
    atomic_write_text(folder / DESCRIPTION, to_json(description, indent=2) + "\n")


def load_policy(folder: Path) -> TrainedPolicy:
    """Read a policy; nothing is unpickled.

    Args:
        folder: What ``save_policy`` wrote.

    Returns:
        The policy, ready to score.

    Raises:
        RunError: If a file is missing, damaged or from another version.
    """
    with _described(folder) as description:
        expected = {"format": FORMAT, "changing_features": [*CHANGING_FEATURES], "state_features": [*STATE_FEATURES]}
        for field, value in expected.items():
            if description[field] != value:
                raise ValueError(f"{field} is {description[field]}, not {value}")
        names, activation = tuple(description["feature_names"]), description.get("activation", "tanh")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation}, not one of {', '.join(ACTIVATIONS)}")
        widths = len(names) + len(CHANGING_FEATURES), len(STATE_FEATURES)
        with seeded(0):  # the first weights are drawn, then replaced
            network = CandidateNetwork(*widths, tuple(description["hidden"]), activation=activation)
        network.load_state_dict(load((folder / WEIGHTS).read_bytes()))
        return TrainedPolicy(network.eval().requires_grad_(False), names, str(description["agent"]))


def load_facts(folder: Path) -> dict[str, Any]:
    """Read how a saved policy was trained.

    Args:
        folder: What ``save_policy`` wrote.

    Returns:
        The facts; empty if none were saved.

    Raises:
        RunError: If the description is missing or damaged.
    """
    with _described(folder) as description:
        return dict(description.get("facts", {}))


@contextlib.contextmanager
def _described(folder: Path) -> Iterator[dict[str, Any]]:
    """Read a policy's description; what goes wrong with it is damage."""
    try:
        yield json.loads((folder / DESCRIPTION).read_text("utf-8"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"policy {folder} cannot be read ({reason}); train it again") from error


class _ActorCriticHeads(nn.Module):
    """What ActorCriticPolicy expects between observations and its last layers."""

    def __init__(self, network: CandidateNetwork, batch: int) -> None:
        super().__init__()
        self.network, self.latent_dim_pi, self.latent_dim_vf = network, batch, network.hidden[-1]
        self.value_layer = nn.Sequential(nn.Linear(network.summary_width, self.latent_dim_vf), nn.Tanh())

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        logits, summary = self.network(observations)
        return logits, self.value_layer(summary)

    def forward_actor(self, observations: Tensor) -> Tensor:
        return self.forward(observations)[0]

    def forward_critic(self, observations: Tensor) -> Tensor:
        return self.forward(observations)[1]


class CandidatePolicy(ActorCriticPolicy):
    """Actor and critic whose decisions follow the candidates when those are permuted.

    The action's distribution is one Bernoulli a candidate, its logit the shared network's score; the value is read
    from the mean candidate embedding and the state.
    """

    mlp_extractor: Any  # a module with the two latent widths

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        *,
        network: CandidateNetwork,
        **options: Any,
    ) -> None:
        """Make the policy around a network, which is trained in place; the rest is ActorCriticPolicy's."""
        self._parts = (network, spaces.flatdim(action_space))  # in a tuple: torch forbids modules before its __init__
        super().__init__(observation_space, action_space, lr_schedule, ortho_init=False, **options)

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = _ActorCriticHeads(*self._parts)

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        self.action_net = nn.Identity()  # the network's scores are the logits already
        rate: dict[str, Any] = {"lr": lr_schedule(1.0)}
        self.optimizer = self.optimizer_class(self.parameters(), **rate, **self.optimizer_kwargs)
