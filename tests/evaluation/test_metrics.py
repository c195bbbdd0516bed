import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score

from l2a.evaluation.metrics import classification_metrics


def noisy(labels, share_right, seed):
    rng = np.random.default_rng(seed)
    wrong = (labels + rng.integers(1, 3, len(labels))) % 3
    return np.where(rng.random(len(labels)) < share_right, labels, wrong)


@pytest.fixture
def labels():
    return np.random.default_rng(0).choice(3, 300, p=[0.6, 0.3, 0.1]).astype(np.int64)


def test_values_are_those_of_scikit_learn(labels):
    predictions = noisy(labels, 0.7, 1)
    metrics = classification_metrics(labels, predictions, 3, np.random.default_rng(0))
    assert metrics.accuracy.value == pytest.approx(accuracy_score(labels, predictions))
    assert metrics.macro_f1.value == pytest.approx(f1_score(labels, predictions, average="macro"))


@pytest.mark.slow
def test_intervals_agree_with_scipy_on_resampled_examples(labels):
    predictions = noisy(labels, 0.7, 1)
    metrics = classification_metrics(labels, predictions, 3, np.random.default_rng(0))
    right = ((labels == predictions).astype(float),)
    reference = stats.bootstrap(right, np.mean, n_resamples=2000, method="percentile", rng=0).confidence_interval
    assert metrics.accuracy.low == pytest.approx(reference.low, abs=0.012)
    assert metrics.accuracy.high == pytest.approx(reference.high, abs=0.012)

    def macro_f1(truth, guesses):
        return f1_score(truth, guesses, average="macro")

    columns = (labels, predictions)
    reference = stats.bootstrap(
        columns, macro_f1, n_resamples=200, method="percentile", paired=True, vectorized=False, rng=0
    ).confidence_interval
    assert metrics.macro_f1.low == pytest.approx(reference.low, abs=0.03)
    assert metrics.macro_f1.high == pytest.approx(reference.high, abs=0.03)


def test_intervals_repeat_with_the_seed(labels):
    predictions = noisy(labels, 0.7, 1)
    first, again, other = (
        classification_metrics(labels, predictions, 3, np.random.default_rng(seed)) for seed in (5, 5, 6)
    )
    assert first == again != other


def test_a_class_that_nobody_names_counts_as_zero():
    labels = np.array([0, 0, 1, 1])
    metrics = classification_metrics(labels, labels, 3, np.random.default_rng(0))
    assert metrics.accuracy.value == 1.0
    assert metrics.macro_f1.value == pytest.approx(2 / 3)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 4).flatmap(
        lambda classes: st.tuples(
            st.just(classes),
            st.lists(st.tuples(st.integers(0, classes - 1), st.integers(0, classes - 1)), min_size=1, max_size=30),
        )
    )
)
def test_intervals_are_ordered_and_within_range(drawn):
    classes, cells = drawn
    labels, predictions = np.array(cells, dtype=np.int64).T
    metrics = classification_metrics(labels, predictions, classes, np.random.default_rng(0))
    for interval in (metrics.accuracy, metrics.macro_f1):
        assert 0 <= interval.low <= interval.high <= 1
        assert 0 <= interval.value <= 1
    assert metrics.accuracy.low <= metrics.accuracy.value <= metrics.accuracy.high


def test_95_of_100_intervals_hold_the_truth():
    rng, covered = np.random.default_rng(0), np.zeros(2)
    for _ in range(200):
        labels = rng.integers(0, 2, 150)
        predictions = np.where(rng.random(150) < 0.8, labels, 1 - labels)
        found = classification_metrics(labels, predictions, 2, rng)
        covered += [it.low <= 0.8 <= it.high for it in (found.accuracy, found.macro_f1)]
    assert (covered >= 180).all() and (covered <= 199).all()  # 190 are due; of 80 % intervals about 160
