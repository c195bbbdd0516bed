"""What a policy sees of a candidate: domain-agnostic numbers, standardised on the pool (our derivation)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l2a.errors import RunError
from l2a.selector.numerics import Floats, entropy, kl_divergence, softmax
from l2a.selector.problem import SelectionProblem

OPERATOR_PREFIX = "operator="
CLIP = 5.0
RANGE_OF_NORMAL_QUARTILES = 1.349


@dataclass(frozen=True)
class CandidateFeatures:
    """Features of N candidates that do not depend on what was selected so far.

    Attributes:
        matrix: float32 (N, F), standardised on the pool and clipped to [-5, 5]; operator columns are 0 or 1.
        names: F column names; a saved policy finds its columns by them.
    """

    matrix: Floats
    names: tuple[str, ...]


def candidate_features(problem: SelectionProblem, names: tuple[str, ...] | None = None) -> CandidateFeatures:
    """Describe every candidate of a pool.

    Args:
        problem: The pool, the teacher's and the student's view of it.
        names: Columns wanted, such as those of a saved policy: operators that this pool lacks become zeros and those
            that the policy does not know are left out. None for all columns of this pool.

    Returns:
        The features in the order of ``names``.

    Raises:
        RunError: If a policy wants a column that is not measured, as one of another version may.
    """
    columns = {name: _standardise(values) for name, values in measurements(problem).items()}
    columns |= _operator_columns(problem.pool.operators)
    wanted = tuple(columns) if names is None else names
    unknown = [name for name in wanted if name not in columns and not name.startswith(OPERATOR_PREFIX)]
    if unknown:
        raise RunError(f"policy: it reads {', '.join(unknown)}, which are not measured here; train it again")
    absent = np.zeros(len(problem), np.float32)
    matrix = np.stack([columns.get(name, absent) for name in wanted], axis=1)
    return CandidateFeatures(np.ascontiguousarray(matrix, np.float32), wanted)


def measurements(problem: SelectionProblem) -> dict[str, Floats]:
    """Measure every candidate of a pool, before any standardisation.

    Args:
        problem: The pool, the teacher's and the student's view of it.

    Returns:
        float32 (N,) by name; operators apart.
    """
    pool = problem.pool
    teacher, student = pool.teacher.probabilities(), softmax(problem.student_logits)
    predicted = teacher.argmax(axis=1)
    best_two = np.sort(teacher, axis=1)[:, -2:]
    class_shares = np.bincount(predicted, minlength=teacher.shape[1]) / len(predicted)
    return {
        "teacher_entropy": entropy(teacher),
        "teacher_margin": best_two[:, 1] - best_two[:, 0],
        "student_entropy": entropy(student),
        "teacher_student_kl": np.log1p(kl_divergence(teacher, student)),
        "agreement": (predicted == student.argmax(axis=1)).astype(np.float32),
        "log_density": pool.log_density,
        "domain_probability": pool.domain_probability,
        "max_target_cosine": pool.max_target_cosine,
        "degree": pool.degrees,
        "log_length": np.log1p([sum(len(part.split()) for part in text) for text in pool.inputs]),
        "class_share_of_pool": class_shares[predicted],
    }


def _operator_columns(operators: tuple[str, ...]) -> dict[str, Floats]:
    values: NDArray[np.str_] = np.array(operators)
    return {f"{OPERATOR_PREFIX}{name}": (values == name).astype(np.float32) for name in sorted(set(operators))}


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
    standardised: Floats = np.clip((numbers - middle) / scale, -CLIP, CLIP).astype(np.float32)
    return standardised
