"""Cross-fitted soft labels: each source text is labelled by a teacher that was not trained on it.

A teacher is nearly certain of the sentences that it was trained on, so its soft labels say little more than the hard
ones; held-out sentences keep the doubt that a student learns from. Source: Dao et al. (2021), "Knowledge distillation
as semiparametric inference", arXiv 2104.09732.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from l2a.data.examples import Examples, TextInput, normalised_hash
from l2a.teacher.store import Labeller, TeacherOutputs
from l2a.util.errors import UsageError


def assign_folds(examples: Examples, folds: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Split examples into folds of almost equal size and balance of classes; copies of a text share a fold.

    Args:
        examples: N labelled texts.
        folds: K.
        rng: Draws the folds.

    Returns:
        int64 (N,), 0 to K - 1.

    Raises:
        UsageError: If K is below 2 or above the number of different texts.
    """
    hashes = np.array([normalised_hash(text) for text in examples.inputs])
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    if not 2 <= folds <= len(first):
        raise UsageError(
            f"kd.folds: {folds} came for {len(first)} different source texts; from 2 to that number is allowed, "
            "2 is usual"
        )
    shuffled = rng.permutation(len(first))
    by_class = shuffled[np.argsort(examples.labels[first][shuffled], kind="stable")]
    fold_of_group = np.empty(len(first), np.int64)
    fold_of_group[by_class] = np.arange(len(first)) % folds
    return fold_of_group[group]


def cross_fitted_labeller(
    source: Examples, main: Labeller, train: Callable[[Examples], Labeller], folds: int, rng: np.random.Generator
) -> Labeller:
    """Label source texts by teachers that did not see them, and every other text by the main teacher.

    Only the logits are cross-fitted. Embeddings always come from the main teacher, because those of two teachers do
    not lie in one space; so source texts are read by two teachers. Each fold's teacher is trained when it is first
    asked.

    Args:
        source: What the main teacher was trained on in its source stage.
        main: The main teacher's labels.
        train: Fine-tunes a teacher on the source examples it is given, then on the target's shots, as the main teacher
            was, and gives its labels.
        folds: K, at least 2.
        rng: Draws the folds.

    Returns:
        A labeller; a text that equals a source text up to case and spacing counts as that text.

    Raises:
        UsageError: If K is below 2 or above the number of different source texts.
    """
    fold_of = assign_folds(source, folds, rng)
    known = {normalised_hash(text): int(fold) for text, fold in zip(source.inputs, fold_of, strict=True)}

    @cache
    def labeller_of(fold: int) -> Labeller:
        return train(source.take(np.flatnonzero(fold_of != fold)))

    def label(inputs: Sequence[TextInput]) -> TeacherOutputs:
        outputs = main(inputs)
        places = np.array([known.get(normalised_hash(text), -1) for text in inputs], np.int64)
        logits = outputs.logits.copy()
        for fold in np.unique(places[places >= 0]):
            rows = np.flatnonzero(places == fold)
            logits[rows] = labeller_of(int(fold))([inputs[int(row)] for row in rows]).logits
        return replace(outputs, logits=logits)

    return label
