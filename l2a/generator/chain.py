"""Metropolis-Hastings over many chains side by side, for any state that is a tuple of arrays."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from l2a.config import OPERATORS, GeneratorConfig
from l2a.generator import operators
from l2a.generator.density import LabelledTexts
from l2a.generator.tokens import GeneratorInputs, TokenCorpus, align_partners, substitute, unit_rows
from l2a.util.errors import UsageError

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


SOURCE, AUGPRO_MIX, AUGPRO_FGSM, KNN = range(len(OPERATORS))
MOVES = ("jump", "local", "partner")
MOVE_PROBABILITIES = (0.5, 0.3, 0.2)


class AugmentationState(NamedTuple):
    """The states of C chains; base and partner count source texts first, then target texts.

    Attributes:
        base: int64 (C,).
        operator: int64 (C,), index into ``OPERATORS``.
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


class AugmentationSpace:
    """Draws, moves and scores lifted states."""

    def __init__(
        self,
        problem: GeneratorInputs,
        config: GeneratorConfig,
        degree: float,
        corpus: TokenCorpus,
        labelled: LabelledTexts,
    ) -> None:
        """Set the space up.

        Args:
            problem: The two domains and the callables.
            config: Settings.
            degree: Probability that an operator changes an open slot.
            corpus: Source texts, then target texts, tokenized.
            labelled: Source texts, then target texts, with their outputs; grows.
        """
        self._problem, self._config, self._degree = problem, config, degree
        self._corpus, self._labelled = corpus, labelled
        self._source_count = len(problem.source_inputs)
        self._fgsm_ids: dict[int, Tensor] = {}
        self._operator_law = _operator_law(config, has_gradient=problem.gradient is not None)

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
        u = np.where(block[:, :, None], fresh.u, states.u)
        local = states._replace(u=u)
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
        density = self._labelled.densities(states.row)
        is_allowed = np.isfinite(density)
        scores = np.where(is_allowed, density, 0.0) / self._config.tau - self._config.beta * excess
        return np.where(is_allowed, scores, -np.inf)

    def _draw(self, count: int, rng: np.random.Generator) -> AugmentationState:
        operator = rng.choice(len(OPERATORS), size=count, p=self._operator_law)
        in_target = (rng.random(count) < self._config.target_share) & (operator != SOURCE)
        base = self._draw_from(in_target, rng)
        u = rng.random((count, self._corpus.ids.shape[1], 2), dtype=np.float32)
        unknown = np.zeros(count, dtype=np.int64)
        return AugmentationState(base, operator, self._draw_partners(base, rng), u, unknown, unknown.astype(np.float64))

    def _draw_from(self, in_target: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.int64]:
        source = rng.integers(0, self._source_count, size=len(in_target))
        target = rng.integers(self._source_count, len(self._corpus.inputs), size=len(in_target))
        return np.where(in_target, target, source)

    def _draw_partners(self, base: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        return self._draw_from(base < self._source_count, rng)

    def _draw_blocks(self, base: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.bool_]:
        lengths = self._corpus.lengths[base]
        start = rng.integers(0, lengths)
        width = rng.integers(1, lengths // 2 + 2)
        places = np.arange(self._corpus.ids.shape[1])[None, :]
        block: NDArray[np.bool_] = (places >= start[:, None]) & (places < (start + width)[:, None])
        return block

    def _with_texts(self, states: AugmentationState) -> AugmentationState:
        new_ids = self.project(states).numpy().astype(np.int32)
        texts, tokens = self._corpus.texts, self._problem.tokens
        inputs = [
            substitute(self._corpus.inputs[base], texts[base], ids[: len(texts[base].ids)], tokens)
            for base, ids in zip(states.base, new_ids, strict=True)
        ]
        changed = (new_ids != self._corpus.ids[states.base].numpy()).sum(axis=1)
        degree = changed / np.maximum(self._corpus.words[states.base], 1)
        return states._replace(row=self._labelled.rows(inputs), degree=degree)

    def project(self, states: AugmentationState) -> Tensor:
        """Apply each state's operator: the token part of x = g(z).

        Args:
            states: Of C chains.

        Returns:
            int64 (C, L), padded as the corpus.
        """
        ids = self._corpus.ids[states.base]
        for code in (AUGPRO_MIX, AUGPRO_FGSM, KNN):
            members = np.flatnonzero(states.operator == code)
            if len(members):
                ids[members] = self._operate(code, take_states(states, members))
        return ids

    def _operate(self, code: int, states: AugmentationState) -> Tensor:
        ids, slots = self._corpus.ids[states.base], self._corpus.slots[states.base]
        u, table = torch.from_numpy(states.u), self._problem.neighbours
        if code == KNN:
            return operators.knn_tokens(ids, slots, u, self._degree, table)
        if code == AUGPRO_FGSM:
            return operators.fgsm_tokens(ids, slots, self._fgsm_replacements(states.base), u, self._degree)
        partners = align_partners(ids, slots, self._corpus.ids[states.partner], self._corpus.slots[states.partner])
        if self._config.mix_variant == "reference":
            return operators.mix_tokens(ids, slots, partners, u, self._degree)
        return operators.mix_tokens_between(ids, slots, partners, u, self._degree, table, self._directions)

    @cached_property
    def _directions(self) -> Tensor:
        return unit_rows(self._problem.word_embeddings)

    def _fgsm_replacements(self, base: NDArray[np.int64]) -> Tensor:
        missing = [int(index) for index in np.unique(base) if int(index) not in self._fgsm_ids]
        if missing:
            gradients = self._padded_gradients(missing)
            ids, slots = self._corpus.ids[missing], self._corpus.slots[missing]
            table, embeddings = self._problem.neighbours, self._problem.word_embeddings
            found = operators.fgsm_replacements(ids, slots, gradients, table, embeddings)
            self._fgsm_ids.update(zip(missing, found, strict=True))
        return torch.stack([self._fgsm_ids[int(index)] for index in base])

    def _padded_gradients(self, indices: list[int]) -> Tensor:
        assert self._problem.gradient is not None  # the operator has no weight without it
        gradients = self._problem.gradient([self._corpus.inputs[index] for index in indices])
        padded = torch.zeros(len(indices), self._corpus.ids.shape[1], self._problem.word_embeddings.shape[1])
        for row, (index, gradient) in enumerate(zip(indices, gradients, strict=True)):
            if gradient.shape != (self._corpus.lengths[index], padded.shape[2]):
                raise ValueError(
                    f"gradient: shape {gradient.shape} came for a text of {self._corpus.lengths[index]} tokens and "
                    f"{padded.shape[2]} embedding dimensions; give one row for each token, special ones included"
                )
            padded[row, : len(gradient)] = torch.as_tensor(gradient)
        return padded


def _operator_law(config: GeneratorConfig, has_gradient: bool) -> NDArray[np.float64]:
    weights = np.array(config.operators.as_tuple())
    if not has_gradient:
        weights[AUGPRO_FGSM] = 0.0
    if weights.sum() == 0:
        raise UsageError("generator.operators: only augpro_fgsm has a weight, but no gradient came; weigh another")
    law: NDArray[np.float64] = weights / weights.sum()
    return law
