import numpy as np
import pytest
import torch

from l2a.evaluation import metrics
from l2a.evaluation.metrics import measure_latency

TEXTS = [(f"text {i}",) for i in range(5)]


class Clock:
    """A processor that only works when it is told to, and a wall clock that runs on by itself."""

    def __init__(self, monkeypatch):
        self.worked = self.wall = 0.0
        monkeypatch.setattr(metrics.time, "process_time", lambda: self.worked)
        monkeypatch.setattr(metrics.time, "perf_counter", self.tick)

    def tick(self):
        self.wall += 1e-4
        return self.wall


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_time_is_the_processors_per_text_in_milliseconds_with_its_spread(clock):
    calls = []

    def predict(inputs):
        calls.append(list(inputs))
        clock.worked += 5.0 if len(calls) == 1 else (0.004, 0.005, 0.006)[len(calls) % 3] * len(inputs)
        clock.wall += 0.5  # waiting is no work
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
        clock.wall += 100.0
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
