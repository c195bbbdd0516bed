"""Chains of Metropolis-Hastings over augmented texts: the algorithm, the states and their moves, the diagnostics.

A candidate is made from a state z = (base text, operator, partner, uniform numbers u) by a fixed map x = g(z). Plain
proposals draw z from a base law mu; every move either redraws z from mu or redraws a part of it given the rest, so it
is reversible with respect to mu, and a move is accepted with probability min(1, exp(score(z') - score(z))).
"""

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from l2a.config import GeneratorConfig, resolve_degree
from l2a.data.examples import TextInput
from l2a.generator.density import LabelledTexts, fit_target_density
from l2a.generator.operators import CHAIN_OPERATORS, OPERATORS, SOURCE, operator_law
from l2a.generator.tokens import TokenSpace, choose_slots, write_texts
from l2a.teacher.store import Labeller, TeacherOutputs

MOVES = ("jump", "local", "partner")
MOVE_PROBABILITIES = (0.5, 0.3, 0.2)
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


class AugmentationState(NamedTuple):
    """The states of C chains; base and partner count source texts first, then target texts.

    Attributes:
        base: int64 (C,).
        operator: int64 (C,), index into ``CHAIN_OPERATORS``.
        partner: int64 (C,), a text of the other domain.
        u: float32 (C, L, 2), uniform in [0, 1).
        row: int64 (C,), of the text g(z) among the labelled texts; a note, not part of z.
        degree: float64 (C,), share of the base's tokens that g(z) changes; likewise.
    """

    base: NDArray[np.int64]
    operator: NDArray[np.int64]
    partner: NDArray[np.int64]
    u: NDArray[np.float32]
    row: NDArray[np.int64]
    degree: NDArray[np.float64]


@dataclass(frozen=True)
class GeneratorInputs:
    """All that the generator reads.

    Attributes:
        source_inputs: S texts of the source domain.
        target_inputs: The n labelled texts of the target domain.
        source_outputs: The teacher's outputs for the source texts.
        target_outputs: The teacher's outputs for the target texts.
        space: Tokens, neighbours and gradient; without a gradient augpro_fgsm is left out.
        labeller: Labels new texts with the teacher.
        forbidden_hashes: Normalised hashes of the test texts, which are never drawn.
    """

    source_inputs: tuple[TextInput, ...]
    target_inputs: tuple[TextInput, ...]
    source_outputs: TeacherOutputs
    target_outputs: TeacherOutputs
    space: TokenSpace
    labeller: Labeller
    forbidden_hashes: AbstractSet[str]


