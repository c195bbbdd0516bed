"""On-policy learning from whole episodes alone: REINFORCE and DVRL."""

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor
from torch.nn import functional as F

from l2a.selector.environment import gain_of_everything

HIGHEST_MEAN = 0.9
PENALTY = 1000.0


class WholeEpisodes(OnPolicyAlgorithm):
    """Plays every environment from its start in each rollout and learns from its first episode, so none is cut."""

    def __init__(self, policy: Any, env: VecEnv, learning_rate: float = 0.01, **options: Any) -> None:
        """Make the algorithm; the length of a rollout is that of an episode, and returns are not discounted.

        Args:
            policy: Class of the policy.
            env: Many ``SelectionVecEnv`` environments, monitored.
            learning_rate: Of Adam.
            **options: Further arguments of OnPolicyAlgorithm, such as seed and policy_kwargs.

        Raises:
            ValueError: If a discount is given.
        """
        for name in ("gamma", "gae_lambda"):
            if options.get(name, 1.0) != 1.0:
                raise ValueError(f"{name} is {options[name]}, but whole episodes are not discounted; leave it out")
        defaults = {"ent_coef": 0.0, "vf_coef": 0.5, "max_grad_norm": 1.0}
        fixed: dict[str, Any] = {"gamma": 1.0, "gae_lambda": 1.0, "use_sde": False, "sde_sample_freq": -1}
        fixed |= {"supported_action_spaces": (spaces.MultiBinary,)}
        steps = max(task.steps for task in env.get_attr("task"))
        super().__init__(policy, env, learning_rate, n_steps=steps, **{**defaults, **options, **fixed})

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Reset every environment and play, so that each gives one whole episode.

        Args:
            env: The environments.
            callback: Told of every step.
            rollout_buffer: Filled.
            n_rollout_steps: Steps of the longest episode.

        Returns:
            False if the callback ended the training.
        """
        self._last_obs = np.asarray(env.reset())
        self._last_episode_starts = np.ones(env.num_envs, bool)
        return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)

    def in_first_episode(self) -> NDArray[np.bool_]:
        """Say which steps of the rollout belong to the first episode of their environment, bool (T, E)."""
        mask: NDArray[np.bool_] = np.cumsum(self.rollout_buffer.episode_starts, axis=0) == 1
        return mask

    def _update(self, loss: Tensor, largest_norm: float = np.inf) -> None:
        """Take one step of the optimiser."""
        self._update_learning_rate(self.policy.optimizer)
        self.policy.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if largest_norm < np.inf:
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), largest_norm)
        self.policy.optimizer.step()
        self.logger.record("train/loss", loss.item())


class REINFORCE(WholeEpisodes):
    """Advantage actor-critic whose returns are those of whole episodes, so that no value is bootstrapped."""

    def train(self) -> None:
        """Take one step on the first episode of each environment."""
        self.policy.set_training_mode(True)
        buffer, counted = self.rollout_buffer, self.in_first_episode()
        rewards, seen = buffer.rewards * counted, torch.from_numpy(counted)
        returns = torch.from_numpy(np.cumsum(rewards[::-1], axis=0)[::-1][counted]).float()
        observations, actions = torch.from_numpy(buffer.observations), torch.from_numpy(buffer.actions).float()
        values, log_probability, entropy = self.policy.evaluate_actions(observations[seen], actions[seen])
        self._update(self._loss(values.flatten(), log_probability, entropy, returns), self.max_grad_norm)

    def _loss(self, values: Tensor, log_probability: Tensor, entropy: Tensor | None, returns: Tensor) -> Tensor:
        advantages = returns - values.detach()
        advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
        bonus = -log_probability if entropy is None else entropy
        policy_loss = -(advantages * log_probability).mean() - self.ent_coef * bonus.mean()
        return policy_loss + self.vf_coef * F.mse_loss(values, returns)


def dvrl_loss(logits: Tensor, kept: Tensor, counts: Tensor, advantages: Tensor) -> Tensor:
    """Loss of the data value estimator for whole episodes, averaged over them (Yoon et al., equation 8 and code).

    Args:
        logits: float32 (T, E, B) of the probability p to keep each candidate.
        kept: float32 (T, E, B), 1 where it was sampled as kept.
        counts: float32 (T, E), 1 for the steps that belong to the episode.
        advantages: float32 (E,), what each episode gained beyond the model that was trained on everything.

    Returns:
        Scalar: advantage * BCE_sum(p, kept) + 1000 * [relu(mean p - 0.9) + relu(0.1 - mean p)].
    """
    entropies = F.binary_cross_entropy_with_logits(logits, kept, reduction="none").sum(dim=2)
    mean = (torch.sigmoid(logits).mean(dim=2) * counts).sum() / counts.sum()
    outside = F.relu(mean - HIGHEST_MEAN) + F.relu(1.0 - HIGHEST_MEAN - mean)
    return ((entropies * counts).sum(dim=0) * advantages).mean() + PENALTY * outside


class DVRL(WholeEpisodes):
    """REINFORCE over one whole episode of each environment an update, against a fixed baseline.

    The baseline is what keeping everything gains. The paper's estimator also reads |y - y_val|; here
    the candidates' features hold KL(p_T || p_S) in its place (our adaptation), and an episode stands for the paper's
    batch. There is no critic; rewards must come in nats.
    """

    def __init__(self, policy: Any, env: VecEnv, **options: Any) -> None:
        """Make the algorithm, and measure its baseline.

        Args:
            policy: Class of the policy.
            env: Many ``SelectionVecEnv`` environments, monitored.
            **options: See ``WholeEpisodes``.
        """
        rng, tasks = np.random.default_rng(0), env.get_attr("task")  # of its own: the episodes stay as they are
        gains = {task: gain_of_everything(task, rng) for task in dict.fromkeys(tasks)}
        self.gains_of_everything = np.array([gains[task] for task in tasks], np.float32)
        super().__init__(policy, env, **options)

    def train(self) -> None:
        """Take one step on the loss of the first episode of each environment."""
        self.policy.set_training_mode(True)
        buffer, in_first = self.rollout_buffer, self.in_first_episode()
        gains = (buffer.rewards * in_first).sum(axis=0) - self.gains_of_everything
        seen = torch.from_numpy(buffer.observations).flatten(0, 1)
        logits = self.policy.mlp_extractor.forward_actor(seen).reshape(buffer.actions.shape)
        kept, counts = torch.from_numpy(buffer.actions).float(), torch.from_numpy(in_first).float()
        self._update(dvrl_loss(logits, kept, counts, torch.from_numpy(gains).float()))
        self.logger.record("train/gain_over_everything", float(gains.mean()))
