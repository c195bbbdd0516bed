"""How much each text would help if the student took a step on it, to first order (Koh and Liang, ICML 2017, and after).

A whole round cannot be run for every choice of texts. But a few optimiser steps are nearly linear in the gradients of
the texts they are taken on, so that one number a text says what it adds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from l2a.config import KDConfig
from l2a.data.encoding import inference_batches
from l2a.kd.data import DistillationSet
from l2a.kd.inference import run_student
from l2a.kd.losses import threshold_free_log_likelihood
from l2a.kd.trainer import KDTrainer
from l2a.pipeline.session import TrainingSession
from l2a.selector.numerics import Floats
from l2a.selector.problem import SelectionProblem
from l2a.student.student import Student
from l2a.util.errors import UsageError
from l2a.util.training import broadcast, process_count

STEP = 1e-3
"""Length of the trial step as a share of the weights' own: long enough for float32, short enough to be linear."""


def influences(
    trainer: KDTrainer, texts: DistillationSet, moves: Sequence[torch.Tensor], judge: DistillationSet
) -> NDArray[np.float32]:
    """Say how much the student's separation of some labelled texts rises for each text that an update is made of.

    With s the gradient of the separation, D the moves and g_i the gradient of a text's loss, it is -s' D g_i: how far
    the text's loss falls when the weights move along D s. Two passes without gradients give that for all texts.

    Args:
        trainer: Its student is left as it came.
        texts: N texts that updates can be made of.
        moves: D, of the shapes of the model's parameters (``KDTrainer.moves_per_gradient``).
        judge: Labelled texts.

    Returns:
        float32 (N,), nats for an update that consists of this text alone.
    """
    student = trainer.student
    direction = [move * slope for move, slope in zip(moves, threshold_free_gradient(student, judge), strict=True)]
    length, weights = _length(direction), _length(list(student.model.parameters()))
    if length == 0:
        return np.zeros(len(texts), np.float32)
    reach, before = STEP * weights / length, student.snapshot()
    ahead = _losses_after(trainer, texts, direction, reach)
    behind = _losses_after(trainer, texts, direction, -2 * reach)
    student.restore(before)
    falls: NDArray[np.float32] = ((behind - ahead) / (2 * reach)).astype(np.float32)
    return falls


def threshold_free_gradient(student: Student, judge: DistillationSet) -> list[torch.Tensor]:
    """Differentiate the separation of labelled texts by the student's weights, without dropout.

    The separation is of all texts at once: it is differentiated by their logits first, and those batch by batch.

    Args:
        student: Any student; it has no gradients afterwards.
        judge: M labelled texts.

    Returns:
        float32 tensors of the shapes of ``student.model.parameters()``, in their order.
    """
    device, parameters = student.output.weight.device, list(student.model.parameters())
    logits = torch.from_numpy(run_student(student, judge.encoded)[0]).requires_grad_(True)
    (by_logits,) = torch.autograd.grad(threshold_free_log_likelihood(logits, torch.from_numpy(judge.labels)), logits)
    training = student.model.training
    student.model.eval()
    student.model.zero_grad(set_to_none=True)
    for indices in inference_batches(judge.encoded):
        found, _ = student(judge.encoded.padded(indices, device))
        (found.float() * by_logits[indices.tolist()].to(device)).sum().backward()  # type: ignore[no-untyped-call]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    student.model.zero_grad(set_to_none=True)
    student.model.train(training)
    return gradients


def _losses_after(
    trainer: KDTrainer, texts: DistillationSet, direction: Sequence[torch.Tensor], reach: float
) -> NDArray[np.float64]:
    with torch.no_grad():
        for parameter, way in zip(trainer.student.model.parameters(), direction, strict=True):
            parameter.add_(way, alpha=reach)
    return trainer.losses(texts).astype(np.float64)


def _length(tensors: Sequence[torch.Tensor]) -> float:
    return float(torch.stack([tensor.detach().square().sum() for tensor in tensors]).sum().sqrt())


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


