from dataclasses import replace

import numpy as np
import pytest

from l2a.data.examples import Examples
from l2a.evaluation import baselines
from l2a.evaluation.baselines import (
    LabelledFeatures,
    bag_of_tokens,
    fit_tfidf,
    frozen_teacher_logreg,
    pair_features,
    tfidf_logreg,
    tuned_logistic_regression,
    vector_sum_logreg,
)
from tests.conftest import LABELS, make_examples


@pytest.fixture
def token_vectors(tokenizer):
    return np.random.default_rng(0).normal(size=(len(tokenizer), 24)).astype(np.float32)


def bag_embedder(tokenizer, vectors):
    return lambda texts: np.asarray(bag_of_tokens(tokenizer, texts, len(vectors)) @ vectors, dtype=np.float32)


def accuracy(baseline, examples):
    return float((baseline.predict(examples.inputs) == examples.labels).mean())


@pytest.mark.parametrize("pairs", [False, True])
def test_every_baseline_learns_what_one_word_decides(tokenizer, token_vectors, pairs):
    source, target, test = (make_examples(n, seed, pairs) for n, seed in ((120, 1), (30, 2), (80, 3)))
    embed = bag_embedder(tokenizer, token_vectors)
    fitted = [
        tfidf_logreg(source, target, 0),
        frozen_teacher_logreg(source, embed, 1000, 0),
        vector_sum_logreg(source, target, token_vectors, tokenizer, 0),
    ]
    assert [accuracy(baseline, test) > 0.9 for baseline in fitted] == [True] * 3
    assert all(baseline.predict(test.inputs).dtype == np.int64 for baseline in fitted)


def test_parameters_count_what_prediction_needs(tokenizer, token_vectors):
    source, target = make_examples(60, 1), make_examples(20, 2)
    embed = bag_embedder(tokenizer, token_vectors)
    assert frozen_teacher_logreg(target, embed, 1000, 0).parameters == 1000 + 24 + 1
    assert vector_sum_logreg(source, target, token_vectors, tokenizer, 0).parameters == token_vectors.size + 24 + 1
    width = fit_tfidf((*source.inputs, *target.inputs))(target.inputs).shape[1]
    assert tfidf_logreg(source, target, 0).parameters == width + 1


def test_same_seed_same_predictions(tokenizer, token_vectors):
    source, target, test = make_examples(60, 1), make_examples(20, 2), make_examples(40, 3)
    first, again = (
        vector_sum_logreg(source, target, token_vectors, tokenizer, 7).predict(test.inputs) for _ in range(2)
    )
    assert np.array_equal(first, again)


def test_labels_of_the_target_outweigh_a_source_that_contradicts_them():
    source, target, test = make_examples(120, 1), make_examples(60, 2), make_examples(80, 3)
    contradicting = Examples(source.inputs, 1 - source.labels, LABELS)
    assert accuracy(tfidf_logreg(contradicting, target, 0), test) > 0.9


def test_a_source_of_the_same_law_is_used():
    rng = np.random.default_rng(0)
    direction = rng.normal(size=40)

    def draw(count):
        features = rng.normal(size=(count, 40)).astype(np.float32)
        return LabelledFeatures(features, (features @ direction > 0).astype(np.int64))

    source, target, test = draw(400), draw(16), draw(400)
    scores = []
    for rich in (source, None):
        classifier = tuned_logistic_regression(rich, target, baselines.DENSE_PENALTIES, 0)
        scores.append(classifier.score(test.features, test.labels))
    assert scores[0] > 0.9 > scores[1]


def test_folds_hold_out_target_examples_only(monkeypatch):
    judged = []
    original = baselines._negative_log_likelihood

    def spy(classifier, examples):
        judged.append(len(examples.labels))
        return original(classifier, examples)

    monkeypatch.setattr(baselines, "_negative_log_likelihood", spy)
    tfidf_logreg(make_examples(60, 1), make_examples(20, 2), 0)
    settings_tried = len(baselines.TARGET_SHARES) + len(baselines.TFIDF_PENALTIES)
    assert sum(judged) == 20 * settings_tried


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_one_two_or_three_labels_per_class_are_enough(copies):
    target = Examples((("good film",), ("bad film",)) * copies, np.array([1, 0] * copies), LABELS)
    assert accuracy(tfidf_logreg(make_examples(40, 1), target, 0), target) == 1.0


def test_three_classes(tokenizer, token_vectors):
    words = ("good", "bad", "phone")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    inputs = tuple((f"the {words[label]} {rng.choice(['story', 'battery', 'film'])}",) for label in labels)
    examples = Examples(inputs, labels.astype(np.int64), words)
    source, target, test = (examples.take(np.arange(start, start + 30)) for start in (0, 30, 60))
    assert accuracy(tfidf_logreg(source, target, 0), test) == 1.0
    baseline = vector_sum_logreg(source, target, token_vectors, tokenizer, 0)
    assert accuracy(baseline, test) > 0.9
    assert baseline.parameters == token_vectors.size + 3 * 24 + 3


def test_bag_counts_tokens_without_special_ones(tokenizer):
    counts = bag_of_tokens(tokenizer, ["good good film", ""], len(tokenizer)).toarray()
    good, film = tokenizer.convert_tokens_to_ids(["good", "film"])
    assert counts[0, good] == 2 and counts[0, film] == 1
    assert counts.sum(axis=1).tolist() == [3, 0]


def test_a_bag_may_stop_at_a_length(tokenizer):
    texts = ["good good film", "bad story of a film", ""]
    firsts = ["good good", "bad story", ""]
    cut, whole = (bag_of_tokens(tokenizer, each, len(tokenizer), 2).toarray() for each in (texts, firsts))
    assert cut.tolist() == whole.tolist()


def test_a_vector_sum_that_stops_early_misses_what_comes_late(tokenizer, token_vectors):
    late = [make_examples(n, seed) for n, seed in ((120, 1), (30, 2), (80, 3))]
    late = [replace(each, inputs=tuple((f"the story of a film {text}",) for (text,) in each.inputs)) for each in late]
    seen, unseen = (vector_sum_logreg(*late[:2], token_vectors, tokenizer, 0, longest) for longest in (None, 5))
    assert accuracy(seen, late[2]) > 0.9 > 0.7 > accuracy(unseen, late[2])


def test_sides_of_a_pair_are_embedded_apart():
    def embed(texts):
        return np.array([[len(text), 1.0] for text in texts], dtype=np.float32)

    features = pair_features([("abc", "abcd"), ("a", "a")], embed)
    assert features.tolist() == [[3, 1, 4, 1, 1, 0, 12, 1], [1, 1, 1, 1, 0, 0, 1, 1]]


def test_pair_features_tell_shared_words_from_different_ones():
    pairs = (("good film", "good film"), ("good film", "bad story"), ("bad story", "good film"))
    cosines = fit_tfidf(pairs)(pairs).toarray()[:, -2:]
    assert cosines[0] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert (cosines[1:] < 0.2).all()


@pytest.mark.parametrize("text", ["", "   ", "\u2603", "x" * 20_000])
def test_unusual_texts_are_classified(tokenizer, token_vectors, text):
    source, target = make_examples(60, 1), make_examples(20, 2)
    for baseline in (tfidf_logreg(source, target, 0), vector_sum_logreg(source, target, token_vectors, tokenizer, 0)):
        assert baseline.predict([(text,)])[0] in (0, 1)
