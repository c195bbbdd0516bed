"""The baselines: logistic regression on tf-idf, on the encoder's embeddings and on sums of token vectors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler

from l2a.data.examples import Examples, TextInput

SMALL = 200

EmbedTexts = Callable[[Sequence[str]], NDArray[np.float32]]
"""Embeds N strings as float32 (N, d)."""


@dataclass(frozen=True)
class TfidfFeatures:
    """Fitted tf-idf weights of words, word pairs, and character n-grams inside words.

    Attributes:
        words: 1- and 2-grams of words.
        characters: 2- to 5-grams of characters that do not cross a word's end.
    """

    words: TfidfVectorizer
    characters: TfidfVectorizer

    def __call__(self, inputs: Sequence[TextInput]) -> sparse.csr_matrix:
        """Compute the features of texts.

        Args:
            inputs: N texts, all single or all pairs.

        Returns:
            float32 (N, F), sparse; for pairs, the words of both sides, the words that they share, and their cosine
            similarities by words and by characters.
        """
        words, characters = self._blocks(self.words, inputs), self._blocks(self.characters, inputs)
        if len(words) == 1:
            return sparse.hstack([*words, *characters], format="csr")
        # What the sides share tells more than what they are, and all character n-grams of both would cost too much.
        shared = [first.multiply(second) for first, second in (words, characters)]
        cosines = [sparse.csr_matrix(block.sum(axis=1)) for block in shared]
        return sparse.hstack([*words, shared[0], *cosines], format="csr", dtype=np.float32)

    @staticmethod
    def _blocks(vectorizer: TfidfVectorizer, inputs: Sequence[TextInput]) -> list[sparse.csr_matrix]:
        return [vectorizer.transform([text[side] for text in inputs]) for side in range(len(inputs[0]))]


def fit_tfidf(inputs: Sequence[TextInput]) -> TfidfFeatures:
    """Collect the vocabulary and the document frequencies of texts, without their labels.

    Args:
        inputs: Training texts; above 200, n-grams that only one of them holds are dropped.

    Returns:
        The fitted features.
    """
    texts = [side for text in inputs for side in text]
    minimum = 2 if len(texts) > SMALL else 1
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=minimum, dtype=np.float32)
    characters = TfidfVectorizer(
        analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, min_df=minimum, dtype=np.float32
    )
    return TfidfFeatures(words.fit(texts), characters.fit(texts))


def pair_features(inputs: Sequence[TextInput], embed: EmbedTexts) -> NDArray[np.float32]:
    """Embed texts, joining the sides of a pair as [u; v; |u - v|; u * v] (Conneau et al., 2017).

    Args:
        inputs: N texts, all single or all pairs.
        embed: Embeds single strings.

    Returns:
        float32 (N, d) for single texts, (N, 4 d) for pairs.
    """
    first = embed([text[0] for text in inputs])
    if len(inputs[0]) == 1:
        return first
    second = embed([text[1] for text in inputs])
    return np.concatenate([first, second, np.abs(first - second), first * second], axis=1)


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


TFIDF_PENALTIES = (3.0, 10.0, 30.0, 100.0)
DENSE_PENALTIES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


@dataclass(frozen=True)
class FittedBaseline:
    """A trained baseline.

    Attributes:
        predict: Classifies N texts as int64 (N,), indices into the training examples' label names.
        parameters: Numbers that it stores to do so.
    """

    predict: Callable[[Sequence[TextInput]], NDArray[np.int64]]
    parameters: int


def tfidf_logreg(source: Examples, target: Examples, seed: int) -> FittedBaseline:
    """Fit logistic regression on tf-idf of words and character n-grams of both domains.

    The weight of the target's examples and the penalty are tuned by cross-validation on the target's labels.

    Args:
        source: Labelled source examples.
        target: All labelled target examples; none of the test split.
        seed: Order of the folds.

    Returns:
        The baseline; its parameters are the coefficients.
    """
    features = fit_tfidf((*source.inputs, *target.inputs))
    classifier = tuned_logistic_regression(
        LabelledFeatures(features(source.inputs), source.labels),
        LabelledFeatures(features(target.inputs), target.labels),
        TFIDF_PENALTIES,
        seed,
    )
    return _baseline(features, classifier)


def frozen_teacher_logreg(target: Examples, embed: EmbedTexts, encoder_parameters: int, seed: int) -> FittedBaseline:
    """Fit logistic regression on a frozen encoder's embeddings of the target's labelled examples.

    Args:
        target: All labelled target examples; none of the test split.
        embed: The encoder: N strings to float32 (N, d). The sides of a pair are embedded one by one.
        encoder_parameters: Size of the encoder, which is needed at prediction time.
        seed: Order of the folds.

    Returns:
        The baseline; its parameters are the encoder's and the coefficients.
    """
    return _dense_logreg(None, target, embed, encoder_parameters, seed)


def vector_sum_logreg(
    source: Examples,
    target: Examples,
    token_vectors: NDArray[np.float32],
    tokenizer: Any,
    seed: int,
    longest: int | None = None,
) -> FittedBaseline:
    """Fit logistic regression on the sum of token vectors: the teacher's vocabulary without its transformer.

    Args:
        source: Labelled source examples.
        target: All labelled target examples; none of the test split.
        token_vectors: float32 (V, d), one vector for each token of the tokenizer.
        tokenizer: A fast tokenizer of transformers.
        seed: Order of the folds.
        longest: Tokens read of each text, or side of a pair; None reads all.

    Returns:
        The baseline; its parameters are the whole table and the coefficients.
    """

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        vectors: NDArray[np.float32] = bag_of_tokens(tokenizer, texts, len(token_vectors), longest) @ token_vectors
        return vectors

    return _dense_logreg(source, target, embed, token_vectors.size, seed)


def _dense_logreg(
    source: Examples | None, target: Examples, embed: EmbedTexts, stored: int, seed: int
) -> FittedBaseline:
    """Fit on standardised embeddings; ``stored`` numbers are needed to embed."""
    sets = [examples for examples in (source, target) if examples is not None]
    raw = [pair_features(examples.inputs, embed) for examples in sets]
    scaler = StandardScaler().fit(np.concatenate(raw))
    fitted = [LabelledFeatures(scaler.transform(part), it.labels) for part, it in zip(raw, sets, strict=True)]
    classifier = tuned_logistic_regression(None if source is None else fitted[0], fitted[-1], DENSE_PENALTIES, seed)
    return _baseline(lambda inputs: scaler.transform(pair_features(inputs, embed)), classifier, stored)


def bag_of_tokens(
    tokenizer: Any, texts: Sequence[str], vocabulary: int, longest: int | None = None
) -> sparse.csr_matrix:
    """Count each text's tokens, without special ones.

    Args:
        tokenizer: A fast tokenizer of transformers.
        texts: N strings.
        vocabulary: V.
        longest: Tokens counted of each, the first ones; None counts all.

    Returns:
        float32 (N, V), sparse counts.
    """
    cut = {"truncation": longest is not None, "max_length": longest}
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False, **cut)["input_ids"]
    columns = np.array([token for row in ids for token in row], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])])
    counts = np.ones(len(columns), dtype=np.float32)
    return sparse.csr_matrix((counts, columns, offsets), shape=(len(ids), vocabulary))


def _baseline(
    features: Callable[[Sequence[TextInput]], Features], classifier: LogisticRegression, stored: int = 0
) -> FittedBaseline:
    """Join features and classifier; the coefficients count as parameters beside what the features store."""

    def predict(inputs: Sequence[TextInput]) -> NDArray[np.int64]:
        predictions: NDArray[np.int64] = classifier.predict(features(inputs))
        return predictions

    return FittedBaseline(predict, stored + int(classifier.coef_.size + classifier.intercept_.size))
