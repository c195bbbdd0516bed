"""Chains of Metropolis-Hastings over augmented texts: the algorithm, the target's density, the states and their moves.

A candidate is made from a state z = (base text, operator, partner, uniform numbers u) by a fixed map x = g(z). Plain
proposals draw z from a base law mu; every move redraws z from mu or a part of it given the rest, so it is reversible
with respect to mu, and is accepted with probability min(1, exp(score(z') - score(z))).
"""

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from l2a.config import GeneratorConfig, resolve_degree
from l2a.data.examples import TextInput, normalised_hash
from l2a.generator.operators import CHAIN_OPERATORS, OPERATORS, SOURCE, operator_law
from l2a.generator.tokens import Ints, TokenSpace, choose_slots, write_texts
from l2a.teacher.labelling import Labeller, TeacherOutputs, join_outputs
from l2a.util.errors import RunError, UsageError
from l2a.util.progress import SILENT, Progress

MOVES = ("jump", "local", "partner")
MOVE_PROBABILITIES = (0.5, 0.3, 0.2)
Floats = NDArray[np.float64]
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
    log_correction: Floats
    moves: Ints


class ChainStep(NamedTuple, Generic[States]):
    """What one step did: the states after it, what was proposed, and bool (C,), what was accepted."""

    states: States
    proposal: Proposal[States]
    accepted: NDArray[np.bool_]


