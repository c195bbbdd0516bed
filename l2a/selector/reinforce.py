"""REINFORCE with a learned baseline (Williams, 1992) as an on-policy algorithm of Stable-Baselines3."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from l2a.selector.whole_episodes import WholeEpisodes


class REINFORCE(WholeEpisodes):
    """Advantage actor-critic whose returns are those of whole episodes, so that no value is bootstrapped."""

    def train(self) -> None:
        """Take one step on the first episode of each environment."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        buffer, counted = self.rollout_buffer, self.in_first_episode()
        rewards = buffer.rewards * counted
        returns = torch.from_numpy(np.cumsum(rewards[::-1], axis=0)[::-1][counted]).float()
        observations, actions = torch.from_numpy(buffer.observations), torch.from_numpy(buffer.actions).float()
        seen = torch.from_numpy(counted)
        values, log_probability, entropy = self.policy.evaluate_actions(observations[seen], actions[seen])
        loss = self._loss(values.flatten(), log_probability, entropy, returns)
        self.policy.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        self.policy.optimizer.step()
        self.logger.record("train/loss", loss.item())

    def _loss(self, values: Tensor, log_probability: Tensor, entropy: Tensor | None, returns: Tensor) -> Tensor:
        advantages = returns - values.detach()
        advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
        bonus = -log_probability if entropy is None else entropy
        policy_loss = -(advantages * log_probability).mean() - self.ent_coef * bonus.mean()
        return policy_loss + self.vf_coef * F.mse_loss(values, returns)
