"""Selection as a Markov decision process, many episodes side by side in one numpy call (our derivation).

An episode shows ``steps`` batches of candidates, drawn from the pool without replacement. At each step every
candidate of the batch is kept or dropped; the reward is what that adds to the gain that the kept ones promise on the
reward split. Each class counts as the pool has it, whatever was kept of it, and the episode ends when the budget,
``keep_rate`` of every batch, is spent or the last batch was decided.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l2a.selector.config import SelectorConfig
from l2a.selector.features import CandidateFeatures, candidate_features
from l2a.selector.numerics import Floats, entropy
from l2a.selector.problem import SelectionProblem
from l2a.selector.registration import register_environment
from l2a.selector.surrogate import Gains, Surrogate, build_surrogate

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
