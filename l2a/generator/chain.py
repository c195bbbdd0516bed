"""Metropolis-Hastings over many chains side by side, for any state that is a tuple of arrays."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

States = TypeVar("States", bound=tuple[Any, ...])
"""The states of C chains: a named tuple of arrays whose first axis is the chain."""


@dataclass(frozen=True)
class Proposal(Generic[States]):
    """One proposed move for each of C chains.

    Attributes:
        states: The proposed states z'.
        log_correction: float64 (C,), log q(z | z') - log q(z' | z), with any base law that the score leaves out:
            0 for moves that are reversible with respect to that base law.
        moves: int64 (C,), which kind of move each chain was offered.
    """

    states: States
    log_correction: NDArray[np.float64]
    moves: NDArray[np.int64]


@dataclass(frozen=True)
class ChainStep(Generic[States]):
    """What one step did.

    Attributes:
        states: The states after the step.
        scores: float64 (C,), their log densities.
        proposal: What was proposed.
        accepted: bool (C,).
    """

    states: States
    scores: NDArray[np.float64]
    proposal: Proposal[States]
    accepted: NDArray[np.bool_]


def metropolis_hastings(
    initial: States,
    propose: Callable[[States, np.random.Generator], Proposal[States]],
    score: Callable[[States], NDArray[np.float64]],
    rng: np.random.Generator,
) -> Iterator[ChainStep[States]]:
    """Run chains whose stationary density is proportional to exp(score) times the base law of the proposals.

    A move is accepted with probability min(1, exp(score(z') - score(z) + log_correction)). A score of minus infinity
    forbids a state; a chain that starts in a forbidden state leaves it with the first allowed proposal.

    Args:
        initial: The starting states of C chains.
        propose: Draws one move for each chain.
        score: float64 (C,) log densities of states.
        rng: Source of all randomness.

    Yields:
        One step after the other, without end.
    """
    states, scores = initial, score(initial)
    while True:
        proposal = propose(states, rng)
        proposed = score(proposal.states)
        uniform = rng.random(len(proposed))
        accepted = accepts(proposed, scores, proposal.log_correction, uniform)
        states = choose_states(accepted, proposal.states, states)
        scores = np.where(accepted, proposed, scores)
        yield ChainStep(states, scores, proposal, accepted)


def accepts(
    proposed: NDArray[np.float64],
    current: NDArray[np.float64],
    log_correction: NDArray[np.float64],
    uniform: NDArray[np.float64],
) -> NDArray[np.bool_]:
    """Apply the acceptance rule.

    Args:
        proposed: float64 (C,), scores of the proposed states.
        current: float64 (C,), scores of the current states.
        log_correction: float64 (C,), as in ``Proposal``.
        uniform: float64 (C,), in [0, 1).

    Returns:
        bool (C,), False wherever the proposed state is forbidden.
    """
    possible = np.isfinite(proposed)
    gain = np.where(possible, proposed, 0.0) - current + log_correction
    accepted: NDArray[np.bool_] = possible & (uniform < np.exp(np.minimum(gain, 0.0)))
    return accepted


def choose_states(condition: NDArray[np.bool_], first: States, second: States) -> States:
    """Choose between the states of two sets, chain by chain.

    Args:
        condition: bool (C,).
        first: Taken where the condition holds.
        second: Taken elsewhere.

    Returns:
        States of C chains.
    """
    arrays = [
        np.where(condition.reshape(-1, *[1] * (one.ndim - 1)), one, other)
        for one, other in zip(first, second, strict=True)
    ]
    chosen: States = type(first)(*arrays)
    return chosen


def take_states(states: States, chains: NDArray[np.int64]) -> States:
    """Select chains.

    Args:
        states: Of C chains.
        chains: int64 (M,), positions.

    Returns:
        States of M chains.
    """
    taken: States = type(states)(*[array[chains] for array in states])
    return taken
