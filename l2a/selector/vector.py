"""Many selection environments in one numpy call, for Stable-Baselines3."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from l2a.selector.environment import observation_space
from l2a.selector.episodes import Episodes, SelectionTask
from l2a.selector.numerics import Floats


class SelectionVecEnv(VecEnv):
    """E environments side by side, each started anew as soon as it ends.

    It follows the same process as E ``SelectionEnvironment`` in a ``DummyVecEnv`` and is many times faster, because
    all heads learn in one batched product.
    """

    def __init__(self, task: SelectionTask, count: int, seed: int) -> None:
        """Make the environments.

        Args:
            task: The pool and the shape of an episode.
            count: How many environments, E.
            seed: Seeds the one generator from which all of them draw.
        """
        self.render_mode: str | None = None
        self._episodes = Episodes(task, count)
        self._rng = np.random.default_rng(seed)
        self._actions = np.zeros((count, task.batch), bool)
        super().__init__(count, observation_space(task), spaces.MultiBinary(task.batch))

    def reset(self) -> Floats:
        """Start every environment anew.

        Returns:
            float32 (E, observation width).
        """
        if self._seeds[0] is not None:
            self._rng = np.random.default_rng(self._seeds[0])
        self._reset_seeds()
        self._restart(np.arange(self.num_envs))
        return self._episodes.observe()

    def step_async(self, actions: NDArray[np.int8]) -> None:
        """Remember the actions.

        Args:
            actions: int8 (E, batch), 1 keeps a candidate.
        """
        self._actions = np.asarray(actions, bool)

    def step_wait(self) -> VecEnvStepReturn:
        """Take the step.

        Returns:
            Observations (E, width), rewards (E,), whether each ended (E,), and infos, in which an ended environment's
            last observation stands as "terminal_observation".
        """
        rewards, ended = self._episodes.step(self._actions)
        observations = self._episodes.observe()
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        finished = np.flatnonzero(ended)
        if len(finished):
            for position in finished:
                infos[position] = {"terminal_observation": observations[position], "TimeLimit.truncated": False}
            self._restart(finished)
            observations = np.where(ended[:, None], self._episodes.observe(), observations)
        return observations, rewards, ended, infos

    def _restart(self, which: NDArray[np.intp]) -> None:
        self._episodes.reset(which, self._episodes.draw(len(which), self._rng))

    def close(self) -> None:
        """Do nothing: there are no processes or files to close."""

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Read an attribute, shared by all environments.

        Args:
            attr_name: Its name.
            indices: Which environments; None for all.

        Returns:
            The value, once for each environment asked for.
        """
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Refuse: the environments share one state.

        Args:
            attr_name: Its name.
            value: Its value.
            indices: Which environments.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("the environments share one state; make a new SelectionVecEnv instead")

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Refuse: there are no single environments to call.

        Args:
            method_name: Name of the method.
            *method_args: Its arguments.
            indices: Which environments.
            **method_kwargs: Its keyword arguments.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("there are no single environments; use a DummyVecEnv instead")

    def env_is_wrapped(
        self, wrapper_class: type[gymnasium.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """Say that no environment is wrapped on its own.

        Args:
            wrapper_class: The wrapper asked about.
            indices: Which environments; None for all.

        Returns:
            False for each environment asked for.
        """
        return [False for _ in self._get_indices(indices)]
