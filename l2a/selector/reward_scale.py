"""Rewards of every pool divided by their own running spread."""

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecNormalize


class RewardScale(VecNormalize):
    """VecNormalize of the rewards alone, with one spread for each pool: else the pool of large gains decides alone."""

    def __init__(self, environments: VecEnv, gamma: float) -> None:
        """Wrap environments.

        Args:
            environments: ``SelectionVecEnv``, monitored.
            gamma: Discount of the returns whose spread is measured.
        """
        super().__init__(environments, norm_obs=False, gamma=gamma)
        self._pools = np.array(environments.get_attr("pools")[0])
        self._spreads = [RunningMeanStd(shape=()) for _ in range(int(self._pools.max()) + 1)]

    def _update_reward(self, reward: NDArray[np.float32]) -> None:
        self.returns = self.returns * self.gamma + reward
        for pool, spread in enumerate(self._spreads):
            spread.update(self.returns[self._pools == pool])

    def normalize_reward(self, reward: NDArray[np.float32]) -> NDArray[np.float32]:
        """Divide rewards by the spread of their pool.

        Args:
            reward: float32 (E,).

        Returns:
            float32 (E,), clipped to [-10, 10].
        """
        scale = np.sqrt(np.array([spread.var for spread in self._spreads])[self._pools] + self.epsilon)
        scaled: NDArray[np.float32] = np.clip(reward / scale, -self.clip_reward, self.clip_reward).astype(np.float32)
        return scaled
