"""The surrogate student: its body frozen, its features cached, only a linear head learns (our derivation).

Many heads are trained side by side in one call, each on its own candidates.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l2a.selector.numerics import SMALLEST_PROBABILITY, Floats, softmax
from l2a.selector.problem import SelectionProblem

DIRECTIONS = 32
LEARNING_RATE = 0.1
PULL_TO_START = 0.1


@dataclass(frozen=True)
class Surrogate:
    """What the heads learn from, and the reward split that they are judged by.

    Attributes:
        directions: float32 (N, r), the candidates' student features, whitened (see ``build_surrogate``).
        logits: float32 (N, C), what the head says of each candidate before any step.
        targets: float32 (N, C), the teacher's probabilities.
        reward_directions: float32 (M, r), as ``directions``, of the reward split.
        reward_logits: float32 (M, C), as ``logits``, of the reward split.
        reward_labels: int64 (M,).
    """

    directions: Floats
    logits: Floats
    targets: Floats
    reward_directions: Floats
    reward_logits: Floats
    reward_labels: NDArray[np.int64]


def build_surrogate(problem: SelectionProblem) -> Surrogate:
    """Cache all that the heads need, in a few whitened directions.

    The head's change is learned in the leading principal directions of the pool's student features, each scaled by
    1 / sqrt(eigenvalue + mean eigenvalue), so that one step size suits every student; the head's own logits stay
    exact, because they are added to the change.

    Args:
        problem: The pool and the student.

    Returns:
        The surrogate.
    """
    centre = problem.student_features.mean(axis=0)
    centred = (problem.student_features - centre).astype(np.float64)
    eigenvalues, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
    leading = np.maximum(eigenvalues[::-1][:DIRECTIONS], 0.0)
    scale = 1.0 / np.sqrt(leading + max(leading.mean(), 1e-12))
    projection = (vectors[:, ::-1][:, :DIRECTIONS] * scale).astype(np.float32)
    return Surrogate(
        directions=(problem.student_features - centre) @ projection,
        logits=problem.student_features @ problem.head_weight + problem.head_bias,
        targets=problem.pool.teacher.probabilities(),
        reward_directions=(problem.reward_features - centre) @ projection,
        reward_logits=problem.reward_features @ problem.head_weight + problem.head_bias,
        reward_labels=problem.reward_labels,
    )


class Heads:
    """E linear heads that learn side by side.

    Attributes:
        log_likelihood: float32 (E,), each head's mean log-likelihood on the reward split now.
        start: That log-likelihood before any step.
    """

    def __init__(self, surrogate: Surrogate, count: int) -> None:
        """Start every head where the student's head is.

        Args:
            surrogate: What the heads learn from.
            count: How many heads, E.
        """
        width, classes = surrogate.directions.shape[1], surrogate.targets.shape[1]
        self._surrogate = surrogate
        self.weight = np.zeros((count, width, classes), np.float32)
        self.bias = np.zeros((count, 1, classes), np.float32)
        self.log_likelihood = self._evaluate()
        self.start = float(self.log_likelihood[0])

    def reset(self, which: NDArray[np.intp]) -> None:
        """Put some heads back to the start.

        Args:
            which: intp (K,), positions of the heads.
        """
        self.weight[which] = 0.0
        self.bias[which] = 0.0
        self.log_likelihood = self.log_likelihood.copy()
        self.log_likelihood[which] = self.start

    def learn(self, candidates: NDArray[np.int64], weights: Floats) -> None:
        """Take a gradient step on the KL divergence from the teacher.

        A pull back to the start stands for the source and target texts that a real student goes on learning from.

        Args:
            candidates: int64 (E, B), the candidates in front of each head.
            weights: float32 (E, B), each candidate's share of the step; 0 where it was not kept.
        """
        inputs = self._surrogate.directions[candidates]
        start, targets = self._surrogate.logits[candidates], self._surrogate.targets[candidates]
        gradient = (softmax(start + inputs @ self.weight + self.bias) - targets) * weights[:, :, None]
        pull = PULL_TO_START * np.minimum(weights.sum(axis=1), 1.0)[:, None, None]
        self.weight -= LEARNING_RATE * (inputs.transpose(0, 2, 1) @ gradient + pull * self.weight)
        self.bias -= LEARNING_RATE * (gradient.sum(axis=1, keepdims=True) + pull * self.bias)
        self.log_likelihood = self._evaluate()

    def _evaluate(self) -> Floats:
        surrogate = self._surrogate
        probabilities = softmax(surrogate.reward_logits + surrogate.reward_directions @ self.weight + self.bias)
        of_labels = probabilities[:, np.arange(len(surrogate.reward_labels)), surrogate.reward_labels]
        logarithms: Floats = np.log(np.maximum(of_labels, SMALLEST_PROBABILITY)).mean(axis=1)
        return logarithms


def surrogate_reward(
    surrogate: Surrogate, kept: NDArray[np.bool_], rng: np.random.Generator, batch: int = 16, repeats: int = 4
) -> float:
    """Judge a whole selection: one pass over it, in several random orders.

    Args:
        surrogate: What the heads learn from.
        kept: bool (N,).
        rng: Draws the orders.
        batch: Candidates in one step.
        repeats: Orders that the result is the mean of.

    Returns:
        Gain of the mean log-likelihood on the reward split, in nats.
    """
    chosen = np.flatnonzero(kept)
    batch = min(batch, len(chosen))
    orders = np.stack([rng.permutation(chosen) for _ in range(repeats)])
    heads = Heads(surrogate, repeats)
    before = heads.log_likelihood.mean()
    weights = np.full((repeats, batch), 1.0 / batch, np.float32)
    for start in range(0, len(chosen) - batch + 1, batch):
        heads.learn(orders[:, start : start + batch], weights)
    return float(heads.log_likelihood.mean() - before)
