"""What a run of the chains has brought in: candidates, and the counts for the diagnostics."""

import itertools
import logging
import math
import time
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l2a.config import OPERATORS, GeneratorConfig, resolve_degree
from l2a.data.examples import TextInput, normalised_hash
from l2a.generator.chain import (
    MOVES,
    SOURCE,
    AugmentationSpace,
    AugmentationState,
    ChainDiagnostics,
    ChainStep,
    effective_sample_size,
    metropolis_hastings,
)
from l2a.generator.density import FORBIDDEN, LabelledTexts, TargetDensity, fit_target_density
from l2a.generator.tokens import GeneratorInputs, tokenize_corpus
from l2a.teacher.store import TeacherOutputs
from l2a.util.errors import RunError
from l2a.util.progress import SILENT, Progress


@dataclass(frozen=True)
class Candidate:
    """One text of the pool and how it was made.

    Attributes:
        row: Of the text among the labelled texts.
        base: Index of the base text, source texts first.
        operator: Index into ``OPERATORS``.
        degree: Share of changed tokens.
    """

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
        self, initial: AugmentationState, labelled: LabelledTexts, excluded_hashes: AbstractSet[str], size: int
    ) -> None:
        """Start before the first step.

        Args:
            initial: The states that the chains start in, drawn from the base law.
            labelled: The texts of the rows.
            excluded_hashes: Normalised hashes of texts that are no candidates, though the chains may visit them.
            size: Candidates wanted.
        """
        self.candidates: dict[str, Candidate] = {}
        self.steps = 0
        self._labelled, self._excluded, self._size = labelled, excluded_hashes, size
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
        for row, base, operator, degree in zip(
            states.row.tolist(), states.base.tolist(), states.operator.tolist(), states.degree.tolist(), strict=True
        ):
            if row == FORBIDDEN or self.is_full:
                continue
            key = self._labelled.hashes[row]
            if key not in self._excluded:
                self.candidates.setdefault(key, Candidate(row, base, operator, degree))
        return len(self.candidates) - before

    def acceptance(self) -> dict[str, float]:
        """Return the accepted share, by kind of move, of the proposals that would have changed the text."""
        shares = self._accepted / np.maximum(self._offered, 1)
        return dict(zip(MOVES, shares.tolist(), strict=True))

    def plain_log_density(self) -> float:
        """Return the mean log density of the draws from the base law: the starts and all jumps proposed."""
        return _finite_mean(self._labelled.densities(np.concatenate(self._plain_rows)))

    def sample_log_density(self) -> float:
        """Return the mean log density of the chains' samples."""
        return _finite_mean(self._labelled.densities(np.concatenate(self._sampled_rows)))

    def effective_sample_size(self) -> float:
        """Return the effective sample size of the log density over all chains."""
        trace = np.stack([self._labelled.densities(rows) for rows in self._sampled_rows])
        allowed = np.isfinite(trace).all(axis=0)
        return effective_sample_size(trace[:, allowed]) if allowed.any() else 0.0

    def distinct_share(self) -> float:
        """Return the share of different texts among the chains' samples."""
        rows = np.concatenate(self._sampled_rows)
        return len(np.unique(rows)) / len(rows)


