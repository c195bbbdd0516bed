"""The first tier of the reward: what each candidate would add to the student's real steps (our derivation).

A few real steps are nearly linear in the gradients of the texts that they are taken on, so a selection is worth the
mean of its candidates' influences. Many selections are judged side by side in one call.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l2a.errors import UsageError
from l2a.selector.numerics import Floats
from l2a.selector.problem import SelectionProblem

PRIOR = 16
"""Candidates without influence that every selection is thought to hold."""


@dataclass(frozen=True)
class Surrogate:
    """What selections are judged by.

    Attributes:
        influences: float32 (N,), nats (``SelectionProblem.influences``).
        classes: int64 (N,), the class that the teacher predicts.
        shares: float32 (C,), each class's share of the pool.
        spread: Standard deviation of the influences, in nats; 1 where they are all the same.
    """

    influences: Floats
    classes: NDArray[np.int64]
    shares: Floats
    spread: float


def build_surrogate(problem: SelectionProblem) -> Surrogate:
    """Gather what selections are judged by.

    Args:
        problem: The pool and what each candidate would add.

    Returns:
        The surrogate.

    Raises:
        UsageError: If influences were not measured.
    """
    if problem.influences is None:
        raise UsageError("influences: None came; a policy needs those of every candidate")
    count = problem.pool.teacher.logits.shape[1]
    shares = (np.bincount(problem.classes, minlength=count) / len(problem)).astype(np.float32)
    spread = float(problem.influences.std())
    return Surrogate(problem.influences, problem.classes, shares, spread if spread > 0 else 1.0)


class Gains:
    """E selections that grow: the gain of each is the mean influence of what it kept so far.

    Each class counts as the pool has it, whatever was kept of it, since as many of each will be used (``keep_best``). A
    selection that has kept little is drawn to 0 by ``PRIOR``.

    Attributes:
        counts: float32 (E, C), candidates kept so far of each class that the teacher predicts.
        gain: float32 (E,), in nats.
    """

    def __init__(self, surrogate: Surrogate, count: int) -> None:
        """Start with nothing kept.

        Args:
            surrogate: What selections are judged by.
            count: How many selections, E.
        """
        self._surrogate = surrogate
        self._sums = np.zeros((count, len(surrogate.shares)), np.float32)
        self.counts = np.zeros_like(self._sums)
        self.gain: Floats = np.zeros(count, np.float32)

    def reset(self, which: NDArray[np.intp]) -> None:
        """Empty some selections.

        Args:
            which: intp (K,), their positions.
        """
        self._sums[which] = 0.0
        self.counts[which] = 0.0
        self.gain = self._evaluate()

    def add(self, candidates: NDArray[np.int64], kept: NDArray[np.bool_]) -> None:
        """Let the selections keep some more candidates.

        Args:
            candidates: int64 (E, B), the candidates in front of each selection.
            kept: bool (E, B), which of them it keeps.
        """
        values, classes = self._surrogate.influences[candidates], self._surrogate.classes[candidates]
        for label in range(len(self._surrogate.shares)):
            counted = kept & (classes == label)
            self._sums[:, label] += (values * counted).sum(axis=1)
            self.counts[:, label] += counted.sum(axis=1)
        self.gain = self._evaluate()

    def _evaluate(self) -> Floats:
        shares = self._surrogate.shares
        means = self._sums / np.maximum(self.counts + PRIOR * shares, 1e-12)
        gain: Floats = (shares * means).sum(axis=1)
        return gain


def surrogate_reward(surrogate: Surrogate, kept: NDArray[np.bool_]) -> float:
    """Judge a whole selection.

    Args:
        surrogate: What selections are judged by.
        kept: bool (N,).

    Returns:
        Gain of the log-likelihood on the reward split, in nats, against steps on texts without influence.
    """
    gains = Gains(surrogate, 1)
    gains.add(np.flatnonzero(kept)[None], np.ones((1, int(kept.sum())), bool))
    return float(gains.gain[0])