def metropolis_hastings(
    initial: States,
    propose: Callable[[States, np.random.Generator], Proposal[States]],
    score: Callable[[States], Floats],
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
        possible = np.isfinite(proposed)
        gain = np.where(possible, proposed, 0.0) - scores + proposal.log_correction
        accepted = possible & (rng.random(len(proposed)) < np.exp(np.minimum(gain, 0.0)))
        states = choose_states(accepted, proposal.states, states)
        scores = np.where(accepted, proposed, scores)
        yield ChainStep(states, proposal, accepted)


def choose_states(condition: NDArray[np.bool_], first: States, second: States) -> States:
    """Choose between the states of two sets, chain by chain: the first where the condition, bool (C,), holds."""
    pairs = zip(first, second, strict=True)
    arrays = [np.where(condition.reshape(-1, *[1] * (one.ndim - 1)), one, other) for one, other in pairs]
    chosen: States = type(first)(*arrays)
    return chosen


@dataclass(frozen=True)
class TargetDensity:
    """A classifier of the two domains: its log odds estimate the log ratio of the target's density to the source's.

    They grow without bound along one direction, so a small tau makes caricatures.

    Attributes:
        mean: float64 (d,), of both domains.
        weights: float64 (d,), logistic regression of target against source.
        bias: Its intercept.
        location: Median of the log odds over the source texts.
        scale: Standard deviation of the log odds over both domains, each with half of the weight.
    """

    mean: Floats
    weights: Floats
    bias: float
    location: float = 0.0
    scale: float = 1.0

    def log_odds(self, embeddings: NDArray[np.float32]) -> Floats:
        """Log odds of the target, float64 (N,), from float32 (N, d); both domains are equally likely beforehand."""
        odds: Floats = (embeddings - self.mean) @ self.weights + self.bias
        return odds

    def log_density(self, embeddings: NDArray[np.float32]) -> Floats:
        """Standardised log density: 0 for the median source text, in standard deviations over both domains.

        With half of the weight on each domain the mean target text is at most 2 above the mean source text, so the
        chain's temperature means the same whatever the domains, the teacher's width and the number of target texts
        (our derivation).
        """
        standardised: Floats = (self.log_odds(embeddings) - self.location) / self.scale
        return standardised


def fit_target_density(source: NDArray[np.float32], target: NDArray[np.float32]) -> TargetDensity:
    """Fit the domain classifier and its scale.

    Args:
        source: float32 (S, d), the teacher's embeddings of source texts.
        target: float32 (n, d), of the few target texts.

    Returns:
        The fitted density.

    Raises:
        UsageError: If there are fewer than 2 texts of a domain.
    """
    if min(len(source), len(target)) < 2:
        raise UsageError(
            f"the generator has {len(source)} source and {len(target)} target texts; give at least 2 of each domain"
        )
    both = np.concatenate([source, target]).astype(np.float64)
    mean = both.mean(axis=0)
    both -= mean
    spread = max(float(np.sqrt(both.var(axis=0).mean())), 1e-12)
    model = LogisticRegression(C=0.1, class_weight="balanced", max_iter=200)
    with threadpool_limits(limits=1, user_api="blas"):  # these problems are small: more threads only get in the way
        model.fit(both / spread, np.repeat([0, 1], [len(source), len(target)]))
        raw = TargetDensity(mean, model.coef_[0] / spread, float(model.intercept_[0]))
        # At most 2,000 texts of each domain fix the zero and the unit.
        of_source, of_target = (raw.log_odds(few[:: math.ceil(len(few) / 2000)]) for few in (source, target))
    gap = of_target.mean() - of_source.mean()
    scale = float(np.sqrt((of_source.var() + of_target.var()) / 2 + gap**2 / 4))
    return replace(raw, location=float(np.median(of_source)), scale=max(scale, 1e-6))


FORBIDDEN = -1


class LabelledTexts:
    """Numbers texts as they come, and keeps their outputs and their log density.

    Attributes:
        inputs: The texts, by row.
        hashes: Their normalised hashes.
        log_density: Their standardised log target densities.
        labelling_seconds: Wall seconds that labelling new texts took.
    """

    def __init__(
        self,
        inputs: Sequence[TextInput],
        outputs: TeacherOutputs,
        density: TargetDensity,
        labeller: Labeller,
        forbidden_hashes: AbstractSet[str],
    ) -> None:
        """Start with texts whose outputs are known, and which get the rows 0 to N - 1.

        Texts whose hashes are forbidden get no row and are never labelled.
        """
        self.inputs: list[TextInput] = []
        self.hashes: list[str] = []
        self.log_density: list[float] = []
        self.labelling_seconds = 0.0
        self._outputs: list[TeacherOutputs] = []
        self._rows: dict[TextInput, int] = {}
        self._density, self._labeller, self._forbidden = density, labeller, forbidden_hashes
        self._append([(text, normalised_hash(text)) for text in inputs], outputs)

    def rows(self, inputs: Sequence[TextInput]) -> Ints:
        """Look up the rows of texts, int64, -1 for forbidden ones; those that are new are labelled in one call."""
        new = {text: normalised_hash(text) for text in inputs if text not in self._rows}
        self._rows |= dict.fromkeys(new, FORBIDDEN)
        wanted = [(text, key) for text, key in new.items() if key not in self._forbidden]
        if wanted:
            started = time.perf_counter()
            outputs = self._labeller([text for text, _ in wanted])
            self.labelling_seconds += time.perf_counter() - started
            self._append(wanted, outputs)
        return np.array([self._rows[text] for text in inputs], dtype=np.int64)

    def densities(self, rows: Ints) -> Floats:
        """Return the log densities of rows of any shape, minus infinity for forbidden texts."""
        values = [-np.inf if row == FORBIDDEN else self.log_density[row] for row in rows.ravel().tolist()]
        return np.array(values).reshape(rows.shape)

    def outputs(self, rows: Ints) -> TeacherOutputs:
        """Collect the teacher's outputs of at least one row, none of them forbidden."""
        found = join_outputs(self._outputs).take(rows)
        return TeacherOutputs(found.logits, found.embeddings)

    def _append(self, texts: Sequence[tuple[TextInput, str]], outputs: TeacherOutputs) -> None:
        for text, key in texts:
            self._rows[text] = FORBIDDEN if key in self._forbidden else len(self.inputs)
            self.inputs.append(text)
            self.hashes.append(key)
        self._outputs.append(outputs)
        self.log_density.extend(self._density.log_density(outputs.embeddings).tolist())


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

    base: Ints
    operator: Ints
    partner: Ints
    u: NDArray[np.float32]
    row: Ints
    degree: Floats


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

        Raises:
            UsageError: If a domain has fewer than 2 texts, or no operator is left.
        """
        self._config = config
        known = [inputs.source_outputs, inputs.target_outputs]
        self.density = fit_target_density(*(outputs.embeddings for outputs in known))
        texts = inputs.source_inputs + inputs.target_inputs
        labels = (inputs.labeller, inputs.forbidden_hashes)
        self.labelled = LabelledTexts(texts, join_outputs(known), self.density, *labels)
        self._store = inputs.space.tokenize(texts)
        self._longest = int(self._store.lengths.max())
        self._source_count = len(inputs.source_inputs)
        self.degree = resolve_degree(config.degree, len(texts))
        self._operator_law = operator_law(config, has_gradient=inputs.space.gradient is not None)

    def draw(self, count: int, rng: np.random.Generator) -> AugmentationState:
        """Draw independent states of ``count`` chains from the base law mu, with their texts labelled."""
        return self._with_texts(self._draw(count, rng))

    def propose(self, states: AugmentationState, rng: np.random.Generator) -> Proposal[AugmentationState]:
        """Propose a jump (all redrawn), a local move (u redrawn on a block) or a new partner, for each chain.

        The texts are labelled; corrections are 0, see the module's text.
        """
        count = len(states.base)
        moves = rng.choice(len(MOVES), size=count, p=MOVE_PROBABILITIES)
        fresh = self._draw(count, rng)
        lengths, places = self._store.lengths[states.base], np.arange(self._longest)
        start = rng.integers(0, lengths)[:, None]
        end = start + rng.integers(1, lengths // 2 + 2)[:, None]
        block = (places >= start) & (places < end)
        local = states._replace(u=np.where(block[:, :, None], fresh.u, states.u))
        partner = states._replace(partner=self._draw_from(states.base < self._source_count, rng))
        moved = choose_states(moves == 0, fresh, choose_states(moves == 1, local, partner))
        return Proposal(self._with_texts(moved), np.zeros(count), moves)

    def score(self, states: AugmentationState) -> Floats:
        """Return the log density of states with respect to mu, up to a constant; minus infinity for forbidden texts."""
        excess = np.maximum(0.0, states.degree - self._config.max_degree)
        density = self.labelled.densities(states.row)
        # Minus infinity stays, at an infinite temperature too.
        scores: Floats = np.divide(density, self._config.tau, out=density, where=np.isfinite(density))
        return scores - self._config.beta * excess

    def _draw(self, count: int, rng: np.random.Generator) -> AugmentationState:
        operator = rng.choice(len(CHAIN_OPERATORS), size=count, p=self._operator_law)
        base = self._draw_from((rng.random(count) < self._config.target_share) & (operator != SOURCE), rng)
        u = rng.random((count, self._longest, 2), dtype=np.float32)
        partner = self._draw_from(base < self._source_count, rng)
        return AugmentationState(base, operator, partner, u, np.zeros(count, np.int64), np.zeros(count))

    def _draw_from(self, in_target: NDArray[np.bool_], rng: np.random.Generator) -> Ints:
        source = rng.integers(0, self._source_count, size=len(in_target))
        target = rng.integers(self._source_count, len(self._store.inputs), size=len(in_target))
        return np.where(in_target, target, source)

    def _with_texts(self, states: AugmentationState) -> AugmentationState:
        texts, degree = self.project(states)
        return states._replace(row=self.labelled.rows(texts), degree=degree)

    def project(self, states: AugmentationState) -> tuple[list[TextInput], Floats]:
        """Apply each state's operator, x = g(z): C texts, and float64 (C,), the changed share of the base's tokens."""
        texts, degree = [self._store.inputs[base] for base in states.base], np.zeros(len(states.base))
        for code, name in enumerate(CHAIN_OPERATORS):
            chains = np.flatnonzero(states.operator == code)
            if code == SOURCE or not len(chains):
                continue
            base, partner, u = states.base[chains], states.partner[chains], states.u[chains]
            slots = choose_slots(self._store, base, partner, u, self.degree)
            for chain, made in zip(chains, write_texts(slots, OPERATORS[name].rewrite(slots)), strict=True):
                texts[chain], degree[chain] = made
        return texts, degree


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CandidatePool:
    """N candidates, all different, none a test text or one of the target's labelled texts.

    Attributes:
        inputs: The texts.
        origins: The text that each was made from, such as "source:17" or "target:3".
        operators: The operator that made it; a source text that came through unchanged counts as "source".
        degrees: float32 (N,), realised share of changed tokens.
        teacher: The teacher's outputs.
        log_density: float32 (N,), standardised log target density.
        domain_probability: float32 (N,), of the target domain.
        max_target_cosine: float32 (N,), to the nearest of the target's labelled texts.
    """

    inputs: tuple[TextInput, ...]
    origins: tuple[str, ...]
    operators: tuple[str, ...]
    degrees: NDArray[np.float32]
    teacher: TeacherOutputs
    log_density: NDArray[np.float32]
    domain_probability: NDArray[np.float32]
    max_target_cosine: NDArray[np.float32]

    def __len__(self) -> int:
        """Return the number of candidates."""
        return len(self.inputs)


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


def draw_pool(
    inputs: GeneratorInputs, config: GeneratorConfig, size: int, rng: np.random.Generator, progress: Progress = SILENT
) -> tuple[CandidatePool, ChainDiagnostics]:
    """Run the chains until they have visited enough different texts.

    The pool holds every text that the chains visited after the burn-in, once: near ones and far ones, in the order of
    the first visit.

    Args:
        inputs: The two domains and the callables.
        config: Settings.
        size: Candidates wanted.
        rng: Source of all randomness.
        progress: Told of the candidates found.

    Returns:
        The pool, smaller than asked for (with a logged warning) if the chains keep returning to the same texts, and
        the chain's diagnostics.

    Raises:
        RunError: If no candidate was found at all.
    """
    started = time.perf_counter()
    space = AugmentationSpace(inputs, config)
    initial = space.draw(config.chains, rng)
    excluded = {normalised_hash(text) for text in inputs.target_inputs}
    limit = config.burn_in + 10 * math.ceil(size / config.chains)  # ten times the steps of a full harvest
    candidates: dict[str, tuple[Any, ...]] = {}
    history: list[tuple[NDArray[Any], ...]] = []
    with progress.stage("candidates", size) as advance:
        for states, proposal, accepted in itertools.islice(
            metropolis_hastings(initial, space.propose, space.score, rng), limit
        ):
            history.append((states.row, proposal.states.row, proposal.moves, accepted))
            if len(history) <= config.burn_in:
                continue
            before, columns = len(candidates), (states.row, states.base, states.operator, states.degree)
            for candidate in zip(*(column.tolist() for column in columns), strict=True):
                key = None if candidate[0] == FORBIDDEN else space.labelled.hashes[candidate[0]]
                if key is not None and key not in excluded and len(candidates) < size:
                    candidates.setdefault(key, candidate)
            advance(len(candidates) - before)
            if len(candidates) >= size:
                break
    if not candidates:
        raise RunError("the generator's chains found no candidate; raise generator.tau or generator.target_share")
    if len(candidates) < size:
        logger.warning("the pool holds %d of %d candidates; a larger tau gives more", len(candidates), size)
    pool = _assemble([np.array(column) for column in zip(*candidates.values(), strict=True)], inputs, space)
    rows, proposed, moves, was_accepted = (np.stack(part) for part in zip(*history, strict=True))
    changes_text = proposed != np.concatenate([initial.row[None], rows[:-1]])
    offered, taken = (np.bincount(moves[of], minlength=3) for of in (changes_text, changes_text & was_accepted))
    sampled, labelled = rows[config.burn_in :], space.labelled
    trace, plain = labelled.densities(sampled), np.concatenate([initial.row, proposed[moves == 0]])
    allowed = np.isfinite(trace).all(axis=0)
    return pool, ChainDiagnostics(
        steps=len(history),
        chains=config.chains,
        degree=space.degree,
        acceptance=dict(zip(MOVES, (taken / np.maximum(offered, 1)).tolist(), strict=True)),
        effective_sample_size=effective_sample_size(trace[:, allowed]) if allowed.any() else 0.0,
        proposal_log_density=_finite_mean(labelled.densities(plain)),
        sample_log_density=_finite_mean(trace),
        target_log_density=float(space.density.log_density(inputs.target_outputs.embeddings).mean()),
        distinct_share=len(np.unique(sampled)) / sampled.size,
        labelled_texts=len(labelled.inputs) - len(inputs.source_inputs) - len(inputs.target_inputs),
        labelling_seconds=labelled.labelling_seconds,
        seconds=time.perf_counter() - started,
    )


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
    means, padded = trace.mean(axis=0), 2 * steps
    power = np.abs(np.fft.rfft(trace - means, padded, axis=0)) ** 2
    covariance = (np.fft.irfft(power, padded, axis=0)[:steps] / steps).mean(axis=1) + means.var()
    pairs = covariance[: steps // 2 * 2].reshape(-1, 2).sum(axis=1) / total
    kept = pairs[: int(np.argmin(np.append(pairs, -1.0) > 0))]
    return float(np.clip(steps * chains / (2 * kept.sum() - 1), 1.0, steps * chains))


def _finite_mean(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _assemble(columns: Sequence[Ints], inputs: GeneratorInputs, space: AugmentationSpace) -> CandidatePool:
    (rows, bases, operators, degrees), sources = columns, len(inputs.source_inputs)
    outputs, operators = space.labelled.outputs(rows), np.where((degrees == 0) & (bases < sources), SOURCE, operators)
    return CandidatePool(
        inputs=tuple(space.labelled.inputs[row] for row in rows),
        origins=tuple(f"source:{base}" if base < sources else f"target:{base - sources}" for base in bases),
        operators=tuple(CHAIN_OPERATORS[operator] for operator in operators),
        degrees=degrees.astype(np.float32),
        teacher=outputs,
        log_density=space.labelled.densities(rows).astype(np.float32),
        domain_probability=expit(space.density.log_odds(outputs.embeddings)).astype(np.float32),
        max_target_cosine=max_cosine(outputs.embeddings, inputs.target_outputs.embeddings),
    )


def max_cosine(embeddings: NDArray[np.float32], references: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the cosine of each of N embeddings to the most similar reference, float32 (N,)."""
    one, other = (
        (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)).astype(np.float32)
        for rows in (embeddings, references)
    )
    nearest: NDArray[np.float32] = (one @ other.T).max(axis=1).astype(np.float32)
    return nearest
