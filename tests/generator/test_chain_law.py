"""The chains' empirical law against the law that is written down, on spaces that can be enumerated."""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from l2a.generator.chain import effective_sample_size, metropolis_hastings

STATES = 24
SCORES = np.concatenate([np.linspace(-2.0, 2.0, STATES - 1), [-np.inf]])
BASE = (1.0 + np.arange(STATES)) / (1.0 + np.arange(STATES)).sum()
TARGET = BASE * np.exp(SCORES) / (BASE * np.exp(SCORES)).sum()


class ToyStates(NamedTuple):
    place: NDArray[np.int64]


def score(states: ToyStates) -> NDArray[np.float64]:
    return SCORES[states.place]


def propose(states: ToyStates, rng: np.random.Generator, is_reversible: bool = True):
    """Redraw the place, or which of its pair it is, from the base law; from another law if it is not reversible."""
    law, count = BASE if is_reversible else np.full(STATES, 1 / STATES), len(states.place)
    moves, jumped = rng.integers(0, 2, size=count), rng.choice(STATES, size=count, p=law)
    first = states.place // 2 * 2
    second = rng.random(count) < law[first + 1] / (law[first] + law[first + 1])
    return ToyStates(np.where(moves == 0, jumped, first + second)), moves


def distance_to_target(is_reversible: bool) -> float:
    rng = np.random.default_rng(0)
    start = ToyStates(rng.integers(0, STATES, size=500))
    steps = metropolis_hastings(start, lambda states, rng: propose(states, rng, is_reversible), score, rng)
    places = [step.states.place for _, step in zip(range(360), steps, strict=False)]
    counts = np.bincount(np.concatenate(places[60:]), minlength=STATES)
    return 0.5 * float(np.abs(counts / counts.sum() - TARGET).sum())


def test_the_empirical_law_is_the_stationary_law_and_moves_that_are_not_reversible_miss_it():
    assert distance_to_target(is_reversible=True) < 0.02
    assert distance_to_target(is_reversible=False) > 0.04


def test_a_forbidden_state_is_left_and_never_entered():
    rng = np.random.default_rng(1)
    start = ToyStates(np.full(50, STATES - 1))
    steps = metropolis_hastings(start, propose, score, rng)
    visited = [step.states.place for step, _ in zip(steps, range(60), strict=False)]
    assert (visited[-1] != STATES - 1).all()
    left = np.stack(visited) != STATES - 1
    assert (np.diff(left.astype(int), axis=0) >= 0).all(), "a chain came back to the forbidden state"


def test_the_acceptance_rule():
    current, proposed = np.array([-1.0, 0, 0, 0, -np.inf, -np.inf]), np.array([0.0, -1, -1, -np.inf, 0, -np.inf])
    uniform = np.array([0.999, np.exp(-1) - 1e-6, np.exp(-1) + 1e-6, 0.0, 0.999, 0.0])
    move = ToyStates(np.arange(6, 12)), np.zeros(6, np.int64)
    scores, rng = np.concatenate([current, proposed]), SimpleNamespace(random=lambda count: uniform)
    step = next(metropolis_hastings(ToyStates(np.arange(6)), lambda *_: move, lambda s: scores[s.place], rng))
    assert step.accepted.tolist() == [True, True, False, False, True, False]
    assert step.states.place.tolist() == [6, 7, 2, 3, 10, 5]


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
