"""What a selector is given, what it gives back, what it can see of a candidate, and the rules without learning."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import special

from l2a.data import Bools, Doubles, Floats, Ints
from l2a.util import RunError, UsageError

if TYPE_CHECKING:  # both import torch, which a card that names a rule should not wait for
    from l2a.generator.chain import CandidatePool
    from l2a.selector import algorithms, reward

RealReward = Callable[[Bools], float]
Fact = float | int | str | list[float] | dict[str, float]

SMALLEST_PROBABILITY = 1e-7
CLIP = 5.0
RANGE_OF_NORMAL_QUARTILES = 1.349
GLITTER_TEMPERATURE = 5.0


@dataclass(frozen=True)
class SelectionProblem:
    """One pool of candidates and the state of the student that is to learn from some of them.

    There are no labels in here, and none behind ``surrogate`` and ``real_reward``, the rewards: neither the reward
    split, the validation split nor the test split can reach an environment or a policy. ``veto`` reads the reward
    split's labels, and ``oracle`` texts of the target that no run has.

    Attributes:
        pool: N labelled candidates.
        predict: Asks the student, as it is then, for its logits, float32 (N, C); ``student_logits`` asks at most once.
        surrogate: Builds what a policy's selections are judged by. Only policies ask for it; None where rules choose.
        real_reward: Distils the student for some updates with the kept candidates (bool (N,)), from a saved state, and
            returns its score on the reward texts (``l2a.selector.reward``), in nats; None for no second tier.
        veto: Log-likelihoods, float64 (M,), of the reward split's labels after the same updates; they can only refuse.
        repeated: The same problem, whose rewards are measured again with other draws; None where that is not asked for.
        oracle: What spare texts of the target say of each candidate, float32 (N,), for the rule "oracle" alone.
    """

    pool: "CandidatePool"
    predict: Callable[[], Floats]
    surrogate: "Callable[[], reward.Surrogate] | None" = None
    real_reward: RealReward | None = None
    veto: Callable[[Bools], Doubles] | None = None
    repeated: "SelectionProblem | None" = None
    oracle: Callable[[], Floats] | None = None

    def __post_init__(self) -> None:
        """Check that there is something to choose from."""
        if len(self) < 2:
            raise UsageError(f"the pool has {len(self)} candidates; a selection needs at least 2")

    def __len__(self) -> int:
        """Return the number of candidates."""
        return len(self.pool)

    @cached_property
    def student_logits(self) -> Floats:
        """What the student predicts for each candidate, float32 (N, C).

        Raises:
            UsageError: If it is not of this pool.
            RunError: If a number is not finite.
        """
        logits, shape = self.predict(), self.pool.teacher.logits.shape
        if logits.shape != shape:
            raise UsageError(f"the student's logits have shape {logits.shape}; give {shape} to match the pool")
        if not np.isfinite(logits).all():
            raise RunError("the student's logits are not all finite; lower kd.learning_rate")
        return logits

    @property
    def classes(self) -> Ints:
        """The class that the teacher predicts for each candidate, int64 (N,)."""
        return np.asarray(self.pool.teacher.logits.argmax(axis=1), np.int64)


@dataclass(frozen=True)
class Selection:
    """Which candidates the student is to learn from.

    Attributes:
        kept: bool (N,), exactly round(keep_rate * N) of them true (all of them for the rule "all").
        scores: float32 (N,), higher is kept first.
        agent: Name of the agent or rule.
        diagnostics: Facts of the run, such as steps per second and tier correlation; values that JSON can hold.
        policy: The learned policy; None for a rule.
        fell_back: Whether other scores replaced the policy's, which the real reward found worse or the labels refused.
    """

    kept: Bools
    scores: Floats
    agent: str
    diagnostics: Mapping[str, Fact]
    policy: "algorithms.TrainedPolicy | None" = None
    fell_back: bool = False


def keep_best(scores: Floats, keep_rate: float, classes: Ints) -> Bools:
    """Keep the best-scored share of each class, bool (N,); ties go to the earlier candidate.

    Of N candidates round(keep_rate * N) are kept, at least one. A selection says which of a class are used, not how
    many: the student's thresholds would follow a shift of the classes.

    Args:
        scores: float32 (N,).
        keep_rate: Share to keep, in (0, 1].
        classes: int64 (N,), the class that the teacher predicts (``SelectionProblem.classes``).
    """
    places = (ranks_within(-scores, classes) - 0.5) / np.bincount(classes)[classes]
    kept = np.zeros(len(scores), bool)
    kept[np.argsort(places, kind="stable")[: max(1, round(keep_rate * len(scores)))]] = True
    return kept


def entropy(probabilities: Floats) -> Floats:
    """Shannon entropy over the last axis as a share of its maximum, log C: float32 (..., C) to (...)."""
    nats: Floats = -(probabilities * np.log(np.maximum(probabilities, SMALLEST_PROBABILITY))).sum(axis=-1)
    return nats / np.float32(np.log(probabilities.shape[-1]))


def kl_divergence(first: Floats, second: Floats) -> Floats:
    """KL(first || second) over the last axis, in nats: float32 (..., C) twice to (...)."""
    first_log, second_log = (np.log(np.maximum(one, SMALLEST_PROBABILITY)) for one in (first, second))
    return np.asarray(np.maximum((first * (first_log - second_log)).sum(axis=-1), np.float32(0.0)))


class CandidateFeatures(NamedTuple):
    """Features of N candidates that do not depend on what was selected so far.

    Attributes:
        matrix: float32 (N, F), standardised on the pool and clipped to [-5, 5]; operator columns are 0 or 1.
        names: F column names; a saved policy finds its columns by them.
    """

    matrix: Floats
    names: tuple[str, ...]


def candidate_features(problem: SelectionProblem, names: tuple[str, ...] | None = None) -> CandidateFeatures:
    """Describe every candidate of a pool by features, in the order of ``names``.

    Args:
        problem: The pool, the teacher's and the student's view of it.
        names: Columns wanted, such as those of a saved policy: operators and origins that this pool lacks become zeros,
            and those that the policy does not know are left out. None for all columns of this pool.

    Raises:
        RunError: If a policy wants a column that is not measured, as one of another version may.
    """
    columns = {name: _standardise(values) for name, values in measurements(problem).items()}
    sides = [name if name in ("source", "target") else "unlabelled" for name in origin_names(problem.pool)]
    for kind, values in (("operator", problem.pool.operators), ("origin", sides)):
        of: np.typing.NDArray[np.str_] = np.array(values)
        columns |= {f"{kind}={name}": (of == name).astype(np.float32) for name in np.unique(of)}
    wanted = tuple(columns) if names is None else names
    unknown = [name for name in wanted if name not in columns and "=" not in name]
    if unknown:
        raise RunError(f"the policy reads {', '.join(unknown)}, which this version does not measure; train it again")
    absent = np.zeros(len(problem), np.float32)
    matrix = np.stack([columns.get(name, absent) for name in wanted], axis=1)
    return CandidateFeatures(np.ascontiguousarray(matrix, np.float32), wanted)


def origin_names(pool: "CandidatePool") -> list[str]:
    """Say where each candidate comes from: "source", "target" or the name of a file."""
    return [origin.rpartition(":")[0] for origin in pool.origins]


def measurements(problem: SelectionProblem) -> dict[str, Floats]:
    """Measure every candidate before any standardisation: float32 (N,) by name; operators and origins apart."""
    pool = problem.pool
    teacher, student = pool.teacher.probabilities(), special.softmax(problem.student_logits, axis=1)
    predicted = teacher.argmax(axis=1)
    best_two = np.sort(teacher, axis=1)[:, -2:]
    class_shares = np.bincount(predicted, minlength=teacher.shape[1]) / len(predicted)
    return {
        "teacher_entropy": entropy(teacher),
        "teacher_margin": best_two[:, 1] - best_two[:, 0],
        "student_entropy": entropy(student),
        "teacher_student_kl": np.log1p(kl_divergence(teacher, student)),
        "agreement": (predicted == student.argmax(axis=1)).astype(np.float32),
        "log_density": pool.log_density, "domain_probability": pool.domain_probability,
        "max_target_cosine": pool.max_target_cosine, "degree": pool.degrees,
        "log_length": np.log1p([sum(len(part.split()) for part in text) for text in pool.inputs]),
        "class_share_of_pool": class_shares[predicted],
    }  # fmt: skip


def _standardise(values: Floats) -> Floats:
    # Median and quartiles, because densities and divergences have heavy tails; a feature that is mostly one value
    # (agreement) has no quartile range and falls back to its standard deviation.
    numbers = np.asarray(values, np.float64)
    low, middle, high = np.quantile(numbers, [0.25, 0.5, 0.75])
    scale = (high - low) / RANGE_OF_NORMAL_QUARTILES
    if not scale > 0:
        middle, scale = numbers.mean(), numbers.std()
    if not scale > 1e-12:
        return np.zeros(len(values), np.float32)
    return np.asarray(np.clip((numbers - middle) / scale, -CLIP, CLIP), np.float32)


# Rules without learning: each scores the candidates, float32 (N,), and the best are kept


def _all(problem: SelectionProblem, rng: np.random.Generator) -> Floats:
    """Score all alike; ``select`` keeps all of them, at an equal number of updates downstream."""
    return np.ones(len(problem), np.float32)


def _random(problem: SelectionProblem, rng: np.random.Generator) -> Floats:
    return rng.random(len(problem), np.float32)


def _random_per_origin(problem: SelectionProblem, rng: np.random.Generator) -> Floats:
    """Take as many from every origin: source, target and each file of unlabelled text."""
    names, arms = np.unique(origin_names(problem.pool), return_inverse=True)
    return in_shares(np.ones(len(names), np.float32), arms.astype(np.int64), problem.classes, rng)


def in_shares(shares: Floats, arms: Ints, classes: Ints, rng: np.random.Generator) -> Floats:
    """Score candidates at random, float32 (N,), so that the best-scored of each class hold the arms in given shares.

    Args:
        shares: float32 (A,), the proportions of the arms; where one is used up, the others go on in theirs.
        arms: int64 (N,), the arm of each candidate.
        classes: int64 (N,), the class that the teacher predicts.
        rng: Draws the order inside an arm.
    """
    cells = arms * (classes.max() + 1) + classes
    places = quantiles(rng.random(len(arms), np.float32), cells) * np.bincount(cells)[cells]
    return np.asarray(-places / np.maximum(shares, 1e-6)[arms], np.float32)


def _nearest(problem: SelectionProblem, rng: np.random.Generator) -> Floats:
    """Prefer candidates where the target's density is high."""
    return np.asarray(problem.pool.log_density, np.float32)


