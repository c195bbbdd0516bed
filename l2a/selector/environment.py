"""Tells Gymnasium of the environment."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from l2a.config import SelectorConfig
from l2a.selector.numerics import Floats, entropy
from l2a.selector.problem import CandidateFeatures, SelectionProblem, candidate_features
from l2a.selector.reward import Gains, Surrogate, build_surrogate
from l2a.util.errors import UsageError

ENVIRONMENT_ID = "L2A-Selection-v0"


def register_environment() -> None:
    """Register ``L2A-Selection-v0``, once."""
    from gymnasium.envs.registration import register, registry

    if ENVIRONMENT_ID not in registry:
        register(ENVIRONMENT_ID, entry_point="l2a.selector.environment:SelectionEnvironment")


CHANGING_FEATURES = ("class_share_so_far", "max_selected_cosine")
STATE_FEATURES = ("budget_left", "steps_left", "class_balance", "gain_so_far")
OBSERVATION_BOUND = 10.0
COSINE_DIRECTIONS = 16

register_environment()  # here, so that a process that is sent a task knows the environment by its id


@dataclass(frozen=True)
class SelectionTask:
    """Everything that episodes need, computed once for a pool; holds arrays only, so it can be pickled.

    Attributes:
        features: The candidates' fixed features, float32 (N, F).
        surrogate: What selections are judged by.
        unit_embeddings: float32 (N, e), rows of length 1, for the cosine to what was selected.
        batch: Candidates in one step.
        steps: Steps in an episode.
        budget: Candidates that an episode may keep.
    """

    features: CandidateFeatures
    surrogate: Surrogate
    unit_embeddings: Floats
    batch: int
    steps: int
    budget: int

    def __len__(self) -> int:
        """Return the number of candidates in the pool."""
        return len(self.classes)

    @property
    def classes(self) -> NDArray[np.int64]:
        """The class that the teacher predicts for each candidate, int64 (N,)."""
        return self.surrogate.classes

    @property
    def candidate_width(self) -> int:
        """Numbers that describe one candidate in an observation."""
        return len(self.features.names) + len(CHANGING_FEATURES)

    @property
    def observation_width(self) -> int:
        """Numbers in an observation: batch times the candidate's, then the state's."""
        return self.batch * self.candidate_width + len(STATE_FEATURES)


def build_task(
    problem: SelectionProblem, config: SelectorConfig, names: tuple[str, ...] | None = None
) -> SelectionTask:
    """Prepare episodes over a pool; small pools get smaller batches and shorter episodes.

    Args:
        problem: The pool and the student.
        config: Batch, steps and keep rate.
        names: Feature columns of a saved policy; None for those of this pool.

    Returns:
        The task.
    """
    batch = min(config.batch, len(problem))
    steps = min(config.episode_steps, len(problem) // batch)
    return SelectionTask(
        features=candidate_features(problem, names),
        surrogate=build_surrogate(problem),
        unit_embeddings=_unit_embeddings(problem.pool.teacher.embeddings),
        batch=batch,
        steps=steps,
        budget=max(1, round(config.keep_rate * batch)) * steps,  # as ``score_pool`` spends it
    )


def _unit_embeddings(embeddings: Floats) -> Floats:
    # A few leading directions around the pool's mean: cosines spread out there, and an episode's maximum is cheap.
    centred = (embeddings - embeddings.mean(axis=0)).astype(np.float64)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    leading = centred @ vectors[:, -COSINE_DIRECTIONS:]
    lengths = np.maximum(np.linalg.norm(leading, axis=1, keepdims=True), 1e-12)
    unit: Floats = (leading / lengths).astype(np.float32)
    return unit


class Episodes:
    """E episodes that run side by side and may be at different steps.

    Attributes:
        gains: What each episode's selection promises so far.
        candidates: int64 (E, steps * batch), what each episode shows, in order.
        step_index: int64 (E,), the step that each episode is at.
        kept_count: int64 (E,), candidates kept so far.
    """

    def __init__(self, task: SelectionTask, count: int) -> None:
        """Make room for the episodes; ``reset`` starts them.

        Args:
            task: The pool and the shape of an episode.
            count: How many episodes, E.
        """
        self.task = task
        self.count = count
        self.gains = Gains(task.surrogate, count)
        self.candidates = np.zeros((count, task.steps * task.batch), np.int64)
        self.step_index = np.zeros(count, np.int64)
        self.kept_count = np.zeros(count, np.int64)
        self._selected = np.zeros((count, task.budget, task.unit_embeddings.shape[1]), np.float32)
        self._rows = np.arange(count)

    def reset(self, which: NDArray[np.intp], candidates: NDArray[np.int64]) -> None:
        """Start some episodes anew.

        Args:
            which: intp (K,), positions of the episodes.
            candidates: int64 (K, steps * batch), what they show.
        """
        self.candidates[which] = candidates
        self.gains.reset(which)
        self.step_index[which] = 0
        self.kept_count[which] = 0
        self._selected[which] = 0.0

    def draw(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Draw what new episodes show.

        Args:
            count: How many episodes, K.
            rng: The source of randomness.

        Returns:
            int64 (K, steps * batch), without replacement inside an episode.
        """
        shown = self.task.steps * self.task.batch
        return np.stack([rng.permutation(len(self.task))[:shown] for _ in range(count)])

    def batch(self) -> NDArray[np.int64]:
        """Return the candidates that each episode decides on now, int64 (E, B)."""
        first = np.minimum(self.step_index, self.task.steps - 1) * self.task.batch
        return self.candidates[self._rows[:, None], first[:, None] + np.arange(self.task.batch)]

    def observe(self) -> Floats:
        """Describe what each episode is to decide on.

        Returns:
            float32 (E, batch * candidate_width + 4): the candidates one after another, then the state.
        """
        batch = self.batch()
        classes = self.gains.counts.shape[1]
        shares: Floats = (self.gains.counts / np.maximum(self.kept_count, 1)[:, None]).astype(np.float32)
        share_so_far = shares[self._rows[:, None], self.task.classes[batch]] * classes - (self.kept_count > 0)[:, None]
        cosines = (self.task.unit_embeddings[batch] @ self._selected.transpose(0, 2, 1)).max(axis=2)
        changing = np.stack([share_so_far, cosines], axis=2).astype(np.float32)
        candidates = np.concatenate([self.task.features.matrix[batch], changing], axis=2)
        flat = np.concatenate([candidates.reshape(self.count, -1), self._state(shares)], axis=1)
        observations: Floats = np.clip(flat, -OBSERVATION_BOUND, OBSERVATION_BOUND)
        return observations

    def _state(self, shares: Floats) -> Floats:
        return np.stack(
            [
                1.0 - self.kept_count / self.task.budget,
                1.0 - self.step_index / self.task.steps,
                np.where(self.kept_count > 0, entropy(shares), 1.0),
                self.gains.gain / self.task.surrogate.spread,
            ],
            axis=1,
        ).astype(np.float32)

    def step(self, actions: NDArray[np.bool_]) -> tuple[Floats, NDArray[np.bool_]]:
        """Keep or drop the candidates in front of each episode.

        Args:
            actions: bool (E, B); what exceeds an episode's budget is dropped, later candidates first.

        Returns:
            float32 (E,) rewards, the gain of the log-likelihood in nats; bool (E,) whether each episode ended.
        """
        batch, before = self.batch(), self.gains.gain
        position = self.kept_count[:, None] + np.cumsum(actions, axis=1) - 1
        kept = actions & (position < self.task.budget)
        self.gains.add(batch, kept)
        self._remember(batch, kept, position)
        self.step_index += 1
        ended = (self.kept_count >= self.task.budget) | (self.step_index >= self.task.steps)
        return self.gains.gain - before, ended

    def _remember(self, batch: NDArray[np.int64], kept: NDArray[np.bool_], position: NDArray[np.int64]) -> None:
        episode, slot = np.nonzero(kept)
        chosen = batch[episode, slot]
        self._selected[episode, position[episode, slot]] = self.task.unit_embeddings[chosen]
        self.kept_count += kept.sum(axis=1)


def gain_of_everything(task: SelectionTask, rng: np.random.Generator, episodes: int = 32) -> float:
    """Measure what an episode gains that keeps all it is shown.

    Args:
        task: The pool and the shape of an episode.
        rng: Draws what the episodes show.
        episodes: How many the result is the mean of.

    Returns:
        Gain of the mean log-likelihood on the reward split, in nats.
    """
    runs = Episodes(task, episodes)
    shown = runs.draw(episodes, rng)
    everything = np.ones((episodes, task.batch), bool)
    for start in range(0, shown.shape[1], task.batch):
        runs.gains.add(shown[:, start : start + task.batch], everything)
    return float(runs.gains.gain.mean())


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
    """One episode of selection at a time; see ``l2a.selector.environment`` for the process.

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
