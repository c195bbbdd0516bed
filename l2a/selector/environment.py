"""The selection process as an environment: one episode at a time for Gymnasium, many side by side for training."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from stable_baselines3.common import running_mean_std, vec_env

from l2a.config import SelectorConfig
from l2a.data import Bools, Floats, Ints
from l2a.generator.tokens import unit_rows
from l2a.selector.problem import CandidateFeatures, SelectionProblem, candidate_features, entropy
from l2a.selector.reward import Gains, Surrogate, surrogate_of, surrogate_reward
from l2a.util import UsageError

ENVIRONMENT_ID = "L2A-Selection-v0"
CHANGING_FEATURES = ("class_share_so_far", "max_selected_cosine")
STATE_FEATURES = ("budget_left", "steps_left", "class_balance", "gain_so_far")
LAYOUT = {"format": 2, "changing_features": [*CHANGING_FEATURES], "state_features": [*STATE_FEATURES]}
"""Of observations: a saved policy is read only where it has the same."""
OBSERVATION_BOUND = 10.0
COSINE_DIRECTIONS = 16

# Registered here, so that a process that is sent a task knows the environment by its id.
gymnasium.register(ENVIRONMENT_ID, entry_point="l2a.selector.environment:SelectionEnvironment")


@dataclass(frozen=True, eq=False)
class SelectionTask:
    """Everything that episodes need, computed once for a pool; holds arrays only, so it can be pickled.

    Attributes:
        features: The candidates' fixed features, float32 (N, F).
        surrogate: What selections are judged by.
        unit: How far random selections are from gaining nothing, in nats; the gain so far is shown in it.
        unit_embeddings: float32 (N, e), rows of length 1, for the cosine to what was selected.
        batch: Candidates in one step.
        steps: Steps in an episode.
        budget: Candidates that an episode may keep.
    """

    features: CandidateFeatures
    surrogate: Surrogate
    unit: float
    unit_embeddings: Floats
    batch: int
    steps: int
    budget: int

    def __len__(self) -> int:
        """Return the number of candidates in the pool."""
        return len(self.classes)

    @property
    def classes(self) -> Ints:
        """The class that the teacher predicts for each candidate, int64 (N,)."""
        return self.surrogate.classes

    @property
    def candidate_width(self) -> int:
        """Numbers that describe one candidate in an observation."""
        return len(self.features.names) + len(CHANGING_FEATURES)


def build_task(
    problem: SelectionProblem, config: SelectorConfig, names: tuple[str, ...] | None = None
) -> SelectionTask:
    """Prepare episodes over a pool; small pools get smaller batches and shorter episodes.

    ``config`` gives batch, steps and keep rate; ``names`` the columns of a saved policy, None for those of this pool.
    """
    batch = min(config.batch, len(problem))
    steps, surrogate = min(config.episode_steps, len(problem) // batch), surrogate_of(problem)
    features, unit_embeddings = candidate_features(problem, names), _unit_embeddings(problem.pool.teacher.embeddings)
    budget = max(1, round(config.keep_rate * batch)) * steps  # as ``score_pool`` spends it
    rng = np.random.default_rng(0)
    gains = [surrogate_reward(surrogate, rng.choice(len(problem), budget, replace=False)) for _ in range(32)]
    unit = float(np.abs(gains).mean()) or 1.0
    return SelectionTask(features, surrogate, unit, unit_embeddings, batch, steps, budget)


def _unit_embeddings(embeddings: Floats) -> Floats:
    # A few leading directions around the pool's mean: cosines spread out there, and an episode's maximum is cheap.
    centred = (embeddings - embeddings.mean(axis=0)).astype(np.float64)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    return unit_rows(centred @ vectors[:, -COSINE_DIRECTIONS:]).astype(np.float32)


class Episodes:
    """E episodes over one pool that run side by side and may be at different steps: the whole process.

    A step shows a batch of candidates and the state of the run; the action keeps or drops each; the reward is what that
    adds to the gain of the selection (``l2a.selector.reward``). An episode ends with its budget or its candidates.

    Attributes:
        gains: What each episode's selection promises so far.
        candidates: int64 (E, steps * batch), what each episode shows, in order.
        step_index: int64 (E,), the step that each episode is at.
        kept_count: int64 (E,), candidates kept so far.
    """

    def __init__(self, task: SelectionTask, count: int) -> None:
        """Make room for E = ``count`` episodes; ``reset`` or ``restart`` starts them."""
        self.task, self.count = task, count
        self.gains = Gains(task.surrogate, count)
        self.candidates = np.zeros((count, task.steps * task.batch), np.int64)
        self.step_index, self.kept_count = np.zeros((2, count), np.int64)
        self._selected = np.zeros((count, task.budget, task.unit_embeddings.shape[1]), np.float32)

    def reset(self, which: Ints, candidates: Ints) -> None:
        """Restart the episodes ``which``, intp (K,), over ``candidates``, int64 (K, steps * batch), none twice."""
        self.candidates[which] = candidates
        self.gains.reset(which)
        self.step_index[which] = self.kept_count[which] = 0
        self._selected[which] = 0.0

    def restart(self, which: Ints, rng: np.random.Generator) -> None:
        """Restart the episodes ``which``, intp (K,), over freshly drawn candidates."""
        self.reset(which, draw_orders(self.task, len(which), rng))

    def batch(self) -> Ints:
        """Return the candidates that each episode decides on now, int64 (E, B)."""
        first = np.minimum(self.step_index, self.task.steps - 1) * self.task.batch
        return np.take_along_axis(self.candidates, first[:, None] + np.arange(self.task.batch), axis=1)

    def observe(self) -> Floats:
        """Describe each episode's candidates one after another, and its state: float32 (E, B * candidate_width + 4)."""
        task, batch, counts = self.task, self.batch(), self.gains.counts
        shares: Floats = (counts / np.maximum(self.kept_count, 1)[:, None]).astype(np.float32)
        of_class = np.take_along_axis(shares, task.classes[batch], axis=1) * counts.shape[1]
        share_so_far = of_class - (self.kept_count > 0)[:, None]
        cosines = (task.unit_embeddings[batch] @ self._selected.transpose(0, 2, 1)).max(axis=2)
        changing = np.stack([share_so_far, cosines], axis=2).astype(np.float32)
        candidates = np.concatenate([task.features.matrix[batch], changing], axis=2)
        budget_left, steps_left = 1.0 - self.kept_count / task.budget, 1.0 - self.step_index / task.steps
        balance = np.where(self.kept_count > 0, entropy(shares), 1.0)
        state = np.stack([budget_left, steps_left, balance, self.gains.gain / task.unit], axis=1).astype(np.float32)
        observed = np.concatenate([candidates.reshape(self.count, -1), state], axis=1)
        return np.asarray(np.clip(observed, -OBSERVATION_BOUND, OBSERVATION_BOUND))

    def step(self, actions: Bools) -> tuple[Floats, Bools]:
        """Keep or drop candidates, bool (E, B); what exceeds an episode's budget is dropped, later candidates first.

        Returns:
            float32 (E,) rewards, what the step adds to the gain in nats; bool (E,) whether each episode ended.
        """
        batch, before = self.batch(), self.gains.gain
        position = self.kept_count[:, None] + np.cumsum(actions, axis=1) - 1
        kept = actions & (position < self.task.budget)
        self.gains.add(batch, kept)
        episode, slot = np.nonzero(kept)
        self._selected[episode, position[episode, slot]] = self.task.unit_embeddings[batch[episode, slot]]
        self.kept_count += kept.sum(axis=1)
        self.step_index += 1
        ended = (self.kept_count >= self.task.budget) | (self.step_index >= self.task.steps)
        return self.gains.gain - before, ended