def _domain_ratio(problem: SelectionProblem, rng: np.random.Generator) -> Floats:
    """Draw in proportion to the target's density over theirs, by the domain classifier (Xie et al., NeurIPS 2023)."""
    # Importance resampling without replacement (arXiv 2302.03169), by Gumbel's noise.
    odds = special.logit(np.clip(problem.pool.domain_probability.astype(np.float64), 1e-6, 1 - 1e-6))
    return np.asarray(odds + rng.gumbel(size=len(odds)), np.float32)


def _confidence(problem: SelectionProblem, rng: np.random.Generator) -> Floats:
    """Prefer candidates of which the teacher is sure."""
    return np.asarray(problem.pool.teacher.probabilities().max(axis=1))


def _glitter(problem: SelectionProblem, rng: np.random.Generator) -> Floats:
    """Prefer candidates on which the student is furthest from the teacher (Kamalloo et al., Findings of ACL 2022)."""
    # Glitter (arXiv 2203.09391) keeps, in every step, those 2 of each text's 8 augmentations of the largest loss.
    # Our adaptation chooses from the whole pool once a round, at the keep rate of every other agent.
    student = special.softmax(problem.student_logits / np.float32(GLITTER_TEMPERATURE), axis=1)
    return kl_divergence(problem.pool.teacher.probabilities(GLITTER_TEMPERATURE), student)


