"""Cheap classifiers that a distilled student has to beat, tuned with the same labels and the same care."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from l2a.evaluation.features import EmbedTexts, fit_tfidf, pair_features
from l2a.evaluation.tuning import Features, LabelledFeatures, tuned_logistic_regression
from l2a.examples import Examples, TextInput

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
    return FittedBaseline(_predictor(features, classifier), _coefficients(classifier))


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
    raw = pair_features(target.inputs, embed)
    scaler = StandardScaler().fit(raw)
    labelled = LabelledFeatures(scaler.transform(raw), target.labels)
    classifier = tuned_logistic_regression(None, labelled, DENSE_PENALTIES, seed)

    def features(inputs: Sequence[TextInput]) -> Features:
        scaled: NDArray[np.float32] = scaler.transform(pair_features(inputs, embed))
        return scaled

    return FittedBaseline(_predictor(features, classifier), encoder_parameters + _coefficients(classifier))


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

    raw_source, raw_target = pair_features(source.inputs, embed), pair_features(target.inputs, embed)
    scaler = StandardScaler().fit(np.concatenate([raw_source, raw_target]))
    classifier = tuned_logistic_regression(
        LabelledFeatures(scaler.transform(raw_source), source.labels),
        LabelledFeatures(scaler.transform(raw_target), target.labels),
        DENSE_PENALTIES,
        seed,
    )

    def features(inputs: Sequence[TextInput]) -> Features:
        scaled: NDArray[np.float32] = scaler.transform(pair_features(inputs, embed))
        return scaled

    return FittedBaseline(_predictor(features, classifier), token_vectors.size + _coefficients(classifier))


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


def _predictor(
    features: Callable[[Sequence[TextInput]], Features], classifier: LogisticRegression
) -> Callable[[Sequence[TextInput]], NDArray[np.int64]]:
    def predict(inputs: Sequence[TextInput]) -> NDArray[np.int64]:
        predictions: NDArray[np.int64] = classifier.predict(features(inputs))
        return predictions

    return predict


def _coefficients(classifier: LogisticRegression) -> int:
    return int(classifier.coef_.size + classifier.intercept_.size)
