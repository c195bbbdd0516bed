import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from l2a.data.examples import Examples
from l2a.pipeline import methods
from tests.conftest import LABELS, make_examples

SOURCE, TARGET, TEST = make_examples(80, 1), make_examples(30, 2), make_examples(60, 3)


@pytest.fixture(scope="module")
def vectors(tokenizer):
    return np.random.default_rng(0).normal(size=(len(tokenizer), 24)).astype(np.float32)


@pytest.fixture(scope="module")
def fit(tokenizer, vectors):
    """Every baseline by name: from source and target to the fitted baseline."""

    def embed(texts):
        return np.asarray(methods.bag_of_tokens(tokenizer, texts, len(vectors)) @ vectors, np.float32)

    return {
        "tfidf": lambda source, target: methods.tfidf_logreg(source, target, 0),
        "frozen_teacher": lambda source, _: methods.frozen_teacher_logreg(source, embed, 1000, 0),
        "vector_sum": lambda *sets: methods.vector_sum_logreg(*sets, vectors, tokenizer, 0),
    }


@pytest.fixture(scope="module")
def fitted(fit):
    """Each of them, fitted on single texts."""
    return {name: train(SOURCE, TARGET) for name, train in fit.items()}


def accuracy(baseline, examples):
    return float((baseline.predict(examples.inputs) == examples.labels).mean())


@pytest.mark.parametrize("name", ["tfidf", "frozen_teacher", "vector_sum"])
def test_every_baseline_learns_what_one_word_decides_and_repeats_it(fit, fitted, name):
    source, target, test = (make_examples(n, seed, pairs=True) for n, seed in ((60, 1), (30, 2), (40, 3)))
    assert accuracy(fitted[name], TEST) > 0.9
    assert accuracy(fit[name](source, target), test) > 0.9
    found, again = (each.predict(TEST.inputs) for each in (fitted[name], fit[name](SOURCE, TARGET)))
    assert np.array_equal(found, again) and found.dtype == np.int64


def test_parameters_count_what_prediction_needs(fitted, vectors):
    width = methods.fit_tfidf((*SOURCE.inputs, *TARGET.inputs))(TARGET.inputs).shape[1]
    stored = {"tfidf": 0, "frozen_teacher": 1000, "vector_sum": vectors.size}
    expected = {name: stored[name] + (width if name == "tfidf" else 24) + 1 for name in fitted}
    assert {name: each.parameters for name, each in fitted.items()} == expected


def test_labels_of_the_target_outweigh_a_source_that_contradicts_them(fit):
    contradicting = Examples(SOURCE.inputs, 1 - SOURCE.labels, LABELS)
    assert accuracy(fit["tfidf"](contradicting, make_examples(60, 2)), TEST) > 0.9


def test_a_source_of_the_same_law_is_used():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(816, 40)).astype(np.float32)
    labels = (features @ rng.normal(size=40) > 0).astype(np.int64)
    scores = []
    for start in (0, 400):  # with the source, and without it
        rows = slice(start, 416)
        penalties = methods.DENSE_PENALTIES
        fitted = methods.tuned_logistic_regression(features[rows], labels[rows], 400 - start, penalties, 0)
        scores.append(fitted.score(features[416:], labels[416:]))
    assert scores[0] > 0.9 > scores[1]


def test_folds_hold_out_each_target_example_once_and_nothing_else(fit, monkeypatch):
    judged, original = [], LogisticRegression.predict_proba

    def spy(classifier, features):
        judged.append(features.shape[0])
        return original(classifier, features)

    monkeypatch.setattr(LogisticRegression, "predict_proba", spy)
    fit["tfidf"](SOURCE, TARGET)
    assert sum(judged) == len(TARGET) * (5 + 4)  # shares of the target, then penalties


@pytest.mark.parametrize("copies", [1, 2])
def test_one_or_two_labels_per_class_are_enough(fit, copies):
    target = Examples((("good film",), ("bad film",)) * copies, np.array([1, 0] * copies), LABELS)
    assert accuracy(fit["tfidf"](SOURCE, target), target) == 1.0


def test_three_classes(fit, vectors):
    words, rng = ("good", "bad", "phone"), np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    inputs = tuple((f"the {words[label]} {rng.choice(['story', 'battery', 'film'])}",) for label in labels)
    examples = Examples(inputs, labels.astype(np.int64), words)
    source, target, test = (examples.take(np.arange(start, start + 30)) for start in (0, 30, 60))
    assert accuracy(fit["tfidf"](source, target), test) == 1.0
    baseline = fit["vector_sum"](source, target)
    assert accuracy(baseline, test) > 0.9
    assert baseline.parameters == vectors.size + 3 * 24 + 3


def test_a_bag_counts_all_tokens_but_special_ones(tokenizer):
    tokenizer(["good"], truncation=True, max_length=2)  # as an earlier caller may have left it
    texts = ["good good film", "bad story", ""]
    counts = methods.bag_of_tokens(tokenizer, texts, len(tokenizer)).toarray()
    assert counts[0, tokenizer.convert_tokens_to_ids(["good", "film"])].tolist() == [2, 1]
    assert counts[[0, 2]].sum(axis=1).tolist() == [3, 0]


def test_sides_of_a_pair_are_embedded_apart():
    features = methods.pair_features(
        [("abc", "abcd"), ("a", "a")], lambda texts: np.array([[len(text), 1.0] for text in texts], np.float32)
    )
    assert features.tolist() == [[3, 1, 4, 1, 1, 0, 12, 1], [1, 1, 1, 1, 0, 0, 1, 1]]


def test_pair_features_tell_shared_words_from_different_ones():
    pairs = (("good film", "good film"), ("good film", "bad story"), ("bad story", "good film"))
    cosines = methods.fit_tfidf(pairs)(pairs).toarray()[:, -2:]
    assert cosines[0] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert (cosines[1:] < 0.2).all()


@pytest.mark.parametrize("name", ["tfidf", "vector_sum"])
def test_unusual_texts_are_classified(fitted, name):
    texts = [("",), ("   ",), ("\u2603",), ("x" * 20_000,)]
    assert set(fitted[name].predict(texts).tolist()) <= {0, 1}