def _llkd(problem: SelectionProblem, rng: np.random.Generator) -> Floats:
    """Prefer candidates of which the teacher is sure and the student is not (LLKD, arXiv 2411.08028)."""
    # LLKD has two thresholds in each class. Here both are the same quantile within the predicted class, which the keep
    # rate sets (our derivation); the choice is made once a round, and the paper's weights of the loss are left out.
    teacher, student = problem.pool.teacher.probabilities(), special.softmax(problem.student_logits, axis=1)
    return np.minimum(quantiles(teacher.max(axis=1), problem.classes), quantiles(entropy(student), problem.classes))


def _low_variance(problem: SelectionProblem, rng: np.random.Generator) -> Floats:
    """Prefer candidates that keep the teacher's mean probability steady (Wang et al., NeurIPS 2022)."""
    # Augmentation is better the smaller its standard deviation (arXiv 2012.02909). Over draws from the kept set that is
    # proportional to the spread of the kept outputs, so those nearest to the pool's mean come first (our derivation).
    teacher = problem.pool.teacher.probabilities()
    return np.asarray(-((teacher - teacher.mean(axis=0)) ** 2).sum(axis=1))


def _oracle(problem: SelectionProblem, rng: np.random.Generator) -> Floats:
    """Prefer unchanged candidates near a thousand texts of the target that no run has; for experiments."""
    if problem.oracle is None:
        raise UsageError("selector.agent: the rule 'oracle' needs spare texts of the target, and there are none here")
    return problem.oracle()


def ranks_within(values: Floats, groups: Ints) -> Doubles:
    """Rank values, float32 (N,), inside each group from 1, float64 (N,); of equal values the earlier comes first."""
    import pandas as pd  # here, since it takes a quarter of a second

    return np.asarray(pd.Series(values).groupby(groups).rank(method="first"), np.float64)


def quantiles(values: Floats, groups: Ints) -> Floats:
    """Rank values, float32 (N,), inside each group, as shares in (0, 1]; 1 marks a group's largest."""
    return np.asarray(ranks_within(values, groups) / np.bincount(groups)[groups], np.float32)


RULES: dict[str, Callable[[SelectionProblem, np.random.Generator], Floats]] = {
    "all": _all, "random": _random, "random_per_origin": _random_per_origin, "nearest": _nearest,
    "domain_ratio": _domain_ratio, "confidence": _confidence, "glitter": _glitter, "llkd": _llkd,
    "low_variance": _low_variance, "oracle": _oracle,
}  # fmt: skip
"""Each by its name on a card."""
