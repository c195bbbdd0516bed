"""Selection rules without learning: each scores the N candidates of a pool, float32 (N,), and the best are kept."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from scipy.stats import rankdata

from l2a.selector.problem import Floats, SelectionProblem, entropy, kl_divergence

GLITTER_TEMPERATURE = 5.0

Rule = Callable[[SelectionProblem, np.random.Generator], Floats]


def _all(problem: SelectionProblem, rng: np.random.Generator) -> Floats:
    """Score all alike; ``select`` keeps all of them, at an equal number of updates downstream."""
    return np.ones(len(problem), np.float32)


def _random(problem: SelectionProblem, rng: np.random.Generator) -> Floats:
    return rng.random(len(problem), np.float32)


def _nearest(problem: SelectionProblem, rng: np.random.Generator) -> Floats:
    """Prefer candidates where the target's density is high."""
    return np.asarray(problem.pool.log_density, np.float32)


def _confidence(problem: SelectionProblem, rng: np.random.Generator) -> Floats:
    """Prefer candidates of which the teacher is sure."""
    largest: Floats = problem.pool.teacher.probabilities().max(axis=1)
    return largest


def _glitter(problem: SelectionProblem, rng: np.random.Generator) -> Floats:
    """Prefer candidates on which the student is furthest from the teacher.

    Glitter (Kamalloo et al., Findings of ACL 2022, arXiv 2203.09391) keeps the augmentations with the largest loss,
    here the temperature-scaled KL(p_T || p_S), 2 of 8 in the paper, and scores them again in training, as the card's
    ``rescore_every`` does. The paper chooses among each text's own augmentations, this rule from the whole pool at the
    keep rate of every other agent (our adaptation).
    """
    student = softmax(problem.student_logits / np.float32(GLITTER_TEMPERATURE), axis=1)
    return kl_divergence(problem.pool.teacher.probabilities(GLITTER_TEMPERATURE), student)


def _llkd(problem: SelectionProblem, rng: np.random.Generator) -> Floats:
    """Prefer candidates of which the teacher is sure and the student is not.

    LLKD (arXiv 2411.08028) keeps what passes two thresholds of its class, one on the teacher's confidence and one on
    the student's uncertainty. Here both thresholds are the same quantile within the class that the teacher predicts,
    and the keep rate sets that quantile (our derivation): the score is the smaller of the two quantiles. Its card
    scores again as the student learns; the paper's weights of the loss are left out.
    """
    teacher, student = problem.pool.teacher.probabilities(), softmax(problem.student_logits, axis=1)
    return np.minimum(quantiles(teacher.max(axis=1), problem.classes), quantiles(entropy(student), problem.classes))


def _low_variance(problem: SelectionProblem, rng: np.random.Generator) -> Floats:
    """Prefer candidates that keep the teacher's mean probability steady.

    Wang et al. (NeurIPS 2022, arXiv 2012.02909) state that augmentation is better the smaller the standard deviation
    of the teacher's mean probability. Over draws from the kept set that is proportional to the spread of the kept
    outputs, so those nearest to the pool's mean are preferred (our derivation).
    """
    teacher = problem.pool.teacher.probabilities()
    distances: Floats = ((teacher - teacher.mean(axis=0)) ** 2).sum(axis=1)
    return -distances


def quantiles(values: Floats, groups: NDArray[np.int64]) -> Floats:
    """Rank values, float32 (N,), inside each group, as shares in (0, 1]; 1 marks a group's largest."""
    ranks = np.empty(len(values), np.float32)
    for group in np.unique(groups):
        members = groups == group
        ranks[members] = rankdata(values[members], "ordinal") / members.sum()
    return ranks


RULES: dict[str, Rule] = {
    "all": _all,
    "random": _random,
    "nearest": _nearest,
    "confidence": _confidence,
    "glitter": _glitter,
    "llkd": _llkd,
    "low_variance": _low_variance,
}