def draw_orders(task: SelectionTask, count: int, rng: np.random.Generator) -> Ints:
    """Draw what K = ``count`` episodes show, int64 (K, steps * batch), without replacement inside an episode."""
    return np.stack([rng.permutation(len(task))[: task.steps * task.batch] for _ in range(count)])


def gain_of_everything(task: SelectionTask, rng: np.random.Generator, episodes: int = 32) -> float:
    """Measure what an episode gains, in nats, that keeps all it is shown: the mean of several random ones."""
    gains, shown = Gains(task.surrogate, episodes), draw_orders(task, episodes, rng)
    for start in range(0, shown.shape[1], task.batch):
        gains.add(shown[:, start : start + task.batch], np.ones((episodes, task.batch), bool))
    return float(gains.gain.mean())


class SelectionEnvironment(gymnasium.Env[Any, Any]):
    """One episode of ``Episodes`` at a time.

    The end of the budget or of the candidates terminates an episode: both are part of the state that the policy sees.
    A shorter time limit truncates it: ``gymnasium.make("L2A-Selection-v0", task=task, max_episode_steps=8)``.

    Attributes:
        task: The pool and the shape of an episode.
        observation_space: Box, float32: the batch's candidates one after another, then the state of the run.
        action_space: MultiBinary(batch); 1 keeps a candidate.
    """

    def __init__(self, task: SelectionTask) -> None:
        """Make the environment of a pool."""
        self.task, width = task, task.batch * task.candidate_width + len(STATE_FEATURES)
        self.observation_space = gymnasium.spaces.Box(-OBSERVATION_BOUND, OBSERVATION_BOUND, (width,), np.float32)
        self.action_space = gymnasium.spaces.MultiBinary(task.batch)
        self._episodes = Episodes(task, 1)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Floats, dict[str, Any]]:
        """Start an episode over freshly drawn candidates; ``seed`` seeds the environment's own generator.

        Returns:
            The first observation, and {"candidates"}: positions in the pool of the first batch.
        """
        super().reset(seed=seed, options=options)
        self._episodes.restart(np.arange(1), self.np_random)
        return self._episodes.observe()[0], {"candidates": self._episodes.batch()[0]}

    def step(self, action: np.typing.NDArray[np.int8]) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        """Decide on one batch by an action, int8 (batch,), in which 1 keeps a candidate.

        Returns:
            The next observation, the reward, whether the episode terminated, False for truncated (a time limit is the
            TimeLimit wrapper's to set), and {"candidates"} of the next batch.
        """
        rewards, ended = self._episodes.step(np.asarray(action, bool)[None])
        info = {"candidates": self._episodes.batch()[0]}
        return self._episodes.observe()[0], float(rewards[0]), bool(ended[0]), False, info


