"""The selector's reward, from what it stands for down to what a policy gets for each step. Read it from the top.

1. What a selection is worth is how near a few real updates on it bring the student to the teacher, on texts near the
   target that nothing is trained on: ``real_steps``, then ``reward_score``. That needs no labels. It takes a second or
   so, and judges the few selections that a policy ends up with. ``label_scores`` are those of the reward split's labels
   after the same updates: too few to reward anything, they can only refuse a selection.
2. A policy tries thousands of selections. A few updates are nearly linear in the gradients of the texts that they are
   taken on (influence functions: Koh and Liang, ICML 2017), so that one number a text says what it adds:
   ``candidate_influences``, two passes over texts. Of a large pool, 1,000 are measured, and a regression on what is
   known of every candidate carries their influences over to the rest: ``fitted_influences``.
3. The surrogate reward of a selection is the mean influence of what it keeps: ``surrogate_reward``, and ``Gains`` while
   selections grow step by step.

How far 3 foretells 1, and how far each of them repeats itself, is measured in every run (``l2a.selector.select``).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import special, stats
from sklearn import decomposition, linear_model, model_selection

from l2a.config import KDConfig
from l2a.data import Bools, Doubles, Floats, Ints, encoding
from l2a.kd.data import DistillationSet
from l2a.kd.losses import soft_label_loss
from l2a.kd.trainer import KDTrainer, calibrated_log_likelihoods, run_student
from l2a.selector.problem import SelectionProblem, candidate_features
from l2a.student.student import Student
from l2a.util import SILENT, Progress, RunError, UsageError, process_count, training

REAL_STEPS = 4  # updates, each on all the candidates judged, that judge one selection
REAL_KEPT = 160  # kept candidates that a selection is judged by; two selections share those that both keep
REAL_POOL = 400  # candidates of the pool that stand for all where influences are measured
MEASURED = 1000  # candidates whose influences are measured
COMPONENTS = 48  # of the teacher's embeddings, in the regression that carries them over
TRAVELLED = 0.585  # updates at the full rate that REAL_STEPS amount to: their rate falls, their momentum starts at 0
PART_OF_THE_WAY = 0.25  # share of the rate for the steps on all candidates that lead to where influences are measured
REACH = 1e-3  # how far influences look ahead, as a share of the weights' length: enough for float32, short for linear
PRIOR = 16  # candidates without influence that every selection is thought to hold

# 1. The real reward


@contextmanager
def on_trial(trainer: KDTrainer, config: KDConfig, steps: int, order: int = 0) -> Iterator[KDTrainer]:
    """Lend a trainer whose steps are taken back at the end.

    Args:
        trainer: The student's; both are left as they came.
        config: Loss and rates.
        steps: Updates that will be made.
        order: Another number gives another order of the texts and another dropout.

    Yields:
        The trainer to take the steps with; the student is that of the other.
    """
    weights = trainer.student.snapshot()
    yield trainer.on_trial(replace(config, warmup_steps=0, rounds=1, round_steps=steps), order=order)
    trainer.student.restore(weights)


@contextmanager
def real_steps(
    trainer: KDTrainer, kept: DistillationSet, order: int = 0, share_of_rate: float = 1.0
) -> Iterator[KDTrainer]:
    """Distil for some real steps on the kept candidates, and take the steps back at the end.

    What the student is worth in between, by ``reward_score``, is the real reward of the candidates. Each step is taken
    on all of them at once: in small batches their order would decide more than the selection.

    Args:
        trainer: The student's; both are left as they came.
        kept: Candidates.
        order: Another number gives another dropout.
        share_of_rate: Of the run's peak rate.

    Yields:
        The trainer that took the steps.
    """
    rate, batch = share_of_rate * trainer.config.peak_rate, max(process_count(), len(kept))
    whole = replace(trainer.config, learning_rate=rate, batch_size=batch)
    with on_trial(trainer, whole, REAL_STEPS, order) as trial:
        for _ in range(REAL_STEPS if len(kept) else 0):
            trial.train([kept], [1.0], 1, evaluate=False)
        yield trial


def reward_score(student: Student, reward: DistillationSet) -> float:
    """Say how a student follows the teacher on the reward texts: -KL(teacher || student), in nats; 0 without texts."""
    logits = torch.from_numpy(training.broadcast(run_student(student, reward.encoded)[0]))
    losses = soft_label_loss(logits, torch.from_numpy(reward.teacher.logits), 1.0)
    return -float(losses.mean()) if len(losses) else 0.0


def label_scores(student: Student, labelled: DistillationSet) -> Doubles:
    """Log-likelihood of each of M labels under a student, float64 (M,), at the temperature that suits them best."""
    return calibrated_log_likelihoods(training.broadcast(run_student(student, labelled.encoded)[0]), labelled.labels)


# 2. What each candidate adds to it, to first order


def candidate_influences(
    trainer: KDTrainer, candidates: DistillationSet, judged: DistillationSet, reward: DistillationSet,
    progress: Progress = SILENT, order: int = 0,
) -> Floats:  # fmt: skip
    """Say what each candidate adds to the real reward, to first order.

    Measured a part of the way that steps on everything lead, since every selection goes much the same way and the
    student's gradients turn on it. The student must have been trained: without second moments it foretells little.

    Args:
        trainer: The student's; both are left as they came.
        candidates: N candidates.
        judged: Some that stand for the pool.
        reward: The reward texts.
        progress: Shows the stage.
        order: Another number gives another dropout.

    Returns:
        float32 (N,), nats; the mean over a selection stands for its real reward, but for a constant.
    """
    with progress.stage("measure influences"):
        moves = trainer.moves_per_gradient(judged)
        with real_steps(trainer, judged, order, PART_OF_THE_WAY) as trial:
            found = influences(trial, candidates, moves, reward)
    return training.broadcast((TRAVELLED * found).astype(np.float32))


def fitted_influences(problem: SelectionProblem, measured: Ints, values: Floats, progress: Progress = SILENT) -> Floats:
    """Carry influences over from some candidates to all of a pool.

    The gradient of the output layer is what parts student from teacher times a representation of the text, so a ridge
    regression reads these products, the teacher's embedding in place of the student's, beside the features.

    Args:
        problem: The pool and the student's view of it.
        measured: int64 (K,), positions of the candidates whose influences are known.
        values: float32 (K,), these.
        progress: Gets the rank correlation of the regression with influences that it was not fitted on.

    Returns:
        float32 (N,); the known ones as they are.
    """
    if len(measured) == len(problem):
        return values
    outputs = problem.pool.teacher
    gaps = outputs.probabilities() - special.softmax(problem.student_logits, axis=1)
    places = decomposition.PCA(min(COMPONENTS, len(measured), outputs.embeddings.shape[1]), whiten=True, random_state=0)
    places = places.fit(outputs.embeddings[measured]).transform(outputs.embeddings)
    columns = [candidate_features(problem).matrix, gaps, *(gap[:, None] * places for gap in gaps.T)]
    read, model = np.concatenate(columns, axis=1), linear_model.RidgeCV(np.geomspace(1, 1e4, 9))
    agree = stats.spearmanr(model_selection.cross_val_predict(model, read[measured], values, cv=5), values).statistic
    progress.event("influences", measured=len(measured), candidates=len(problem), fit=round(float(agree), 3))
    found: Floats = model.fit(read[measured], values).predict(read).astype(np.float32)
    found[measured] = values
    return found


def influences(
    trainer: KDTrainer, texts: DistillationSet, moves: Sequence[torch.Tensor], reward: DistillationSet
) -> Floats:
    """Say how much the student's score on the reward texts rises for each text that an update is made of.

    With s the gradient of the score, D the moves and g_i the gradient of a text's loss, it is -s' D g_i: how far the
    text's loss falls when the weights move along D s. Two passes without gradients give that for all texts.

    Args:
        trainer: Its student is left as it came.
        texts: N texts that updates can be made of.
        moves: D, of the shapes of the model's parameters (``KDTrainer.moves_per_gradient``).
        reward: The reward texts.

    Returns:
        float32 (N,), nats for an update that consists of this text alone.
    """
    parameters, before = list(trainer.student.model.parameters()), trainer.student.snapshot()
    direction = [move * slope for move, slope in zip(moves, reward_gradient(trainer.student, reward), strict=True)]
    length = _length(direction)
    if length == 0:
        return np.zeros(len(texts), np.float32)
    reach, losses = REACH * _length(parameters) / length, []
    for distance in (reach, -2 * reach):  # a step ahead, then one behind
        with torch.no_grad():
            for parameter, way in zip(parameters, direction, strict=True):
                parameter.add_(way, alpha=distance)
        losses.append(trainer.losses(texts).astype(np.float64))
    trainer.student.restore(before)
    return np.asarray((losses[1] - losses[0]) / (2 * reach), np.float32)


def reward_gradient(student: Student, reward: DistillationSet) -> list[torch.Tensor]:
    """Differentiate the score of the reward texts (``reward_score``) by the student's weights, without dropout.

    Args:
        student: Any student; it has no gradients afterwards.
        reward: M texts with teacher outputs.

    Returns:
        float32 tensors of the shapes of ``student.model.parameters()``, in their order.
    """
    device, parameters = student.output.weight.device, list(student.model.parameters())
    student.model.zero_grad(set_to_none=True)
    with training.evaluating(student.model):
        for indices in encoding.inference_batches(reward.encoded):
            logits, _ = student(reward.encoded.padded(indices, device))
            taught = torch.from_numpy(reward.teacher.logits[indices]).to(device)
            losses = soft_label_loss(logits.float(), taught, 1.0)
            (-losses.sum() / len(reward)).backward()  # type: ignore[no-untyped-call]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    student.model.zero_grad(set_to_none=True)
    return gradients


def _length(tensors: Sequence[torch.Tensor]) -> float:
    return float(torch.stack([tensor.detach().square().sum() for tensor in tensors]).sum().sqrt())


# 3. The surrogate reward of selections


@dataclass(frozen=True)
class Surrogate:
    """What selections are judged by.

    Attributes:
        influences: float32 (N,), nats (``candidate_influences``).
        classes: int64 (N,), the class that the teacher predicts.
        shares: float32 (C,), each class's share of the pool.
        spread: Standard deviation of the influences, in nats; 1 where they are all the same.
    """

    influences: Floats
    classes: Ints
    shares: Floats
    spread: float


def build_surrogate(problem: SelectionProblem) -> Surrogate:
    """Measure what selections from a pool are judged by.

    Raises:
        UsageError: If the problem cannot measure influences, or they do not fit the pool.
        RunError: If they are not finite.
    """
    if problem.influences is None:
        raise UsageError("influences are None; a policy needs those of every candidate, so give a function")
    values = problem.influences()
    if values.shape != (len(problem),):
        raise UsageError(f"influences have shape {values.shape}; give ({len(problem)},) to match the pool")
    if not np.isfinite(values).all():
        raise RunError("influences are not all finite; lower kd.learning_rate")
    count, spread = problem.pool.teacher.logits.shape[1], float(values.std())
    shares = (np.bincount(problem.classes, minlength=count) / len(problem)).astype(np.float32)
    return Surrogate(values, problem.classes, shares, spread if spread > 0 else 1.0)


def surrogate_only(problem: SelectionProblem) -> SelectionProblem:
    """Keep of a problem the influences, once measured, and not the teacher and the student behind its rewards."""
    influences = build_surrogate(problem).influences
    return SelectionProblem(problem.pool, problem.student_logits, influences=lambda: influences)


def surrogate_reward(surrogate: Surrogate, kept: Bools) -> float:
    """Say what a whole selection, bool (N,), gains in nats on the reward texts against texts without influence."""
    gains = Gains(surrogate, 1)
    gains.add(np.flatnonzero(kept)[None], np.ones((1, int(kept.sum())), bool))
    return float(gains.gain[0])


class Gains:
    """E selections that grow: the gain of each is the mean influence of what it kept so far.

    Each class counts as the pool has it, whatever was kept of it, since as many of each will be used (``keep_best``). A
    selection that has kept little is drawn to 0 by ``PRIOR``.

    Attributes:
        counts: float32 (E, C), candidates kept so far of each class that the teacher predicts.
        gain: float32 (E,), in nats; what a step adds to it is the policy's reward.
    """

    def __init__(self, surrogate: Surrogate, count: int) -> None:
        """Start with nothing kept in any of E = ``count`` selections."""
        self._surrogate = surrogate
        self._sums, self.counts = np.zeros((2, count, len(surrogate.shares)), np.float32)
        self.gain: Floats = np.zeros(count, np.float32)

    def reset(self, which: Ints) -> None:
        """Empty the selections ``which``, intp (K,)."""
        self._sums[which] = self.counts[which] = self.gain[which] = 0.0

    def add(self, candidates: Ints, kept: Bools) -> None:
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
        means = self._sums / np.maximum(self.counts + PRIOR * self._surrogate.shares, 1e-12)
        self.gain = (self._surrogate.shares * means).sum(axis=1)
