"""Selection rules without learning: each scores every candidate, and the best-scored share of each class is kept."""

from collections.abc import Callable

import numpy as np

from l2a.selector.numerics import Floats, entropy, kl_divergence, ranks_within, softmax
from l2a.selector.problem import SelectionProblem

GLITTER_TEMPERATURE = 5.0

Rule = Callable[[SelectionProblem, np.random.Generator], Floats]


def all_candidates(problem: SelectionProblem, rng: np.random.Generator) -> Floats:
    """Give every candidate the same score; ``select`` keeps all of them, at an equal number of updates downstream.

    Args:
        problem: The pool.
        rng: Not used.

    Returns:
        float32 (N,), ones.
    """
    return np.ones(len(problem), np.float32)


def random_candidates(problem: SelectionProblem, rng: np.random.Generator) -> Floats:
    """Draw scores at random.

    Args:
        problem: The pool.
        rng: The source of randomness.

    Returns:
        float32 (N,), uniform in [0, 1).
    """
    return rng.random(len(problem), np.float32)


def nearest(problem: SelectionProblem, rng: np.random.Generator) -> Floats:
    """Prefer candidates where the target's density is high.

    Args:
        problem: The pool.
        rng: Not used.

    Returns:
        float32 (N,), log q_t.
    """
    return np.asarray(problem.pool.log_density, np.float32)


def confidence(problem: SelectionProblem, rng: np.random.Generator) -> Floats:
    """Prefer candidates of which the teacher is sure.

    Args:
        problem: The pool.
        rng: Not used.

    Returns:
        float32 (N,), the teacher's largest class probability.
    """
    largest: Floats = problem.pool.teacher.probabilities().max(axis=1)
    return largest


def glitter(problem: SelectionProblem, rng: np.random.Generator) -> Floats:
    """Prefer candidates on which the student is furthest from the teacher.

    Glitter (Kamalloo et al., Findings of ACL 2022, arXiv 2203.09391) keeps the augmentations with the largest loss,
    here the temperature-scaled KL(p_T || p_S), 2 of 8 in the paper, and scores them anew during training, as the card's
    ``rescore_every`` does. The paper chooses among each text's own augmentations, this rule from the whole pool at the
    keep rate of every other agent (our adaptation).

    Args:
        problem: The pool and the student's logits.
        rng: Not used.

    Returns:
        float32 (N,), nats.
    """
    student = softmax(problem.student_logits / np.float32(GLITTER_TEMPERATURE))
    return kl_divergence(problem.pool.teacher.probabilities(GLITTER_TEMPERATURE), student)


def llkd(problem: SelectionProblem, rng: np.random.Generator) -> Floats:
    """Prefer candidates of which the teacher is sure and the student is not.

    LLKD (arXiv 2411.08028) keeps what passes two thresholds of its class, one on the teacher's confidence and one on
    the student's uncertainty. Here both thresholds are the same quantile within the class that the teacher predicts,
    and the keep rate sets that quantile (our derivation): the score is the smaller of the two quantiles. Its card
    scores anew as the student learns; the paper's weights of the loss are left out.

    Args:
        problem: The pool and the student's logits.
        rng: Not used.

    Returns:
        float32 (N,), in (0, 1].
    """
    teacher = problem.pool.teacher.probabilities()
    classes = teacher.argmax(axis=1).astype(np.int64)
    unsure = entropy(softmax(problem.student_logits))
    return np.minimum(ranks_within(teacher.max(axis=1), classes), ranks_within(unsure, classes))


def low_variance(problem: SelectionProblem, rng: np.random.Generator) -> Floats:
    """Prefer candidates that keep the teacher's mean probability steady.

    Wang et al. (NeurIPS 2022, arXiv 2012.02909) state that augmentation is better the smaller the standard deviation
    of the teacher's mean probability. Over draws from the kept set that is proportional to the spread of the kept
    outputs, so those nearest to the pool's mean are preferred (our derivation).

    Args:
        problem: The pool.
        rng: Not used.

    Returns:
        float32 (N,), minus the squared distance to the mean output.
    """
    teacher = problem.pool.teacher.probabilities()
    distances: Floats = ((teacher - teacher.mean(axis=0)) ** 2).sum(axis=1)
    return -distances


RULES: dict[str, Rule] = {
    "all": all_candidates,
    "random": random_candidates,
    "nearest": nearest,
    "confidence": confidence,
    "glitter": glitter,
    "llkd": llkd,
    "low_variance": low_variance,
}