class SelectionVecEnv(vec_env.DummyVecEnv):
    """E environments side by side, each restarted as soon as it ends.

    It follows the same process as E ``SelectionEnvironment`` in a ``DummyVecEnv``, which it replaces by one call for
    all selections from a pool: many times faster. ``get_attr("task")`` tells the pool of each.
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
        if len({(task.batch, task.features.names) for task in tasks}) > 1:
            sizes = sorted({task.batch for task in tasks})
            raise UsageError(f"selector.batch: pools have batches of {sizes}; lower it to that of the smallest pool")
        shares = np.bincount(np.arange(max(count, len(tasks))) % len(tasks))
        self._groups = [Episodes(task, int(share)) for task, share in zip(tasks, shares, strict=True)]
        self._ends, self._rng = np.cumsum(shares), np.random.default_rng(seed)
        super().__init__([partial(SelectionEnvironment, one.task) for one in self._groups for _ in range(one.count)])

    def reset(self) -> Floats:
        """Reset every environment; returns float32 (E, observation width)."""
        if self._seeds[0] is not None:
            self._rng = np.random.default_rng(self._seeds[0])
        self._reset_seeds()
        for group in self._groups:
            group.restart(np.arange(group.count), self._rng)
        return np.concatenate([group.observe() for group in self._groups])

    def step_wait(self) -> vec_env.base_vec_env.VecEnvStepReturn:
        """Take the step: observations (E, width), rewards (E,), whether each ended (E,), and infos.

        In its info an ended environment's last observation stands as "terminal_observation".
        """
        actions = np.split(np.asarray(self.actions, bool), self._ends[:-1])
        parts = [self._step(group, part) for group, part in zip(self._groups, actions, strict=True)]
        observations, last, rewards, ended = (np.concatenate(values) for values in zip(*parts, strict=True))
        at_end = [{"terminal_observation": observation, "TimeLimit.truncated": False} for observation in last]
        infos: list[dict[str, Any]] = [info if over else {} for info, over in zip(at_end, ended, strict=True)]
        return observations, rewards, ended, infos

    def _step(self, group: Episodes, actions: Bools) -> tuple[Floats, Floats, Floats, Bools]:
        rewards, ended = group.step(actions)
        last = group.observe()
        if not ended.any():
            return last, last, rewards, ended
        group.restart(np.flatnonzero(ended), self._rng)
        return np.where(ended[:, None], group.observe(), last), last, rewards, ended


class SpreadByPool(running_mean_std.RunningMeanStd):
    """The spread of returns in each pool, for ``VecNormalize.ret_rms``: else the pool of large gains decides alone."""

    def __init__(self, tasks: Sequence[SelectionTask]) -> None:
        """Start with a spread of 1; ``tasks`` are the pools of E environments."""
        super().__init__(shape=(len(tasks),))
        members = [np.array([task is pool for task in tasks]) for pool in dict.fromkeys(tasks)]
        self._parts = [(running_mean_std.RunningMeanStd(), of_pool) for of_pool in members]

    def update(self, arr: Floats) -> None:
        """Take discounted returns in, float64 (E,)."""
        for spread, members in self._parts:
            spread.update(arr[members])
            self.var[members] = spread.var
