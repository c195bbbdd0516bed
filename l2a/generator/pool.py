"""The pool of candidates that a run of the chains brings in, and the counts for the diagnostics."""

import itertools
import logging
import math
import time
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from l2a.config import GeneratorConfig
from l2a.data.examples import TextInput, normalised_hash
from l2a.generator.chain import (
    FORBIDDEN,
    MOVES,
    AugmentationSpace,
    AugmentationState,
    ChainStep,
    GeneratorInputs,
    metropolis_hastings,
)
from l2a.generator.operators import CHAIN_OPERATORS, SOURCE
from l2a.teacher.labelling import TeacherOutputs
from l2a.util.errors import RunError
from l2a.util.progress import SILENT, Progress

STEP_LIMIT_FACTOR = 10
"""The chains stop when the pool is full, or after this many times the steps that a full harvest would take."""
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
    harvest = Harvest(space, initial, {normalised_hash(text) for text in inputs.target_inputs}, size)
    limit = config.burn_in + STEP_LIMIT_FACTOR * math.ceil(size / config.chains)
    with progress.stage("candidates", size) as advance:
        for step in itertools.islice(metropolis_hastings(initial, space.propose, space.score, rng), limit):
            harvest.count(step)
            if harvest.steps > config.burn_in:
                advance(harvest.collect(step.states))
            if harvest.is_full:
                break
    if not harvest.candidates:
        raise RunError("the generator's chains found no candidate; raise generator.tau or generator.target_share")
    if not harvest.is_full:
        logger.warning("the pool holds %d of %d candidates; a larger tau gives more", len(harvest.candidates), size)
    pool = _assemble(list(harvest.candidates.values()), inputs, space)
    target = float(space.density.log_density(inputs.target_outputs.embeddings).mean())
    return pool, harvest.diagnostics(target, time.perf_counter() - started)


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


class Candidate(NamedTuple):
    """A text of the pool and how it was made, as in ``AugmentationState``."""

    row: int
    base: int
    operator: int
    degree: float


class Harvest:
    """Collects different texts from the chains' states.

    Attributes:
        candidates: By normalised hash, in the order of the first visit.
        steps: Steps seen.
    """

    def __init__(
        self, space: AugmentationSpace, initial: AugmentationState, excluded_hashes: AbstractSet[str], size: int
    ) -> None:
        """Start before the first step.

        Args:
            space: Labels the texts.
            initial: The states that the chains start in, drawn from the base law.
            excluded_hashes: Normalised hashes of texts that are no candidates, though the chains may visit them.
            size: Candidates wanted.
        """
        self.candidates: dict[str, Candidate] = {}
        self.steps = 0
        self._space, self._excluded, self._size = space, excluded_hashes, size
        self._rows = initial.row
        self._plain_rows = [initial.row]
        self._sampled_rows: list[NDArray[np.int64]] = []
        self._offered = np.zeros(len(MOVES), dtype=np.int64)
        self._accepted = np.zeros(len(MOVES), dtype=np.int64)

    @property
    def is_full(self) -> bool:
        """Whether all candidates wanted have been found."""
        return len(self.candidates) >= self._size

    def count(self, step: ChainStep[AugmentationState]) -> None:
        """Count what a step offered and accepted.

        Args:
            step: Of all chains.
        """
        moves, proposed = step.proposal.moves, step.proposal.states.row
        changes_text = proposed != self._rows
        self._offered += np.bincount(moves[changes_text], minlength=len(MOVES))
        self._accepted += np.bincount(moves[changes_text & step.accepted], minlength=len(MOVES))
        self._plain_rows.append(proposed[moves == MOVES.index("jump")])
        self._rows = step.states.row
        self.steps += 1

    def collect(self, states: AugmentationState) -> int:
        """Take the texts that the chains are in.

        Args:
            states: Of all chains, after the burn-in.

        Returns:
            How many of them are new candidates.
        """
        before = len(self.candidates)
        self._sampled_rows.append(states.row)
        columns = (states.row.tolist(), states.base.tolist(), states.operator.tolist(), states.degree.tolist())
        for candidate in itertools.starmap(Candidate, zip(*columns, strict=True)):
            if candidate.row == FORBIDDEN or self.is_full:
                continue
            key = self._space.labelled.hashes[candidate.row]
            if key not in self._excluded:
                self.candidates.setdefault(key, candidate)
        return len(self.candidates) - before

    def diagnostics(self, target_log_density: float, seconds: float) -> ChainDiagnostics:
        """Say how well the chains moved.

        Args:
            target_log_density: Mean over the target texts.
            seconds: Wall seconds in all.

        Returns:
            The facts.
        """
        labelled, sampled = self._space.labelled, np.stack(self._sampled_rows)
        trace = labelled.densities(sampled)
        allowed = np.isfinite(trace).all(axis=0)
        return ChainDiagnostics(
            steps=self.steps,
            chains=sampled.shape[1],
            degree=self._space.degree,
            acceptance=dict(zip(MOVES, (self._accepted / np.maximum(self._offered, 1)).tolist(), strict=True)),
            effective_sample_size=effective_sample_size(trace[:, allowed]) if allowed.any() else 0.0,
            proposal_log_density=_finite_mean(labelled.densities(np.concatenate(self._plain_rows))),
            sample_log_density=_finite_mean(trace),
            target_log_density=target_log_density,
            distinct_share=len(np.unique(sampled)) / sampled.size,
            labelled_texts=labelled.labelled,
            labelling_seconds=labelled.labelling_seconds,
            seconds=seconds,
        )


def _finite_mean(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _assemble(candidates: list[Candidate], inputs: GeneratorInputs, space: AugmentationSpace) -> CandidatePool:
    rows, sources = np.array([candidate.row for candidate in candidates]), len(inputs.source_inputs)
    outputs = space.labelled.outputs(rows)
    return CandidatePool(
        inputs=tuple(space.labelled.inputs[row] for row in rows),
        origins=tuple(
            f"source:{one.base}" if one.base < sources else f"target:{one.base - sources}" for one in candidates
        ),
        operators=tuple(
            CHAIN_OPERATORS[SOURCE if one.degree == 0 and one.base < sources else one.operator] for one in candidates
        ),
        degrees=np.array([candidate.degree for candidate in candidates], dtype=np.float32),
        teacher=outputs,
        log_density=space.labelled.densities(rows).astype(np.float32),
        domain_probability=expit(space.density.log_odds(outputs.embeddings)).astype(np.float32),
        max_target_cosine=max_cosine(outputs.embeddings, inputs.target_outputs.embeddings),
    )


def max_cosine(embeddings: NDArray[np.float32], references: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return each row's cosine to the reference that is most like it.

    Args:
        embeddings: float32 (N, d).
        references: float32 (n, d).

    Returns:
        float32 (N,).
    """
    nearest: NDArray[np.float32] = (_unit(embeddings) @ _unit(references).T).max(axis=1).astype(np.float32)
    return nearest


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    scaled: NDArray[np.float32] = (rows / lengths).astype(np.float32)
    return scaled
