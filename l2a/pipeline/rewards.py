"""The second tier of the reward: real distillation steps on trial, scored on the reward split and taken back."""

from collections.abc import Callable
from dataclasses import replace

import torch

from l2a.distributed import process_count
from l2a.kd.config import KDConfig
from l2a.kd.data import DistillationSet
from l2a.kd.trainer import KDTrainer, run_student
from l2a.pipeline.workbench import Workbench
from l2a.selector.separation import separation

REAL_STEPS = 4
"""Distillation steps, each on all the candidates judged, that judge one selection in the second tier of the reward."""
REAL_RATE = 0.25
"""Their learning rate as a share of the student's: a new optimiser's first steps at the whole rate only unsettle it."""
REAL_POOL = 600
"""Candidates of the pool, the same for all selections, among which a selection is judged."""


def real_reward(bench: Workbench, kept: DistillationSet) -> float:
    """Distil for some real steps on the kept candidates, score the reward split, and take the steps back.

    Each step is taken on all of them at once: in small batches their order would decide more than the selection.

    Args:
        bench: The student; it is left as it came.
        kept: Candidates.

    Returns:
        See ``reward_score``.
    """

    def steps_on_all(probe: KDTrainer) -> None:
        for _ in range(REAL_STEPS if len(kept) else 0):
            probe.train([kept], [1.0], 1)

    kd = bench.context.config.kd
    gentle = replace(
        kd,
        learning_rate=REAL_RATE * kd.learning_rate,
        batch_size=max(process_count(), len(kept)),
        gradient_accumulation=1 + len(kept) // kd.batch_size,
    )
    return score_after(bench, gentle, REAL_STEPS, steps_on_all)


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
    context, weights = bench.context, bench.student.snapshot()
    trial = replace(
        config, warmup_steps=0, rounds=1, round_steps=steps, evaluate_every=steps, average=0.0, compile=False
    )
    with torch.compiler.set_stance("force_eager"):  # a few steps are not worth compiling for
        distil(bench.trainer.on_trial(trial, context.data.splits.reward, context.config.max_length))
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
    return float(separation(run_student(bench.student, bench.reward.encoded)[0], bench.reward.labels))
