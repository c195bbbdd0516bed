"""On-policy learning from whole episodes alone: what REINFORCE and DVRL share."""

from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv


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
            ValueError: If a discount comes.
        """
        for name in ("gamma", "gae_lambda"):
            if options.get(name, 1.0) != 1.0:
                raise ValueError(f"{name} {options[name]} came; whole episodes are not discounted, so leave it out")
        defaults = {"ent_coef": 0.0, "vf_coef": 0.5, "max_grad_norm": 1.0}
        fixed: dict[str, Any] = {"gamma": 1.0, "gae_lambda": 1.0, "use_sde": False, "sde_sample_freq": -1}
        fixed |= {"supported_action_spaces": (spaces.MultiBinary,)}
        steps = int(env.get_attr("episode_steps")[0])
        super().__init__(policy, env, learning_rate, n_steps=steps, **{**defaults, **options, **fixed})

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Start every environment anew and play, so that each gives one whole episode.

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
