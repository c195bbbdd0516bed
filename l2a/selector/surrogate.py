"""The surrogate student: its body frozen, its features cached, only a linear head is refitted (our derivation).

Many heads are refitted side by side in one call, each on its own candidates, in closed form.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l2a.selector.numerics import Floats, softmax
from l2a.selector.problem import SelectionProblem
from l2a.selector.separation import separation

DIRECTIONS = 16
RIDGE = 0.1
PRIOR = 16


@dataclass(frozen=True)
class Surrogate:
    """What the heads are fitted on, and the reward split that they are judged by.

    Attributes:
        directions: float32 (N, r), the candidates' student features in few directions (see ``build_surrogate``).
        targets: float32 (N, C), the teacher's probabilities.
        classes: int64 (N,), the class that the teacher predicts.
        start: float32 (N, C), the probabilities of the head that the labelled target texts give; a head that has seen
            few candidates stays near it.
        reward_directions: float32 (M, r), as ``directions``, of the reward split.
        reward_labels: int64 (M,).
    """

    directions: Floats
    targets: Floats
    classes: NDArray[np.int64]
    start: Floats
    reward_directions: Floats
    reward_labels: NDArray[np.int64]


def build_surrogate(problem: SelectionProblem) -> Surrogate:
    """Cache all that the heads need, in the leading principal directions of the pool's student features.

    Features are centred and have a mean square length of 1, so that one ridge suits every student. They are not
    whitened: the main directions are those that a student changes first.

    Args:
        problem: The pool and the student.

    Returns:
        The surrogate.
    """
    centre = problem.student_features.mean(axis=0)
    centred = (problem.student_features - centre).astype(np.float64)
    eigenvalues, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
    length = np.sqrt(max(eigenvalues.sum(), 1e-12))
    projection = (vectors[:, ::-1][:, :DIRECTIONS] / length).astype(np.float32)
    return Surrogate(
        directions=(problem.student_features - centre) @ projection,
        targets=problem.pool.teacher.probabilities(),
        classes=problem.classes,
        start=softmax(problem.student_features @ problem.head_weight + problem.head_bias),
        reward_directions=(problem.reward_features - centre) @ projection,
        reward_labels=problem.reward_labels,
    )


class Heads:
    """E linear heads, each the ridge regression of the teacher's probabilities on the candidates kept so far.

    What a head knows is held as sums over its candidates of [x, y]' [x, y, 1], x the directions and y the teacher's
    probabilities: refitting costs the same however many there are, and their order does not matter. There is one sum a
    class, and each class counts as much as it has candidates in the pool, since as many of each will be used
    (``keep_best``).

    Attributes:
        log_likelihood: float32 (E,), how well each head tells the reward split's classes apart now, in nats.
        start: That log-likelihood before any candidate.
    """

    def __init__(self, surrogate: Surrogate, count: int) -> None:
        """Start every head from the target's.

        Args:
            surrogate: What the heads are fitted on.
            count: How many heads, E.
        """
        self._surrogate = surrogate
        self._rows = _with_one(surrogate.directions, surrogate.targets)
        start = _with_one(surrogate.directions, surrogate.start)
        self._prior = PRIOR / len(start) * (start[:, :-1].T @ start)
        classes = surrogate.targets.shape[1]
        self._shares = np.bincount(surrogate.classes, minlength=classes).astype(np.float32) / len(start)
        self._sums = np.zeros((count, classes, *self._prior.shape), np.float32)
        self.log_likelihood = self._evaluate()
        self.start = float(self.log_likelihood[0])

    def reset(self, which: NDArray[np.intp]) -> None:
        """Put some heads back to the start.

        Args:
            which: intp (K,), positions of the heads.
        """
        self._sums[which] = 0.0
        self.log_likelihood = self.log_likelihood.copy()
        self.log_likelihood[which] = self.start

    def learn(self, candidates: NDArray[np.int64], kept: NDArray[np.bool_]) -> None:
        """Refit the heads on some more candidates.

        Args:
            candidates: int64 (E, B), the candidates in front of each head.
            kept: bool (E, B), which of them it learns from.
        """
        rows, classes = self._rows[candidates], self._surrogate.classes[candidates]
        for label in range(len(self._shares)):
            counted = kept & (classes == label)
            self._sums[:, label] += (rows[:, :, :-1] * counted[:, :, None]).transpose(0, 2, 1) @ rows
        self.log_likelihood = self._evaluate()

    @property
    def weight(self) -> Floats:
        """The heads' weights, float32 (E, r, C)."""
        width = self._surrogate.directions.shape[1]
        counts = self._sums[:, :, width:, -1].sum(axis=2)  # probabilities of a text sum to 1
        weights = self._shares * counts.sum(axis=1, keepdims=True) / np.maximum(counts, 1.0)
        sums = self._prior + (weights[:, :, None, None] * self._sums).sum(axis=1)
        total = sums[:, width:, -1].sum(axis=1)[:, None, None]
        means = sums[:, :, -1:] / total
        second = sums[:, :, :-1] / total - means @ means.transpose(0, 2, 1)
        ridge = RIDGE * np.eye(width, dtype=np.float32)
        weight: Floats = np.linalg.solve(second[:, :width, :width] + ridge, second[:, :width, width:])
        return weight

    def _evaluate(self) -> Floats:
        return separation(self._surrogate.reward_directions @ self.weight, self._surrogate.reward_labels)


def _with_one(directions: Floats, probabilities: Floats) -> Floats:
    return np.concatenate([directions, probabilities, np.ones((len(directions), 1), np.float32)], axis=1)


def surrogate_reward(surrogate: Surrogate, kept: NDArray[np.bool_]) -> float:
    """Judge a whole selection.

    Args:
        surrogate: What the heads are fitted on.
        kept: bool (N,).

    Returns:
        Gain of the log-likelihood on the reward split, in nats.
    """
    heads = Heads(surrogate, 1)
    heads.learn(np.flatnonzero(kept)[None], np.ones((1, int(kept.sum())), bool))
    return float(heads.log_likelihood[0]) - heads.start