def _finite_mean(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


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


def draw_pool(
    problem: GeneratorInputs, config: GeneratorConfig, size: int, rng: np.random.Generator, progress: Progress = SILENT
) -> tuple[CandidatePool, ChainDiagnostics]:
    """Run the chains until they have visited enough different texts.

    The pool holds every text that the chains visited after the burn-in, once: near ones and far ones, in the order of
    the first visit.

    Args:
        problem: The two domains and the callables.
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
    density = fit_target_density(problem.source_outputs.embeddings, problem.target_outputs.embeddings, config.density)
    labelled = _known_texts(problem, density)
    corpus = tokenize_corpus(labelled.inputs, problem.tokenizer, problem.max_length, problem.neighbours)
    degree = resolve_degree(config.degree, len(corpus.inputs))
    space = AugmentationSpace(problem, config, degree, corpus, labelled)
    harvest = _run_chains(space, labelled, problem, config, size, rng, progress)
    pool = _assemble(list(harvest.candidates.values()), problem, density, labelled)
    target_log_density = float(density.log_density(problem.target_outputs.embeddings).mean())
    return pool, _diagnose(harvest, config, degree, labelled, target_log_density, time.perf_counter() - started)


def _known_texts(problem: GeneratorInputs, density: TargetDensity) -> LabelledTexts:
    source, target = problem.source_outputs, problem.target_outputs
    outputs = TeacherOutputs(
        np.concatenate([source.logits, target.logits]), np.concatenate([source.embeddings, target.embeddings])
    )
    inputs = problem.source_inputs + problem.target_inputs
    return LabelledTexts(inputs, outputs, density, problem.labeller, problem.forbidden_hashes)


def _run_chains(
    space: AugmentationSpace,
    labelled: LabelledTexts,
    problem: GeneratorInputs,
    config: GeneratorConfig,
    size: int,
    rng: np.random.Generator,
    progress: Progress,
) -> Harvest:
    initial = space.draw(config.chains, rng)
    harvest = Harvest(initial, labelled, {normalised_hash(text) for text in problem.target_inputs}, size)
    limit = config.burn_in + STEP_LIMIT_FACTOR * math.ceil(size / config.chains)
    with progress.stage("candidates", size) as advance:
        for step in itertools.islice(metropolis_hastings(initial, space.propose, space.score, rng), limit):
            harvest.count(step)
            if harvest.steps > config.burn_in:
                advance(harvest.collect(step.states))
            if harvest.is_full:
                break
    if not harvest.candidates:
        raise RunError("generator: the chains found no candidate; raise generator.tau or generator.target_share")
    if not harvest.is_full:
        logger.warning("the pool holds %d of %d candidates; a larger tau gives more", len(harvest.candidates), size)
    return harvest


def _assemble(
    candidates: list[Candidate], problem: GeneratorInputs, density: TargetDensity, labelled: LabelledTexts
) -> CandidatePool:
    rows = np.array([candidate.row for candidate in candidates], dtype=np.int64)
    outputs = labelled.outputs(rows)
    return CandidatePool(
        inputs=tuple(labelled.inputs[row] for row in rows),
        origins=tuple(_origin(candidate.base, len(problem.source_inputs)) for candidate in candidates),
        operators=tuple(_operator_name(candidate, len(problem.source_inputs)) for candidate in candidates),
        degrees=np.array([candidate.degree for candidate in candidates], dtype=np.float32),
        teacher=outputs,
        log_density=labelled.densities(rows).astype(np.float32),
        domain_probability=density.domain_probability(outputs.embeddings).astype(np.float32),
        max_target_cosine=max_cosine(outputs.embeddings, problem.target_outputs.embeddings),
    )


def _origin(base: int, source_count: int) -> str:
    return f"source:{base}" if base < source_count else f"target:{base - source_count}"


def _operator_name(candidate: Candidate, source_count: int) -> str:
    is_copy = candidate.degree == 0 and candidate.base < source_count
    return OPERATORS[SOURCE if is_copy else candidate.operator]


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


def _diagnose(
    harvest: Harvest,
    config: GeneratorConfig,
    degree: float,
    labelled: LabelledTexts,
    target_log_density: float,
    seconds: float,
) -> ChainDiagnostics:
    return ChainDiagnostics(
        steps=harvest.steps,
        chains=config.chains,
        degree=degree,
        acceptance=harvest.acceptance(),
        effective_sample_size=harvest.effective_sample_size(),
        proposal_log_density=harvest.plain_log_density(),
        sample_log_density=harvest.sample_log_density(),
        target_log_density=target_log_density,
        distinct_share=harvest.distinct_share(),
        labelled_texts=labelled.labelled,
        labelling_seconds=labelled.labelling_seconds,
        seconds=seconds,
    )