class AugmentationSpace:
    """Draws, moves and scores states.

    Attributes:
        density: How near a text is to the target.
        degree: Probability that an operator changes an open token.
        labelled: Source texts, then target texts, then what the chains visited, with the teacher's outputs.
    """

    def __init__(self, inputs: GeneratorInputs, config: GeneratorConfig) -> None:
        """Fit the density and tokenize the texts.

        Args:
            inputs: The two domains and the callables.
            config: Settings.

        Raises:
            UsageError: If a domain has fewer than 2 texts, or no operator is left.
        """
        self._config = config
        source, target = inputs.source_outputs, inputs.target_outputs
        self.density = fit_target_density(source.embeddings, target.embeddings)
        texts = inputs.source_inputs + inputs.target_inputs
        known = TeacherOutputs(
            np.concatenate([source.logits, target.logits]), np.concatenate([source.embeddings, target.embeddings])
        )
        self.labelled = LabelledTexts(texts, known, self.density, inputs.labeller, inputs.forbidden_hashes)
        self._store = inputs.space.tokenize(texts)
        self._longest = int(self._store.lengths.max())
        self._source_count = len(inputs.source_inputs)
        self.degree = resolve_degree(config.degree, len(texts))
        self._operator_law = operator_law(config, has_gradient=inputs.space.gradient is not None)

    def draw(self, count: int, rng: np.random.Generator) -> AugmentationState:
        """Draw independent states from the base law mu.

        Args:
            count: Chains.
            rng: Source of randomness.

        Returns:
            The states, with their texts labelled.
        """
        return self._with_texts(self._draw(count, rng))

    def propose(self, states: AugmentationState, rng: np.random.Generator) -> Proposal[AugmentationState]:
        """Propose a jump (all redrawn), a local move (u redrawn on a block) or a new partner, for each chain.

        Args:
            states: Where the chains are.
            rng: Source of randomness.

        Returns:
            The proposed states, with their texts labelled; corrections are 0, see the module's text.
        """
        count = len(states.base)
        moves = rng.choice(len(MOVES), size=count, p=MOVE_PROBABILITIES)
        fresh = self._draw(count, rng)
        block = self._draw_blocks(states.base, rng)
        local = states._replace(u=np.where(block[:, :, None], fresh.u, states.u))
        partner = states._replace(partner=self._draw_partners(states.base, rng))
        moved = choose_states(moves == 0, fresh, choose_states(moves == 1, local, partner))
        return Proposal(self._with_texts(moved), np.zeros(count), moves)

    def score(self, states: AugmentationState) -> NDArray[np.float64]:
        """Return the log density of states with respect to mu, up to a constant.

        Args:
            states: Of C chains.

        Returns:
            float64 (C,), minus infinity where the text is forbidden.
        """
        excess = np.maximum(0.0, states.degree - self._config.max_degree)
        density = self.labelled.densities(states.row)
        is_allowed = np.isfinite(density)
        scores = np.where(is_allowed, density, 0.0) / self._config.tau - self._config.beta * excess
        return np.where(is_allowed, scores, -np.inf)

    def _draw(self, count: int, rng: np.random.Generator) -> AugmentationState:
        operator = rng.choice(len(CHAIN_OPERATORS), size=count, p=self._operator_law)
        in_target = (rng.random(count) < self._config.target_share) & (operator != SOURCE)
        base = self._draw_from(in_target, rng)
        u = rng.random((count, self._longest, 2), dtype=np.float32)
        partner = self._draw_partners(base, rng)
        return AugmentationState(base, operator, partner, u, np.zeros(count, np.int64), np.zeros(count))

    def _draw_from(self, in_target: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.int64]:
        source = rng.integers(0, self._source_count, size=len(in_target))
        target = rng.integers(self._source_count, len(self._store.inputs), size=len(in_target))
        return np.where(in_target, target, source)

    def _draw_partners(self, base: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        return self._draw_from(base < self._source_count, rng)

    def _draw_blocks(self, base: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.bool_]:
        lengths = self._store.lengths[base]
        start = rng.integers(0, lengths)
        width = rng.integers(1, lengths // 2 + 2)
        places = np.arange(self._longest)[None, :]
        block: NDArray[np.bool_] = (places >= start[:, None]) & (places < (start + width)[:, None])
        return block

    def _with_texts(self, states: AugmentationState) -> AugmentationState:
        texts, degree = self.project(states)
        return states._replace(row=self.labelled.rows(texts), degree=degree)

    def project(self, states: AugmentationState) -> tuple[list[TextInput], NDArray[np.float64]]:
        """Apply each state's operator: x = g(z).

        Args:
            states: Of C chains.

        Returns:
            C texts, and float64 (C,), the share of the base's tokens that changed.
        """
        texts, degree = [self._store.inputs[base] for base in states.base], np.zeros(len(states.base))
        for code, name in enumerate(CHAIN_OPERATORS):
            chains = np.flatnonzero(states.operator == code)
            if code == SOURCE or not len(chains):
                continue
            base, partner, u = states.base[chains], states.partner[chains], states.u[chains]
            slots = choose_slots(self._store, base, partner, u, self.degree)
            made = write_texts(slots, OPERATORS[name].apply(slots))
            for chain, rewrite in zip(chains, made, strict=True):
                texts[chain], degree[chain] = rewrite
        return texts, degree


@dataclass(frozen=True)
class ChainDiagnostics:
    """Facts about one run of the chains.

    Attributes:
        steps: Steps of each chain, burn-in included.
        chains: Chains side by side.
        degree: Probability with which operators changed a slot.
        acceptance: By kind of move: accepted share of the proposals that would change the text.
        effective_sample_size: Independent draws that the samples are worth, judged by the log density.
        proposal_log_density: Mean standardised log density of plain proposals.
        sample_log_density: Mean over the samples of the chain.
        target_log_density: Mean over the target texts that the density was fitted on.
        distinct_share: Distinct texts among the samples.
        labelled_texts: Texts that the teacher labelled.
        labelling_seconds: Wall seconds spent in the labeller.
        seconds: Wall seconds in all.
    """

    steps: int
    chains: int
    degree: float
    acceptance: Mapping[str, float]
    effective_sample_size: float
    proposal_log_density: float
    sample_log_density: float
    target_log_density: float
    distinct_share: float
    labelled_texts: int
    labelling_seconds: float
    seconds: float


def effective_sample_size(trace: NDArray[np.float64]) -> float:
    """Estimate how many independent draws the draws of several chains are worth.

    Autocorrelations are pooled over the chains and set against the variance of all draws together, so chains that
    disagree count for less; their sum is cut by Geyer's initial positive sequence (Geyer 1992, Practical MCMC).

    Args:
        trace: float64 (T, C), a scalar of the state by step and chain.

    Returns:
        Between 1 and T * C.
    """
    steps, chains = trace.shape
    total = trace.var()
    if steps < 4 or total == 0:
        return float(chains)
    means = trace.mean(axis=0)
    covariance = _autocovariance(trace - means).mean(axis=1) + means.var()
    pairs = covariance[: steps // 2 * 2].reshape(-1, 2).sum(axis=1) / total
    negative = np.flatnonzero(pairs <= 0)
    kept = pairs[: negative[0]] if len(negative) else pairs
    return float(np.clip(steps * chains / (2 * kept.sum() - 1), 1.0, steps * chains))


def _autocovariance(centred: NDArray[np.float64]) -> NDArray[np.float64]:
    steps = len(centred)
    spectrum = np.fft.rfft(centred, 2 * steps, axis=0)
    products: NDArray[np.float64] = np.fft.irfft(np.abs(spectrum) ** 2, 2 * steps, axis=0)[:steps]
    return products / steps
