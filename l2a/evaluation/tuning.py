"""Logistic regression on source and target labels, tuned by cross-validation on the target's labels alone."""

from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

Features: TypeAlias = NDArray[np.float32] | sparse.csr_matrix
"""A float32 matrix (N, F), dense or sparse."""

FOLDS = 5
TOTAL_WEIGHT = 1000.0
SOURCE_SAMPLE = 2000
TARGET_SHARES = (0.1, 0.3, 0.6, 0.9, 1.0)


@dataclass(frozen=True)
class LabelledFeatures:
    """Features with their labels.

    Attributes:
        features: float32 (N, F), dense or sparse.
        labels: int64 (N,).
    """

    features: Features
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Setting:
    """What is tuned.

    Attributes:
        penalty: Inverse strength of the L2 penalty (scikit-learn's C), for a total example weight of 1000.
        target_share: Part of the total weight that the target's examples carry together; 1 ignores the source.
    """

    penalty: float
    target_share: float


def tuned_logistic_regression(
    source: LabelledFeatures | None, target: LabelledFeatures, penalties: tuple[float, ...], seed: int
) -> LogisticRegression:
    """Choose the weight of the target and then the penalty by the target's held-out log-likelihood, and fit on all.

    Log-likelihood rather than accuracy, which is too coarse on some tens of examples.

    Args:
        source: Labelled source features, or None to use the target alone.
        target: Labelled target features; the only ones that the folds hold out.
        penalties: Values of C to try; the middle one is used while the share is chosen.
        seed: Order of the folds.

    Returns:
        The classifier fitted on the source and on all target examples.
    """
    middle = penalties[(len(penalties) - 1) // 2]
    shares = TARGET_SHARES if source is not None else (1.0,)
    chosen = Setting(middle, shares[len(shares) // 2])
    folds = _folds(target.labels, seed)
    if folds:
        sample = None if source is None else _subsample(source, seed)
        chosen = _best(sample, target, folds, [Setting(middle, share) for share in shares])
        chosen = _best(sample, target, folds, [replace(chosen, penalty=penalty) for penalty in penalties])
    return _fit(source, target, chosen, _new_classifier())


def _subsample(source: LabelledFeatures, seed: int) -> LabelledFeatures:
    """Keep tuning quick on a rich source: weights are relative, so that the setting carries over to all of it."""
    order = np.random.default_rng(seed).permutation(len(source.labels))
    return _take(source, np.sort(order[:SOURCE_SAMPLE]))


def _folds(labels: NDArray[np.int64], seed: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Cut the target's examples; empty when a class has a single one, as nothing can be held out then."""
    rarest = int(np.unique(labels, return_counts=True)[1].min())
    if rarest < 2:
        return []
    splitter = StratifiedKFold(min(FOLDS, rarest), shuffle=True, random_state=seed)
    return list(splitter.split(np.zeros(len(labels)), labels))


def _best(
    source: LabelledFeatures | None,
    target: LabelledFeatures,
    folds: list[tuple[NDArray[np.int64], NDArray[np.int64]]],
    settings: list[Setting],
) -> Setting:
    losses = np.zeros(len(settings))
    for train, held_out in folds:
        classifier = _new_classifier()  # warm: each setting starts from the solution of the one before
        fitting, judging = _take(target, train), _take(target, held_out)
        for position, setting in enumerate(settings):
            losses[position] += _negative_log_likelihood(_fit(source, fitting, setting, classifier), judging)
    return settings[int(losses.argmin())]


def _new_classifier() -> LogisticRegression:
    # Newton-CG needs a handful of passes where L-BFGS needs dozens, on sparse and on dense features.
    return LogisticRegression(solver="newton-cg", tol=3e-4, max_iter=100, warm_start=True)


def _fit(
    source: LabelledFeatures | None, target: LabelledFeatures, setting: Setting, classifier: LogisticRegression
) -> LogisticRegression:
    classifier.set_params(C=setting.penalty)
    size = len(target.labels)
    weights = np.full(size, setting.target_share * TOTAL_WEIGHT / size, dtype=np.float32)
    if source is None or setting.target_share == 1.0:
        return classifier.fit(target.features, target.labels, sample_weight=weights)
    size = len(source.labels)
    source_weights = np.full(size, (1.0 - setting.target_share) * TOTAL_WEIGHT / size, dtype=np.float32)
    features = _stack(source.features, target.features)
    labels = np.concatenate([source.labels, target.labels])
    return classifier.fit(features, labels, sample_weight=np.concatenate([source_weights, weights]))


def _stack(first: Features, second: Features) -> Features:
    if sparse.issparse(first):
        return sparse.vstack([first, second], format="csr")
    return np.concatenate([first, second])


def _take(examples: LabelledFeatures, indices: NDArray[np.int64]) -> LabelledFeatures:
    return LabelledFeatures(examples.features[indices], examples.labels[indices])


def _negative_log_likelihood(classifier: LogisticRegression, examples: LabelledFeatures) -> float:
    probabilities = classifier.predict_proba(examples.features)
    columns = np.searchsorted(classifier.classes_, examples.labels)
    right = probabilities[np.arange(len(columns)), columns]
    return float(-np.log(np.maximum(right, 1e-12)).sum())
