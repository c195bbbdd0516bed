"""The shared network as a Stable-Baselines3 policy."""

from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn

from l2a.selector.network import CandidateNetwork


class _ActorCriticHeads(nn.Module):
    """What ActorCriticPolicy expects between observations and its last layers."""

    def __init__(self, network: CandidateNetwork, batch: int) -> None:
        super().__init__()
        self.network = network
        self.latent_dim_pi = batch
        self.latent_dim_vf = network.hidden[-1]
        self.value_layer = nn.Sequential(nn.Linear(network.summary_width, self.latent_dim_vf), nn.Tanh())

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        logits, summary = self.network(observations)
        return logits, self.value_layer(summary)

    def forward_actor(self, observations: Tensor) -> Tensor:
        logits: Tensor = self.network(observations)[0]
        return logits

    def forward_critic(self, observations: Tensor) -> Tensor:
        value: Tensor = self.value_layer(self.network(observations)[1])
        return value


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
        use_sde: bool = False,
        *,
        network: CandidateNetwork,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Make the policy around a network.

        Args:
            observation_space: The environment's.
            action_space: The environment's, one decision a candidate.
            lr_schedule: Learning rate by the share of training that is left.
            use_sde: Passed by Stable-Baselines3; for continuous actions only.
            network: The shared network; it is trained in place.
            optimizer_class: Of the policy's weights; some algorithms bring their own.
            optimizer_kwargs: Its arguments; None for Stable-Baselines3's defaults.
        """
        batch = spaces.flatdim(action_space)
        self._parts = (network, batch)  # in a tuple: torch forbids modules before its own __init__
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            use_sde=use_sde,
            ortho_init=False,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = _ActorCriticHeads(*self._parts)

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        self.action_net = nn.Identity()  # the network's scores are the logits already
        rate: dict[str, Any] = {"lr": lr_schedule(1.0)}
        self.optimizer = self.optimizer_class(self.parameters(), **rate, **self.optimizer_kwargs)
