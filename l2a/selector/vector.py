"""Many selection environments in one numpy call, for Stable-Baselines3."""

from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from l2a.errors import UsageError
from l2a.selector.environment import observation_space
from l2a.selector.episodes import Episodes, SelectionTask, gain_of_everything
from l2a.selector.numerics import Floats


class SelectionVecEnv(VecEnv):
    """E environments side by side, each started anew as soon as it ends.

    It follows the same process as E ``SelectionEnvironment`` in a ``DummyVecEnv`` and is many times faster, because
    all selections from a pool are judged in one call.

    Attributes:
        episode_steps: Steps of the longest episode.
        pools: intp (E,), the number of each environment's pool.
    """

    def __init__(self, tasks: Sequence[SelectionTask], count: int, seed: int) -> None:
        """Make the environments.

        Args:
            tasks: Pools, of one pair of domains or of several; they share batch and features.
            count: How many environments, E, dealt to the pools in turn; at least one a pool.
            seed: Seeds the one generator from which all of them draw.

        Raises:
            UsageError: If observations of the pools differ in shape.
        """
        shapes = {(task.batch, task.features.names) for task in tasks}
        if len(shapes) > 1:
            raise UsageError(
                f"selector.batch: the pools differ in batch or features ({sorted(batch for batch, _ in shapes)} in a "
                "batch); lower it to the size of the smallest pool"
            )
        self.render_mode: str | None = None
        self.episode_steps = max(task.steps for task in tasks)
        shares = np.bincount(np.arange(max(count, len(tasks))) % len(tasks))
        self._groups = [Episodes(task, int(share)) for task, share in zip(tasks, shares, strict=True)]
        self.pools = np.repeat(np.arange(len(tasks)), shares)
        self._ends = np.cumsum(shares)
        self._rng = np.random.default_rng(seed)
        self._actions = np.zeros((int(self._ends[-1]), tasks[0].batch), bool)
        super().__init__(int(self._ends[-1]), observation_space(tasks[0]), spaces.MultiBinary(tasks[0].batch))

    @cached_property
    def gains_of_everything(self) -> Floats:
        """What each environment would gain on the mean if it kept all, float32 (E,)."""
        rng = np.random.default_rng(0)  # its own, so that asking does not change the episodes
        gains = [np.full(group.count, gain_of_everything(group.task, rng), np.float32) for group in self._groups]
        return np.concatenate(gains)

    def reset(self) -> Floats:
        """Start every environment anew.

        Returns:
            float32 (E, observation width).
        """
        if self._seeds[0] is not None:
            self._rng = np.random.default_rng(self._seeds[0])
        self._reset_seeds()
        for group in self._groups:
            self._restart(group, np.arange(group.count))
        return np.concatenate([group.observe() for group in self._groups])

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
        actions = np.split(self._actions, self._ends[:-1])
        parts = [self._step(group, part) for group, part in zip(self._groups, actions, strict=True)]
        observations, rewards, ended, infos = zip(*parts, strict=True)
        return np.concatenate(observations), np.concatenate(rewards), np.concatenate(ended), [*chain(*infos)]

    def _step(
        self, group: Episodes, actions: NDArray[np.bool_]
    ) -> tuple[Floats, Floats, NDArray[np.bool_], list[dict[str, Any]]]:
        rewards, ended = group.step(actions)
        observations = group.observe()
        infos: list[dict[str, Any]] = [{} for _ in range(group.count)]
        finished = np.flatnonzero(ended)
        if len(finished):
            for position in finished:
                infos[position] = {"terminal_observation": observations[position], "TimeLimit.truncated": False}
            self._restart(group, finished)
            observations = np.where(ended[:, None], group.observe(), observations)
        return observations, rewards, ended, infos

    def _restart(self, group: Episodes, which: NDArray[np.intp]) -> None:
        group.reset(which, group.draw(len(which), self._rng))

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
