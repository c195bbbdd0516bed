import numpy as np
import pytest

from l2a.generator.chain import effective_sample_size


def autoregression(correlation: float, steps: int, chains: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    values = [rng.normal(size=chains)]
    for _ in range(steps - 1):
        values.append(correlation * values[-1] + np.sqrt(1 - correlation**2) * rng.normal(size=chains))
    return np.stack(values)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_correlated_draws_count_as_theory_says(correlation):
    trace = autoregression(correlation, steps=1500, chains=20)
    expected = trace.size * (1 - correlation) / (1 + correlation)
    assert effective_sample_size(trace) == pytest.approx(expected, rel=0.15)


def test_chains_that_never_move_count_once_each_at_most():
    stuck = np.repeat(np.random.default_rng(0).normal(size=(1, 30)), 200, axis=0)
    assert effective_sample_size(stuck) <= 40
    assert effective_sample_size(np.ones((50, 3))) == 3


def test_chains_that_disagree_count_for_less():
    trace = autoregression(0.2, steps=400, chains=6)
    assert effective_sample_size(trace + 5 * np.arange(6)) < 0.1 * effective_sample_size(trace)
