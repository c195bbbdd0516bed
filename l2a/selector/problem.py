"""What a selector is given, and what it gives back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l2a.errors import RunError, UsageError
from l2a.generator.pool import CandidatePool
from l2a.selector.numerics import Floats
from l2a.selector.policy import TrainedPolicy

RealReward = Callable[[NDArray[np.bool_]], float]
Fact = float | int | str | list[float]


@dataclass(frozen=True)
class SelectionProblem:
    """One pool of candidates and the state of the student that is to learn from some of them.

    There are no labels in here. Those of the reward split are behind ``influences`` and ``real_reward``; neither the
    split that chooses the model nor the test split can reach an environment, a rule or a policy.

    Attributes:
        pool: N labelled candidates.
        student_logits: float32 (N, C), what the student predicts for each candidate.
        influences: float32 (N,), what a candidate adds to the real reward of a selection that it is the whole of, to
            first order, in nats; None for a rule, which reads none.
        real_reward: Distils the student for a few steps on the kept candidates (bool (N,)), from a saved state, and
            returns how well it then tells the reward split's classes apart (``l2a.kd.separation``), in nats; None when
            there is no second tier.
    """

    pool: CandidatePool
    student_logits: Floats
    influences: Floats | None = None
    real_reward: RealReward | None = None

    def __post_init__(self) -> None:
        candidates, classes = self.pool.teacher.logits.shape
        for name, shape in {"student_logits": (candidates, classes), "influences": (candidates,)}.items():
            values = getattr(self, name)
            if values is None:
                continue
            if values.shape != shape:
                raise UsageError(f"{name}: shape {values.shape} came, {shape} is needed to match the pool")
            if not np.isfinite(values).all():
                raise RunError(f"{name}: not all values are finite; lower the student's learning rate")
        if candidates < 2:
            raise UsageError(f"selection: {candidates} candidates came; at least 2 are needed")

    def __len__(self) -> int:
        """Return the number of candidates."""
        return len(self.student_logits)

    @property
    def classes(self) -> NDArray[np.int64]:
        """The class that the teacher predicts for each candidate, int64 (N,)."""
        predicted: NDArray[np.int64] = self.pool.teacher.logits.argmax(axis=1).astype(np.int64)
        return predicted


@dataclass(frozen=True)
class Selection:
    """Which candidates the student is to learn from.

    Attributes:
        kept: bool (N,), exactly round(keep_rate * N) of them true (all of them for the rule "all").
        scores: float32 (N,), higher is kept first.
        agent: Name of the agent or rule.
        diagnostics: Facts of the run, such as steps per second and tier correlation; values that JSON can hold.
        policy: The learned policy; None for a rule.
        fell_back: Whether other scores were used in place of the policy's, which the real reward found worse.
    """

    kept: NDArray[np.bool_]
    scores: Floats
    agent: str
    diagnostics: Mapping[str, Fact]
    policy: TrainedPolicy | None = None
    fell_back: bool = False


def keep_best(scores: Floats, keep_rate: float, classes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Keep the best-scored share of each class; ties go to the earlier candidate.

    A selection says which candidates of a class are used, not how many: neither reward sees a shift of the classes,
    since both take the thresholds out, but the student's thresholds would follow it.

    Args:
        scores: float32 (N,).
        keep_rate: Share to keep, in (0, 1].
        classes: int64 (N,), the class that the teacher predicts (``SelectionProblem.classes``).

    Returns:
        bool (N,), round(keep_rate * N) true and never fewer than one.
    """
    order, places = np.argsort(-scores, kind="stable"), np.empty(len(scores))
    for label in np.unique(classes):
        members = order[classes[order] == label]
        places[members] = (np.arange(len(members)) + 0.5) / len(members)
    kept = np.zeros(len(scores), bool)
    kept[np.argsort(places, kind="stable")[: max(1, round(keep_rate * len(scores)))]] = True
    return kept