REAL_STEPS = 4
"""Distillation steps, each on all the candidates judged, that judge one selection in the second tier of the reward."""
REAL_POOL = 600
"""Candidates of the pool, the same for all selections, among which a selection is judged."""
TRAVELLED = 0.585
"""Updates at the full rate that the real steps amount to, as their rate falls and their momentum grows from nothing."""
PART_OF_THE_WAY = 0.25
"""Share of the rate for the steps on all candidates that lead to where influences are measured."""


def real_reward(session: TrainingSession, kept: DistillationSet) -> float:
    """Distil for some real steps on the kept candidates, score the reward split, and take the steps back.

    Each step is taken on all of them at once: in small batches their order would decide more than the selection.

    Args:
        session: The student; it is left as it came.
        kept: Candidates.

    Returns:
        See ``reward_score``.
    """
    config = _on_all(session, kept, session.context.config.kd.learning_rate)
    return score_after(session, config, REAL_STEPS, lambda trial: _real_steps(trial, kept))


def candidate_influences(
    session: TrainingSession, candidates: DistillationSet, judged: DistillationSet, judge: DistillationSet
) -> NDArray[np.float32]:
    """Say what each candidate adds to the real reward, to first order: the first tier.

    Measured a part of the way that steps on everything lead, since every selection goes much the same way and the
    student's gradients turn on it. The student must have been trained: without second moments it foretells little.

    Args:
        session: The student; it is left as it came.
        candidates: N candidates.
        judged: Those of them that the real reward takes steps on.
        judge: Labelled texts that the student is scored on: the reward split.

    Returns:
        float32 (N,), nats; the mean over a selection stands for its real reward, but for a constant.
    """
    rate, weights = session.context.config.kd.learning_rate, session.student.snapshot()
    with session.context.progress.stage("measure influences"):
        moves = session.trainer.moves_per_gradient(judged)
        trial = _trial(session, _on_all(session, judged, PART_OF_THE_WAY * rate), REAL_STEPS)
        _real_steps(trial, judged)
        found = influences(trial, candidates, moves, judge)
    session.student.restore(weights)
    return broadcast((TRAVELLED * found).astype(np.float32))


def score_after(session: TrainingSession, config: KDConfig, steps: int, distil: Callable[[KDTrainer], None]) -> float:
    """Distil for some steps on trial, score the reward split, and take the steps back.

    Args:
        session: The student; it is left as it came.
        config: Of the distillation.
        steps: Updates that will be made.
        distil: Makes them.

    Returns:
        See ``reward_score``.
    """
    weights = session.student.snapshot()
    distil(_trial(session, config, steps))
    score = reward_score(session)
    session.student.restore(weights)
    return score


def reward_score(session: TrainingSession) -> float:
    """Score the student as it is on the reward split.

    Args:
        session: The student.

    Returns:
        Log-likelihood, whatever the student's confidence and thresholds (``separation``).
    """
    logits, _ = run_student(session.student, session.reward.encoded)
    return float(
        threshold_free_log_likelihood(torch.from_numpy(broadcast(logits)), torch.from_numpy(session.reward.labels))
    )


def _on_all(session: TrainingSession, kept: DistillationSet, rate: float) -> KDConfig:
    kd = session.context.config.kd
    return replace(kd, learning_rate=rate, batch_size=max(process_count(), len(kept)))


def _trial(session: TrainingSession, config: KDConfig, steps: int) -> KDTrainer:
    context = session.context
    trial = replace(config, warmup_steps=0, rounds=1, round_steps=steps)
    return session.trainer.on_trial(trial, context.data.splits.reward, context.config.max_length)


def _real_steps(trial: KDTrainer, kept: DistillationSet) -> None:
    for _ in range(REAL_STEPS if len(kept) else 0):
        trial.train([kept], [1.0], 1, evaluate=False)
