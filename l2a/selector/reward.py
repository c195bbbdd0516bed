"""The selector's reward, from what it stands for down to what a policy gets for each step. Read it from the top.

1. What a selection is worth is how near some real updates on it, beside the other texts of the run, bring the student
   to the teacher, on texts near the target that nothing is trained on: ``real_updates``, then ``reward_score``. That
   needs no labels. It takes seconds, and judges the few selections that a policy ends up with. ``label_scores`` are
   those of the reward split's labels after the same updates: too few to reward anything, they can only refuse a choice.
2. A policy tries thousands of selections. The surrogate fits the student's output layer alone, on its states as they
   are, by a ridge regression of what it lacks of the teacher's logits, on the same mixture of texts: ``fit_surrogate``.
3. The surrogate reward of a selection is what such a layer gains on the same reward texts: ``surrogate_reward``, and
   ``Gains`` while selections grow step by step.

How far 3 foretells 1, and how far each of them repeats itself, is measured in every run (``l2a.selector.select``).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize, special

from l2a.data import Bools, Doubles, Floats, Ints
from l2a.kd.data import DistillationSet
from l2a.kd.trainer import KDTrainer, Sets, calibrated_log_likelihoods, mean_divergence, run_student
from l2a.selector.problem import SelectionProblem
from l2a.student.student import Student
from l2a.util import RunError, UsageError, training

REAL_UPDATES = 30  # that judge one selection; after four of them its rank says little of that after a whole round
DIRECTIONS = 16  # of the student's states that the surrogate reads, the leading ones
RIDGE = 0.1  # against states whose leading direction has a spread of 1
PRIOR = 16  # candidates without a say that every selection is thought to hold

# 1. The real reward


@contextmanager
def real_updates(
    trainer: KDTrainer, sets: Sets, shares: Sequence[float], updates: int = REAL_UPDATES, order: int = 0
) -> Iterator[None]:
    """Distil for some real updates, and take them back at the end.

    What the student is worth in between, by ``reward_score``, is the real reward of the candidates among the sets.

    Args:
        trainer: The student's; both are left as they came.
        sets: Texts of each part of the mixture.
        shares: What each part contributes to the batches.
        updates: Under a schedule of their own, which falls to 0.
        order: Another number gives another order of the texts and another dropout.
    """
    weights, config = trainer.student.snapshot(), replace(trainer.config, warmup_steps=0, rounds=1, round_steps=updates)
    try:
        trainer.on_trial(config, order=order).train(sets, shares, updates, evaluate=False)
        yield
    finally:
        trainer.student.restore(weights)


def reward_score(student: Student, reward: DistillationSet) -> float:
    """Say how a student follows the teacher on the reward texts: -KL(teacher || student), in nats; 0 without texts.

    It is taken at the temperature and the thresholds that suit the student best. A few updates move both from batch to
    batch by more than selections differ, and what a selection keeps has the classes of its pool anyway.
    """
    logits = run_student(student, reward.encoded, precise=False)[0].astype(np.float64)

    def divergence(at: Doubles) -> float:
        return mean_divergence(logits * np.exp(at[0]) + at[1:], reward.teacher.logits)

    return -float(optimize.minimize(divergence, np.zeros(1 + logits.shape[1])).fun) if len(reward) else 0.0


def label_scores(student: Student, labelled: DistillationSet) -> Doubles:
    """Log-likelihood of each of M labels under a student, float64 (M,), at the temperature that suits them best."""
    logits = training.broadcast(run_student(student, labelled.encoded, precise=False)[0])
    return calibrated_log_likelihoods(logits, labelled.labels)


# 2. The surrogate: the output layer alone


@dataclass(frozen=True)
class Views:
    """What student and teacher make of N texts.

    Attributes:
        states: float32 (N, h), what the student's output layer reads.
        student: float32 (N, C), the student's logits.
        teacher: float32 (N, C), the teacher's.
    """

    states: Floats
    student: Floats
    teacher: Floats

    @property
    def gaps(self) -> Floats:
        """What the student's logits lack of the teacher's, float32 (N, C), less what all classes have in common."""
        lacking = self.teacher - self.student
        return np.asarray(lacking - lacking.mean(axis=1, keepdims=True))

    def take(self, rows: Ints) -> "Views":
        """Return the texts at the given positions, int64 (K,)."""
        return Views(self.states[rows], self.student[rows], self.teacher[rows])


def view(student: Student, texts: DistillationSet) -> Views:
    """Show N texts to the student, in the arithmetic of its training; the teacher has read them."""
    logits, states = map(training.broadcast, run_student(student, texts.encoded, precise=False))
    return Views(states, logits, texts.teacher.logits)


@dataclass(frozen=True)
class Surrogate:
    """What selections are judged by.

    Attributes:
        rows: float32 (N, k + C): k leading directions of each candidate's states and a 1, then its gaps.
        known: float32 (k, k + C): moments of what every student reads, weighted by its shares, and the ridge.
        share: What the kept candidates contribute to the mixture.
        judged: float32 (M, k), directions of the reward texts.
        judged_student: float32 (M, C), the student's logits there.
        judged_teacher: float32 (M, C), the teacher's probabilities there.
        classes: int64 (N,), the class that the teacher predicts for each candidate.
        class_shares: float32 (C,), each class's share of the pool.
    """

    rows: Floats
    known: Floats
    share: float
    judged: Floats
    judged_student: Floats
    judged_teacher: Floats
    classes: Ints
    class_shares: Floats

    def scores(self, moments: Floats) -> Floats:
        """Judge E output layers, each fitted on moments, float32 (E, k, k + C): -cross-entropy, float32 (E,), nats."""
        width = self.judged.shape[1]
        layers = np.linalg.solve(moments[..., :width], moments[..., width:])
        logits = self.judged @ layers + self.judged_student
        highest = logits.max(axis=2, keepdims=True)
        normaliser = np.log(np.exp(logits - highest).sum(axis=2)) + highest[..., 0]
        likelihoods = (self.judged_teacher * logits).sum(axis=2) - normaliser
        return np.asarray(likelihoods.sum(axis=1) / max(len(self.judged), 1), np.float32)


def fit_surrogate(candidates: Views, known: Sequence[tuple[Views, float]], share: float, judged: Views) -> Surrogate:
    """Prepare to judge selections.

    Args:
        candidates: N candidates.
        known: What every student reads beside them, each part with its share of the mixture.
        share: That of the kept candidates.
        judged: The reward texts.

    Raises:
        RunError: If a number is not finite.
    """
    parts = [candidates, judged, *(part for part, _ in known)]
    if not all(np.isfinite(numbers).all() for part in parts for numbers in vars(part).values()):
        raise RunError("the student's states are not all finite; lower kd.learning_rate")
    middle = candidates.states.mean(axis=0)
    centred = (candidates.states - middle).astype(np.float64)
    spreads, directions = np.linalg.eigh(centred.T @ centred / len(centred))
    axes = directions[:, : -DIRECTIONS - 1 : -1] / max(float(spreads[-1]), 1e-12) ** 0.5

    def read(part: Views) -> Floats:
        places = (part.states - middle) @ axes
        return np.concatenate([places, np.ones((len(places), 1))], axis=1).astype(np.float32)

    rows = [np.concatenate([read(part), part.gaps], axis=1) for part in (candidates, *(part for part, _ in known))]
    width, classes = axes.shape[1] + 1, candidates.teacher.argmax(axis=1)
    moments = RIDGE * np.eye(width, rows[0].shape[1], dtype=np.float32)
    for (_, weight), part in zip(known, rows[1:], strict=True):
        moments += weight * part[:, :width].T @ part / max(len(part), 1)
    class_shares = (np.bincount(classes, minlength=candidates.teacher.shape[1]) / len(classes)).astype(np.float32)
    taught = special.softmax(judged.teacher, axis=1)
    return Surrogate(rows[0], moments, share, read(judged), judged.student, taught, classes, class_shares)


def marginal_gains(surrogate: Surrogate) -> Floats:
    """Say what a little more weight of each candidate adds to the score where all are kept, float32 (N,).

    It is the derivative of the score by the weight; differences between candidates are what it is good for.
    """
    width, rows = surrogate.judged.shape[1], surrogate.rows
    states, moments = rows[:, :width], surrogate.known + surrogate.share * rows[:, :width].T @ rows / len(rows)
    layer = np.linalg.solve(moments[:, :width], moments[:, width:])
    said = special.softmax(surrogate.judged @ layer + surrogate.judged_student, axis=1)
    slope = np.linalg.solve(moments[:, :width], surrogate.judged.T @ (surrogate.judged_teacher - said))
    gains = ((states @ slope) * (rows[:, width:] - states @ layer)).sum(axis=1)
    return np.asarray(gains / max(len(surrogate.judged), 1), np.float32)


# 3. The surrogate reward of selections


def surrogate_of(problem: SelectionProblem) -> Surrogate:
    """Fetch what selections from a pool are judged by.

    Raises:
        UsageError: If the problem has none, or that of another pool.
    """
    if problem.surrogate is None:
        raise UsageError("surrogate is None; a policy needs one, so give a function that returns it")
    found = problem.surrogate()
    if len(found.rows) != len(problem):
        raise UsageError(f"the surrogate is of {len(found.rows)} candidates; give one of the {len(problem)} here")
    return found


def surrogate_only(problem: SelectionProblem) -> SelectionProblem:
    """Keep of a problem the surrogate and what the student predicts, and not the models behind its rewards."""
    logits, surrogate = problem.student_logits, surrogate_of(problem)
    return SelectionProblem(problem.pool, lambda: logits, surrogate=lambda: surrogate)


def surrogate_reward(surrogate: Surrogate, kept: Bools | Ints) -> float:
    """Say what a selection, bool (N,) or int64 (K,), gains in nats on the reward texts against keeping nothing."""
    gains, chosen = Gains(surrogate, 1), np.arange(len(surrogate.rows))[None, kept]
    gains.add(chosen, np.ones(chosen.shape, bool))
    return float(gains.gain[0])


class Gains:
    """E selections that grow: the gain of each is that of an output layer fitted on what it kept so far.

    Each class counts as the pool has it, whatever was kept of it, since as many of each will be used (``keep_best``). A
    selection that has kept little is drawn to 0 by ``PRIOR``.

    Attributes:
        counts: float32 (E, C), candidates kept so far of each class that the teacher predicts.
        gain: float32 (E,), in nats; what a step adds to it is the policy's reward.
    """

    def __init__(self, surrogate: Surrogate, count: int) -> None:
        """Start with nothing kept in any of E = ``count`` selections."""
        self._surrogate, classes = surrogate, len(surrogate.class_shares)
        self._sums = np.zeros((count, classes, *surrogate.known.shape), np.float32)
        self.counts: Floats = np.zeros((count, classes), np.float32)
        self._start = surrogate.scores(surrogate.known[None])
        self.gain: Floats = np.zeros(count, np.float32)

    def reset(self, which: Ints) -> None:
        """Empty the selections ``which``, intp (K,)."""
        self._sums[which] = self.counts[which] = self.gain[which] = 0.0

    def add(self, candidates: Ints, kept: Bools) -> None:
        """Let each selection keep those of its next candidates, int64 (E, B), that ``kept``, bool (E, B), marks."""
        judge = self._surrogate
        for label, share in enumerate(judge.class_shares):
            counted = (kept & (judge.classes[candidates] == label)) if share else np.zeros_like(kept)
            for episode in np.flatnonzero(counted.any(axis=1)):
                rows = judge.rows[candidates[episode, counted[episode]]]
                self._sums[episode, label] += rows[:, : len(judge.known)].T @ rows
            self.counts[:, label] += counted.sum(axis=1)
        weights = judge.share * judge.class_shares / np.maximum(self.counts + PRIOR * judge.class_shares, 1e-12)
        self.gain = judge.scores(judge.known + np.einsum("ec,eckj->ekj", weights, self._sums)) - self._start
