import time

import numpy as np
import torch

from l2a.evaluation.metrics import measure_latency

TEXTS = [(f"text {i}",) for i in range(5)]


def test_time_is_per_sentence_and_in_milliseconds():
    def predict(inputs):
        time.sleep(0.004 + 0.0005 * len(inputs))
        return np.zeros(len(inputs), np.int64)

    latency = measure_latency(predict, TEXTS, seconds=0.2)
    assert latency.keys() == {"batch_1", "batch_32"}
    assert 4.5 <= latency["batch_1"] < 15
    assert 0.62 <= latency["batch_32"] < 2.5


def test_first_call_is_a_warm_up_and_batches_vary():
    batches = []

    def predict(inputs):
        batches.append(list(inputs))
        if len(batches) == 1:
            time.sleep(0.3)
        return np.zeros(len(inputs), np.int64)

    latency = measure_latency(predict, TEXTS, seconds=0.02)
    assert latency["batch_1"] < 100
    assert {len(batch) for batch in batches} == {1, 32}
    assert len({batch[0] for batch in batches if len(batch) == 1}) > 1


def test_gradients_are_off():
    def predict(inputs):
        assert torch.is_inference_mode_enabled()
        return np.zeros(len(inputs), np.int64)

    measure_latency(predict, TEXTS, seconds=0.01)


def test_a_slow_classifier_takes_few_calls():
    calls = []

    def predict(inputs):
        calls.append(len(inputs))
        time.sleep(0.02)
        return np.zeros(len(inputs), np.int64)

    measure_latency(predict, TEXTS, seconds=0.001)
    assert calls == [1] * 4 + [32] * 4
