"""The baselines: logistic regression on tf-idf, on the encoder's embeddings and on sums of token vectors."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn import model_selection, pipeline, preprocessing
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from l2a.data.examples import Examples, TextInput

Floats: TypeAlias = NDArray[np.float32]
Ints: TypeAlias = NDArray[np.int64]
EmbedTexts = Callable[[Sequence[str]], Floats]
"""Embeds N strings as float32 (N, d)."""
DENSE_PENALTIES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def fit_tfidf(inputs: Sequence[TextInput]) -> Callable[[Sequence[TextInput]], sparse.csr_matrix]:
    """Weigh words, word pairs and character n-grams inside words by training texts; of over 200, those in two or more.

    Returns:
        Features of N texts, float32 (N, F), sparse; for pairs, the words of both sides, the words that they share, and
        their cosine similarities by words and by characters.
    """
    texts = [side for text in inputs for side in text]
    how = {"sublinear_tf": True, "min_df": 2 if len(texts) > 200 else 1, "dtype": np.float32}
    by_word = TfidfVectorizer(ngram_range=(1, 2), **how).fit(texts)
    by_character = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), **how).fit(texts)

    def features(inputs: Sequence[TextInput]) -> sparse.csr_matrix:
        sides = list(zip(*inputs, strict=True))
        words, characters = ([each.transform(side) for side in sides] for each in (by_word, by_character))
        if len(sides) == 1:
            return sparse.hstack([*words, *characters], format="csr")
        # What the sides share tells more than what they are, and all character n-grams of both would cost too much.
        shared = [first.multiply(second) for first, second in (words, characters)]
        cosines = [sparse.csr_matrix(block.sum(axis=1)) for block in shared]
        return sparse.hstack([*words, shared[0], *cosines], format="csr", dtype=np.float32)

    return features


def pair_features(inputs: Sequence[TextInput], embed: EmbedTexts) -> Floats:
    """Embed N texts as float32 (N, d), or pairs (u, v) as [u; v; |u - v|; u * v], (N, 4 d) (Conneau et al., 2017)."""
    first, *second = (embed(list(side)) for side in zip(*inputs, strict=True))
    return np.concatenate([first, *(part for v in second for part in (v, np.abs(first - v), first * v))], axis=1)


def tuned_logistic_regression(
    features: Any, labels: Ints, source_size: int, penalties: tuple[float, ...], seed: int
) -> LogisticRegression:
    """Choose the weight of the target and then the penalty by the target's held-out log-likelihood, and fit on all.

    Args:
        features: float32 (N, F), dense or sparse: first the source, then the target, the only one that is held out.
        labels: int64 (N,), the classes.
        source_size: Rows of the source; 0 uses the target alone.
        penalties: Values of C to try, for a total weight of 1000; the middle one is used while the weight is chosen.
        seed: Order of the folds.
    """
    source, target = np.split(np.arange(len(labels)), [source_size])
    few = np.sort(np.random.default_rng(seed).permutation(source_size)[:2000])  # enough: weights are relative
    shares = (0.1, 0.3, 0.6, 0.9, 1.0) if source_size else (1.0,)
    share, penalty = shares[len(shares) // 2], penalties[(len(penalties) - 1) // 2]

    def fit(classifier: LogisticRegression, source: Ints, target: Ints, share: float, penalty: float) -> Any:
        rows = target if share == 1.0 else np.concatenate([source, target])
        weights = np.full(len(rows), share * 1000.0 / len(target), np.float32)
        weights[: -len(target)] = (1.0 - share) * 1000.0 / max(1, len(source))
        return classifier.set_params(C=penalty).fit(features[rows], labels[rows], sample_weight=weights)

    def best(settings: list[tuple[float, float]]) -> tuple[float, float]:
        losses = np.zeros(len(settings))
        for train, held_out in folds.split(target, labels[target]):
            classifier, judged = _new_classifier(), target[held_out]  # warm: a fit starts from the one before
            for number, setting in enumerate(settings):
                probabilities = fit(classifier, few, target[train], *setting).predict_proba(features[judged])
                right = probabilities[labels[judged, None] == classifier.classes_]
                losses[number] -= np.log(np.maximum(right, 1e-12)).sum()
        return settings[int(losses.argmin())]

    rarest = int(np.unique(labels[target], return_counts=True)[1].min())
    if rarest > 1:  # else nothing can be held out
        folds = model_selection.StratifiedKFold(min(5, rarest), shuffle=True, random_state=seed)
        share, _ = best([(share, penalty) for share in shares])
        share, penalty = best([(share, penalty) for penalty in penalties])
    return fit(_new_classifier(), source, target, share, penalty)


def _new_classifier() -> LogisticRegression:
    # Newton-CG needs a handful of passes where L-BFGS needs dozens, on sparse and on dense features.
    return LogisticRegression(solver="newton-cg", tol=3e-4, max_iter=100, warm_start=True)


class FittedBaseline(NamedTuple):
    """A trained baseline: it classifies N texts as int64 (N,) by so many stored numbers."""

    predict: Callable[[Sequence[TextInput]], Ints]
    parameters: int


def _fitted(
    source: Examples | None, target: Examples, features: Any, penalties: tuple[float, ...], stored: int, seed: int
) -> FittedBaseline:
    """Fit on what a transformer of scikit-learn makes of texts; ``stored`` numbers are needed for that."""
    parts = [part for part in (source, target) if part is not None]
    rows = features.fit_transform([text for part in parts for text in part.inputs])
    labels = np.concatenate([part.labels for part in parts])
    classifier = tuned_logistic_regression(rows, labels, len(labels) - len(target), penalties, seed)
    parameters = stored + int(classifier.coef_.size + classifier.intercept_.size)
    return FittedBaseline(lambda inputs: classifier.predict(features.transform(inputs)), parameters)


def tfidf_logreg(source: Examples, target: Examples, seed: int) -> FittedBaseline:
    """Fit logistic regression on tf-idf of words and character n-grams; its parameters are the coefficients.

    The target, here and below, is all labelled examples but the test split; weight and penalty are tuned on it, in
    folds whose order the seed decides.
    """
    features = preprocessing.FunctionTransformer(fit_tfidf((*source.inputs, *target.inputs)))
    return _fitted(source, target, features, (3.0, 10.0, 30.0, 100.0), 0, seed)


def frozen_teacher_logreg(target: Examples, embed: EmbedTexts, encoder_parameters: int, seed: int) -> FittedBaseline:
    """Fit logistic regression on a frozen encoder's embeddings; its parameters are the encoder's and the coefficients.

    The sides of a pair are embedded one by one.
    """
    return _fitted(None, target, _standardised(embed), DENSE_PENALTIES, encoder_parameters, seed)


def vector_sum_logreg(
    source: Examples, target: Examples, token_vectors: Floats, tokenizer: Any, seed: int, longest: int | None = None
) -> FittedBaseline:
    """Fit logistic regression on sums of token vectors; its parameters are the whole table and the coefficients.

    Args:
        source: Labelled source examples.
        target: All labelled target examples but the test split.
        token_vectors: float32 (V, d), one vector for each token of the tokenizer.
        tokenizer: A fast tokenizer of transformers.
        seed: Order of the folds.
        longest: Tokens read of each text, or side of a pair; None reads all.
    """

    def embed(texts: Sequence[str]) -> Any:
        return bag_of_tokens(tokenizer, texts, len(token_vectors), longest) @ token_vectors

    return _fitted(source, target, _standardised(embed), DENSE_PENALTIES, token_vectors.size, seed)


def _standardised(embed: EmbedTexts) -> Any:
    features = preprocessing.FunctionTransformer(pair_features, kw_args={"embed": embed})
    return pipeline.make_pipeline(features, preprocessing.StandardScaler())


def bag_of_tokens(
    tokenizer: Any, texts: Sequence[str], vocabulary: int, longest: int | None = None
) -> sparse.csr_matrix:
    """Count the tokens of N texts, of each the first ``longest`` or all, none special, as float32 (N, V), sparse."""
    cut = {"truncation": longest is not None, "max_length": longest}
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False, **cut)["input_ids"]
    offsets = np.cumsum([0, *map(len, ids)])
    columns = np.array([token for row in ids for token in row], dtype=np.int64)
    return sparse.csr_matrix((np.ones(len(columns), np.float32), columns, offsets), shape=(len(ids), vocabulary))
