"""Both tiers of the reward: real distillation steps on trial, and what each candidate adds to them to first order."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from l2a.distributed import agree, process_count
from l2a.kd.config import KDConfig
from l2a.kd.data import DistillationSet
from l2a.kd.inference import run_student
from l2a.kd.influence import influences
from l2a.kd.separation import separation
from l2a.kd.trainer import KDTrainer
from l2a.pipeline.workbench import Workbench

REAL_STEPS = 4
"""Distillation steps, each on all the candidates judged, that judge one selection in the second tier of the reward."""
REAL_POOL = 600
"""Candidates of the pool, the same for all selections, among which a selection is judged."""
TRAVELLED = 0.585
"""Updates at the full rate that the real steps amount to, as their rate falls and their momentum grows from nothing."""
PART_OF_THE_WAY = 0.25
"""Share of the rate for the steps on all candidates that lead to where influences are measured."""


def real_reward(bench: Workbench, kept: DistillationSet) -> float:
    """Distil for some real steps on the kept candidates, score the reward split, and take the steps back.

    Each step is taken on all of them at once: in small batches their order would decide more than the selection.

    Args:
        bench: The student; it is left as it came.
        kept: Candidates.

    Returns:
        See ``reward_score``.
    """
    config = _on_all(bench, kept, bench.context.config.kd.learning_rate)
    return score_after(bench, config, REAL_STEPS, lambda trial: _real_steps(trial, kept))


def candidate_influences(
    bench: Workbench, candidates: DistillationSet, judged: DistillationSet, judge: DistillationSet
) -> NDArray[np.float32]:
    """Say what each candidate adds to the real reward, to first order: the first tier.

    Measured a part of the way that steps on everything lead, since every selection goes much the same way and the
    student's gradients turn on it. The student must have been trained: without second moments it foretells little.

    Args:
        bench: The student; it is left as it came.
        candidates: N candidates.
        judged: Those of them that the real reward takes steps on.
        judge: Labelled texts that the student is scored on: the reward split.

    Returns:
        float32 (N,), nats; the mean over a selection stands for its real reward, but for a constant.
    """
    rate, weights = bench.context.config.kd.learning_rate, bench.student.snapshot()
    with torch.compiler.set_stance("force_eager"), bench.context.progress.stage("measure influences"):
        moves = bench.trainer.moves_per_gradient(judged)
        trial = _trial(bench, _on_all(bench, judged, PART_OF_THE_WAY * rate), REAL_STEPS)
        _real_steps(trial, judged)
        found = influences(trial, candidates, moves, judge)
    bench.student.restore(weights)
    return agree((TRAVELLED * found).astype(np.float32))


def score_after(bench: Workbench, config: KDConfig, steps: int, distil: Callable[[KDTrainer], None]) -> float:
    """Distil for some steps on trial, score the reward split, and take the steps back.

    Args:
        bench: The student; it is left as it came.
        config: Of the distillation.
        steps: Updates that will be made.
        distil: Makes them.

    Returns:
        See ``reward_score``.
    """
    weights = bench.student.snapshot()
    with torch.compiler.set_stance("force_eager"):  # a few steps are not worth compiling for
        distil(_trial(bench, config, steps))
    score = reward_score(bench)
    bench.student.restore(weights)
    return score


def reward_score(bench: Workbench) -> float:
    """Score the student as it is on the reward split.

    Args:
        bench: The student.

    Returns:
        Log-likelihood, whatever the student's confidence and thresholds (``separation``).
    """
    logits, _ = run_student(bench.student, bench.reward.encoded)
    return float(separation(torch.from_numpy(agree(logits)), torch.from_numpy(bench.reward.labels)))


def _on_all(bench: Workbench, kept: DistillationSet, rate: float) -> KDConfig:
    kd = bench.context.config.kd
    return replace(
        kd,
        learning_rate=rate,
        batch_size=max(process_count(), len(kept)),
        gradient_accumulation=1 + len(kept) // kd.batch_size,
    )


def _trial(bench: Workbench, config: KDConfig, steps: int) -> KDTrainer:
    context = bench.context
    trial = replace(
        config, warmup_steps=0, rounds=1, round_steps=steps, evaluate_every=steps, average=0.0, compile=False
    )
    return bench.trainer.on_trial(trial, context.data.splits.reward, context.config.max_length)


def _real_steps(trial: KDTrainer, kept: DistillationSet) -> None:
    for _ in range(REAL_STEPS if len(kept) else 0):
        trial.train([kept], [1.0], 1)
