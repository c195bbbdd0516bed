"""The pool of candidates that a run of the chains brings in, and the counts for the diagnostics."""

import itertools
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from l2a.config import GeneratorConfig
from l2a.data.examples import TextInput, normalised_hash
from l2a.generator.chain import FORBIDDEN, MOVES, AugmentationSpace, GeneratorInputs, metropolis_hastings
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


class Candidate(NamedTuple):
    """A text of the pool and how it was made, as in ``AugmentationState``."""

    row: int
    base: int
    operator: int
    degree: float


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
    limit = config.burn_in + STEP_LIMIT_FACTOR * math.ceil(size / config.chains)
    candidates: dict[str, Candidate] = {}
    history: list[tuple[NDArray[Any], ...]] = []
    with progress.stage("candidates", size) as advance:
        for step in itertools.islice(metropolis_hastings(initial, space.propose, space.score, rng), limit):
            states, proposal, before = step.states, step.proposal, len(candidates)
            history.append((states.row, proposal.states.row, proposal.moves, step.accepted))
            if len(history) <= config.burn_in:
                continue
            columns = (states.row, states.base, states.operator, states.degree)
            for candidate in map(Candidate, *(column.tolist() for column in columns)):
                key = None if candidate.row == FORBIDDEN else space.labelled.hashes[candidate.row]
                if key is not None and key not in excluded and len(candidates) < size:
                    candidates.setdefault(key, candidate)
            advance(len(candidates) - before)
            if len(candidates) >= size:
                break
    if not candidates:
        raise RunError("the generator's chains found no candidate; raise generator.tau or generator.target_share")
    if len(candidates) < size:
        logger.warning("the pool holds %d of %d candidates; a larger tau gives more", len(candidates), size)
    target = float(space.density.log_density(inputs.target_outputs.embeddings).mean())
    rows, proposed, moves, accepted = (np.stack(part) for part in zip(*history, strict=True))
    changes_text = proposed != np.concatenate([initial.row[None], rows[:-1]])
    offered, taken = (np.bincount(moves[of], minlength=len(MOVES)) for of in (changes_text, changes_text & accepted))
    labelled, sampled = space.labelled, rows[config.burn_in :]
    trace = labelled.densities(sampled)
    allowed = np.isfinite(trace).all(axis=0)
    plain = np.concatenate([initial.row, proposed[moves == MOVES.index("jump")]])
    pool = _assemble(list(candidates.values()), inputs, space)
    return pool, ChainDiagnostics(
        steps=len(history),
        chains=config.chains,
        degree=space.degree,
        acceptance=dict(zip(MOVES, (taken / np.maximum(offered, 1)).tolist(), strict=True)),
        effective_sample_size=effective_sample_size(trace[:, allowed]) if allowed.any() else 0.0,
        proposal_log_density=_finite_mean(labelled.densities(plain)),
        sample_log_density=_finite_mean(trace),
        target_log_density=target,
        distinct_share=len(np.unique(sampled)) / sampled.size,
        labelled_texts=labelled.labelled,
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
    one, other = (
        (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)).astype(np.float32)
        for rows in (embeddings, references)
    )
    nearest: NDArray[np.float32] = (one @ other.T).max(axis=1).astype(np.float32)
    return nearest
