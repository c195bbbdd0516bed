"""``L2A-Selection-v0``: the selection of candidates as a Gymnasium environment."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from l2a.selector.episodes import OBSERVATION_BOUND, Episodes, SelectionTask
from l2a.selector.numerics import Floats
from l2a.selector.registration import ENVIRONMENT_ID

__all__ = ["ENVIRONMENT_ID", "SelectionEnvironment", "observation_space"]
ONLY = np.zeros(1, np.intp)


def observation_space(task: SelectionTask) -> spaces.Box:
    """Describe observations.

    Args:
        task: The pool and the shape of an episode.

    Returns:
        A flat float32 box: the batch's candidates one after another, then the state of the run.
    """
    return spaces.Box(-OBSERVATION_BOUND, OBSERVATION_BOUND, (task.observation_width,), np.float32)


class SelectionEnvironment(gymnasium.Env[Any, Any]):
    """One episode of selection at a time; see ``l2a.selector.episodes`` for the process.

    The end of the budget or of the candidates terminates an episode: both are part of the state that the policy sees.
    A shorter time limit truncates it: ``gymnasium.make("L2A-Selection-v0", task=task, max_episode_steps=8)``.

    Attributes:
        observation_space: Box, float32, flat.
        action_space: MultiBinary(batch); 1 keeps a candidate.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 - the name and form are Gymnasium's

    def __init__(self, task: SelectionTask) -> None:
        """Make the environment.

        Args:
            task: The pool and the shape of an episode.
        """
        self.observation_space = observation_space(task)
        self.action_space = spaces.MultiBinary(task.batch)
        self._episodes = Episodes(task, 1)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Floats, dict[str, Any]]:
        """Start an episode over freshly drawn candidates.

        Args:
            seed: Seeds the environment's own generator.
            options: Not used.

        Returns:
            The first observation, and {"candidates"}: positions in the pool of the first batch.
        """
        super().reset(seed=seed, options=options)
        self._episodes.reset(ONLY, self._episodes.draw(1, self.np_random))
        return self._episodes.observe()[0], self._info()

    def step(self, action: NDArray[np.int8]) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        """Decide on one batch.

        Args:
            action: int8 (batch,), 1 keeps a candidate.

        Returns:
            The next observation, the gain in log-likelihood, whether the episode terminated, False for truncated (a
            time limit is the TimeLimit wrapper's to set), and {"candidates"} of the next batch.
        """
        rewards, ended = self._episodes.step(np.asarray(action, bool)[None])
        return self._episodes.observe()[0], float(rewards[0]), bool(ended[0]), False, self._info()

    def _info(self) -> dict[str, Any]:
        return {"candidates": self._episodes.batch()[0]}
