import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.metrics import accuracy_score, f1_score

from l2a.evaluation import metrics as module
from l2a.evaluation.metrics import classification_metrics, measure_latency


def noisy(labels, share_right, seed):
    rng = np.random.default_rng(seed)
    wrong = (labels + rng.integers(1, 3, len(labels))) % 3
    return np.where(rng.random(len(labels)) < share_right, labels, wrong)


@pytest.fixture
def labels():
    return np.random.default_rng(0).choice(3, 300, p=[0.6, 0.3, 0.1]).astype(np.int64)


@pytest.mark.parametrize("classes", [3, 4])
def test_values_are_those_of_scikit_learn_and_a_class_that_nobody_names_counts_as_zero(labels, classes):
    predictions = noisy(labels, 0.7, 1)
    metrics = classification_metrics(labels, predictions, classes, np.random.default_rng(0))
    assert metrics.accuracy.value == accuracy_score(labels, predictions)
    assert metrics.macro_f1.value == pytest.approx(f1_score(labels, predictions, average="macro") * 3 / classes)


def test_intervals_repeat_with_the_seed(labels):
    rngs = map(np.random.default_rng, (5, 5, 6))
    first, again, other = (classification_metrics(labels, noisy(labels, 0.7, 1), 3, rng) for rng in rngs)
    assert first == again != other


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_intervals_are_ordered_and_within_range(cells):
    labels, predictions = np.array(cells, dtype=np.int64).T
    metrics = classification_metrics(labels, predictions, 4, np.random.default_rng(0))
    for found in (metrics.accuracy, metrics.macro_f1):
        assert 0 <= found.low <= found.high <= 1 and 0 <= found.value <= 1
    assert metrics.accuracy.low <= metrics.accuracy.value <= metrics.accuracy.high


def test_95_of_100_intervals_hold_the_truth():
    rng, covered = np.random.default_rng(0), np.zeros(2)
    for _ in range(100):
        labels = rng.integers(0, 2, 150)
        predictions = np.where(rng.random(150) < 0.8, labels, 1 - labels)
        found = classification_metrics(labels, predictions, 2, rng)
        covered += [it.low <= 0.8 <= it.high for it in (found.accuracy, found.macro_f1)]
    assert (covered >= 90).all() and (covered <= 99).all()  # 95 are due; of 80 % intervals about 80


TEXTS = [(f"text {i}",) for i in range(5)]


@pytest.fixture
def clock(monkeypatch):
    """A processor that only works when it is told to, and a wall clock that runs on by itself."""
    clock = SimpleNamespace(worked=0.0, wall=itertools.count(step=1e-4), waited=0.0)
    monkeypatch.setattr(module.time, "process_time", lambda: clock.worked)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock.waited + next(clock.wall))
    return clock


def test_time_is_the_processors_per_text_in_milliseconds_with_its_spread(clock):
    calls = []

    def predict(inputs):
        calls.append(list(inputs))
        clock.worked += 5.0 if len(calls) == 1 else (0.004, 0.005, 0.006)[len(calls) % 3] * len(inputs)
        clock.waited += 0.5  # waiting is no work
        return np.zeros(len(inputs), np.int64)

    latency = measure_latency(predict, TEXTS, seconds=1000.0)
    assert latency["batch_1"] == pytest.approx(5.0) == latency["batch_32"]  # the warm-up call is left out
    assert latency["batch_1_spread"] == pytest.approx(1.0) == latency["batch_32_spread"]
    assert {len(batch) for batch in calls} == {1, 32}
    assert len({batch[0] for batch in calls if len(batch) == 1}) == len(TEXTS)


def test_a_slow_classifier_takes_few_calls(clock):
    calls = []

    def predict(inputs):
        calls.append(len(inputs))
        clock.waited += 100.0
        return np.zeros(len(inputs), np.int64)

    measure_latency(predict, TEXTS, seconds=0.001)
    assert calls == [1] * 6 + [32] * 6


def test_the_network_is_on_the_cpu_and_on_one_thread_while_it_is_measured():
    module = torch.nn.Linear(2, 2, device="meta") if not torch.cuda.is_available() else torch.nn.Linear(2, 2).cuda()
    moves = []
    module.to = lambda device: moves.append(str(device))
    torch.set_num_threads(2)

    def predict(inputs):
        assert torch.is_inference_mode_enabled() and torch.get_num_threads() == 1 and moves == ["cpu"]
        return np.zeros(len(inputs), np.int64)

    measure_latency(predict, TEXTS, module, seconds=0.01)
    assert moves == ["cpu", str(module.weight.device)]
    assert torch.get_num_threads() == 2
