"""The target's density, cheaply, and chains of Metropolis-Hastings over augmented texts that sample near it.

The density is of averages of word embeddings, under a classifier of the two domains: it costs little more than
tokenizing, so that the teacher only reads those texts that are near. A candidate is made from a state z = (base text,
operator, partner, uniform numbers u) by a fixed map x = g(z). Plain proposals draw z from a base law mu; every move
redraws z from mu or a part of it given the rest, so it is reversible with respect to mu, and is accepted with
probability min(1, exp(score(z') - score(z))).
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from scipy import sparse, special
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from l2a.config import GeneratorConfig, resolve_degree
from l2a.data import Bools, Doubles, Floats, Ints, TextInput, normalised_hash
from l2a.generator.operators import CHAIN_OPERATORS, OPERATORS, SOURCE, operator_law
from l2a.generator.tokens import TokenSpace, choose_slots, unit_rows, write_texts
from l2a.teacher.labelling import Labeller, TeacherOutputs
from l2a.util import SILENT, Progress, RunError, UsageError, logger

Embed = Callable[[Sequence[TextInput]], Floats]
"""Embeds N texts: float32 (N, d)."""
Choice = Literal["near", "random", "far"]
RARE = 1e-3  # weight of a token of frequency p: RARE / (RARE + p)
BACKGROUND = 5000  # texts that stand for all the others when the target's density is fitted
EMBEDDED_AT_ONCE = 16_384


def token_ids(tokenizer: Any, inputs: Sequence[TextInput], max_length: int) -> list[list[int]]:
    """Tokenize N texts, both sides of a pair one after the other, without special tokens."""
    sides = [[text[side] for text in inputs] for side in range(len(inputs[0]) if inputs else 0)]
    encoded = [tokenizer.backend_tokenizer.encode_batch_fast(side, add_special_tokens=False) for side in sides]
    return [[token for one in parts for token in one.ids[:max_length]] for parts in zip(*encoded, strict=True)]


def fit_word_average(tokenizer: Any, embeddings: torch.Tensor, texts: Sequence[TextInput], max_length: int) -> Embed:
    """Embed texts by the average of their words' embeddings, in which frequent words count little.

    Source: smooth inverse frequency (Arora et al., ICLR 2017); the embeddings are centred on the vocabulary in place of
    the removal of their first component.

    Args:
        tokenizer: A fast tokenizer of transformers.
        embeddings: float32 (V, d), the word embeddings of an encoder in its order.
        texts: Texts whose words are counted.
        max_length: Tokens that are read of a text.

    Returns:
        What gives unit rows, float32 (N, d), for N texts; a text without any word is 0.
    """
    vectors = embeddings.detach().cpu().float().numpy()
    words = itertools.chain.from_iterable(token_ids(tokenizer, texts, max_length))
    counts = np.bincount(np.fromiter(words, np.int64), minlength=len(vectors))
    weights = RARE / (RARE + counts / max(1.0, counts.sum()))
    weighted = ((vectors - vectors.mean(0)) * weights[:, None]).astype(np.float32)

    def embed(inputs: Sequence[TextInput]) -> Floats:
        rows = token_ids(tokenizer, inputs, max_length)
        ends = np.cumsum([0, *map(len, rows)])
        ids = np.fromiter(itertools.chain.from_iterable(rows), np.int64, ends[-1])
        words = sparse.csr_array((np.ones(len(ids), np.float32), ids, ends), shape=(len(rows), len(weighted)))
        return unit_rows(np.asarray(words @ weighted, np.float32))

    return embed


@dataclass(frozen=True)
class TargetDensity:
    """A classifier of the two domains: its log odds estimate the log ratio of the target's density to the other's.

    They grow without bound along one direction, so a small tau makes caricatures.

    Attributes:
        mean: float64 (d,), of both domains.
        weights: float64 (d,), logistic regression of target against source.
        bias: Its intercept.
        location: Median of the log odds over the source texts.
        scale: Standard deviation of the log odds over both domains, each with half of the weight.
    """

    mean: Doubles
    weights: Doubles
    bias: float
    location: float = 0.0
    scale: float = 1.0

    def log_odds(self, embeddings: Floats) -> Doubles:
        """Log odds of the target, float64 (N,), from float32 (N, d); both domains are equally likely beforehand."""
        return np.asarray((embeddings - self.mean) @ self.weights + self.bias)

    def log_density(self, embeddings: Floats) -> Doubles:
        """Standardised log density: 0 for the median source text, in standard deviations over both domains.

        With half of the weight on each domain the mean target text is at most 2 above the mean source text, so the
        chain's temperature means the same whatever the domains, the embeddings' width and the number of target texts
        (our derivation).
        """
        return (self.log_odds(embeddings) - self.location) / self.scale


def fit_target_density(source: Floats, target: Floats) -> TargetDensity:
    """Fit the domain classifier and its scale on embeddings, float32, of other texts (S, d) and target texts (n, d).

    Raises:
        UsageError: If there are fewer than 2 texts of a domain.
    """
    if min(len(source), len(target)) < 2:
        counts = f"{len(source)} source and {len(target)} target texts"
        raise UsageError(f"the generator has {counts}; give at least 2 of each domain")
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
    scale = float(np.sqrt((of_source.var() + of_target.var()) / 2 + (of_target.mean() - of_source.mean()) ** 2 / 4))
    return replace(raw, location=float(np.median(of_source)), scale=max(scale, 1e-6))


def choose_texts(
    bank: Sequence[TextInput], target: Sequence[TextInput], count: int, choice: Choice, embed: Embed,
    rng: np.random.Generator, progress: Progress = SILENT,
) -> Ints:  # fmt: skip
    """Choose texts of a bank by their nearness to the target: int64, their places in the bank, in order.

    Args:
        bank: Any number of texts; they are read in order, some at a time.
        target: The labelled texts of the target.
        count: Texts to choose; the whole bank where it is smaller.
        choice: The nearest, random or the farthest ones.
        embed: Embeds texts.
        rng: Draws random texts, and those that stand for the bank where nearness is judged.
        progress: Shows the texts judged.
    """
    if count >= len(bank):
        return np.arange(len(bank))
    if choice == "random":
        chosen = rng.choice(len(bank), count, replace=False)
    else:
        few = np.sort(rng.choice(len(bank), min(BACKGROUND, len(bank)), replace=False))
        density = fit_target_density(embed([bank[i] for i in few]), embed(target))
        with progress.stage("texts near the target", len(bank)) as advance:
            odds = np.empty(len(bank))
            for places in np.split(np.arange(len(bank)), range(EMBEDDED_AT_ONCE, len(bank), EMBEDDED_AT_ONCE)):
                odds[places] = density.log_odds(embed([bank[i] for i in places]))
                advance(len(places))
        chosen = np.argpartition(-odds if choice == "near" else odds, count - 1)[:count]
    return np.sort(chosen)


def max_cosine(embeddings: Floats, references: Floats) -> Floats:
    """Return the cosine of each of N embeddings to the most similar reference, float32 (N,)."""
    return np.asarray((unit_rows(embeddings) @ unit_rows(references).T).max(axis=1))


MOVES = {"jump": 0.5, "local": 0.3, "partner": 0.2}  # with their probabilities
NEEDS_GRADIENT = np.array([OPERATORS[name].needs_gradient for name in CHAIN_OPERATORS])
States = TypeVar("States", bound=tuple[Any, ...])
"""The states of C chains: a named tuple of arrays whose first axis is the chain."""


def metropolis_hastings(
    initial: States, propose: Callable[[States, np.random.Generator], tuple[States, Ints]],
    score: Callable[[States], Doubles], rng: np.random.Generator,
) -> Iterator[tuple[States, States, Ints, Bools]]:  # fmt: skip
    """Run chains whose stationary density is proportional to exp(score) times the base law of the proposals.

    A score of minus infinity forbids a state; a chain that starts in one leaves it with the first allowed proposal.

    Args:
        initial: The starting states of C chains.
        propose: Draws one move for each chain, reversible with respect to the base law, and says of which kind.
        score: float64 (C,) log densities of states.
        rng: Source of all randomness.

    Yields:
        One step after the other, without end: the states after it and those that were proposed, which kind of move each
        chain was offered, int64 (C,), and whether it was accepted, bool (C,).
    """
    states, scores = initial, score(initial)
    while True:
        proposed, moves = propose(states, rng)
        offered = score(proposed)
        with np.errstate(invalid="ignore"):  # between two forbidden states; those are not exchanged
            accepted = rng.random(len(moves)) < np.exp(np.minimum(offered - scores, 0.0))
        states = choose_states(accepted, proposed, states)
        scores = np.where(accepted, offered, scores)
        yield states, proposed, moves, accepted


def choose_states(condition: Bools, first: States, second: States) -> States:
    """Choose between the states of two sets, chain by chain: the first where the condition, bool (C,), holds."""
    pairs = zip(first, second, strict=True)
    chosen = (np.where(condition.reshape(-1, *[1] * (one.ndim - 1)), one, other) for one, other in pairs)
    return type(first)(*chosen)


FORBIDDEN = -1


class VisitedTexts:
    """Numbers texts as they come, and keeps their log density.

    Attributes:
        inputs: The texts, by row.
        hashes: Their normalised hashes.
        log_density: Their standardised log target densities.
    """

    def __init__(self, embed: Embed, density: TargetDensity, forbidden_hashes: AbstractSet[str]) -> None:
        """Start empty; texts whose hashes are forbidden will get no row."""
        self.inputs: list[TextInput] = []
        self.hashes: list[str] = []
        self.log_density: list[float] = []
        self._rows: dict[TextInput, int] = {}
        self._embed, self._density, self._forbidden = embed, density, forbidden_hashes

    def rows(self, inputs: Sequence[TextInput]) -> Ints:
        """Look up the rows of texts, int64, -1 for forbidden ones; those that are new are embedded in one call."""
        new = {text: normalised_hash(text) for text in inputs if text not in self._rows}
        allowed = {text: key for text, key in new.items() if key not in self._forbidden}
        self._rows |= dict.fromkeys(new, FORBIDDEN)
        self._rows |= zip(allowed, range(len(self.inputs), len(self.inputs) + len(allowed)), strict=True)
        self.inputs += allowed
        self.hashes += allowed.values()
        if allowed:
            self.log_density += self._density.log_density(self._embed(list(allowed))).tolist()
        return np.array([self._rows[text] for text in inputs], dtype=np.int64)

    def densities(self, rows: Ints) -> Doubles:
        """Return the log densities of rows of any shape, minus infinity for forbidden texts."""
        return np.array([*self.log_density, -np.inf])[rows]  # FORBIDDEN is -1, the last place


class AugmentationState(NamedTuple):
    """The states of C chains; base and partner count source texts first, then unlabelled ones, then the target's.

    Attributes:
        base: int64 (C,).
        operator: int64 (C,), index into ``CHAIN_OPERATORS``.
        partner: int64 (C,), a text of the other domain.
        u: float32 (C, L, 2), uniform in [0, 1).
        row: int64 (C,), of the text g(z) among the visited texts; a note, not part of z.
        degree: float64 (C,), share of the base's tokens that g(z) changes; likewise.
    """

    base: Ints
    operator: Ints
    partner: Ints
    u: Floats
    row: Ints
    degree: Doubles


@dataclass(frozen=True)
class GeneratorInputs:
    """All that the generator reads.

    Attributes:
        source_inputs: S texts of the source domain.
        unlabelled: U texts of any origin, with where each comes from, such as "reviews.txt:17".
        target_inputs: The n labelled texts of the target domain.
        embed: Embeds texts, cheaply: the chains' density is of these embeddings.
        space: Tokens, neighbours and gradient; without a gradient augpro_fgsm is left out.
        labeller: Labels the pool with the teacher.
        forbidden_hashes: Normalised hashes of the test texts, which are never drawn.
    """

    source_inputs: tuple[TextInput, ...]
    unlabelled: Mapping[TextInput, str]
    target_inputs: tuple[TextInput, ...]
    embed: Embed
    space: TokenSpace
    labeller: Labeller
    forbidden_hashes: AbstractSet[str]


class AugmentationSpace:
    """Draws, moves and scores states.

    Attributes:
        density: How near a text is to the target.
        degree: Probability that an operator changes an open token, the mean where there are several.
        visited: What the chains came to.
    """

    def __init__(self, inputs: GeneratorInputs, config: GeneratorConfig) -> None:
        """Fit the density and tokenize the texts.

        Raises:
            UsageError: If a domain has fewer than 2 texts, or no operator is left.
        """
        self._config = config
        others = (*inputs.source_inputs, *inputs.unlabelled)
        self.density = fit_target_density(inputs.embed(others), inputs.embed(inputs.target_inputs))
        self.visited = VisitedTexts(inputs.embed, self.density, inputs.forbidden_hashes)
        self._store = inputs.space.tokenize(others + inputs.target_inputs)
        self._longest = int(self._store.lengths.max())
        self._source_count, self._other_count = len(inputs.source_inputs), len(others)
        usual = resolve_degree(config.degree, self._source_count + len(inputs.target_inputs))
        self._degrees = np.array(config.degrees or (usual,))
        self.degree = float(self._degrees.mean())
        unlabelled_share = len(inputs.unlabelled) / len(others)
        self._operator_law = operator_law(config, inputs.space.gradient is not None, unlabelled_share)

    def draw(self, count: int, rng: np.random.Generator) -> AugmentationState:
        """Draw independent states of ``count`` chains from the base law mu, with their texts labelled."""
        return self._with_texts(self._draw(count, rng))

    def propose(self, states: AugmentationState, rng: np.random.Generator) -> tuple[AugmentationState, Ints]:
        """Propose a jump (all redrawn), a local move (u redrawn on a block) or a new partner, for each chain."""
        count = len(states.base)
        moves = rng.choice(len(MOVES), size=count, p=list(MOVES.values()))
        fresh = self._draw(count, rng)
        lengths, places = self._store.lengths[states.base], np.arange(self._longest)
        start = rng.integers(0, lengths)[:, None]
        block = (places >= start) & (places < start + rng.integers(1, lengths // 2 + 2)[:, None])
        local = states._replace(u=np.where(block[:, :, None], fresh.u, states.u))
        partner = states._replace(partner=self._draw_from(states.base < self._other_count, rng))
        moved = choose_states(moves == 0, fresh, choose_states(moves == 1, local, partner))
        return self._with_texts(moved), moves

    def score(self, states: AugmentationState) -> Doubles:
        """Return the log density of states with respect to mu, up to a constant; minus infinity for forbidden texts."""
        density = self.visited.densities(states.row)
        # Minus infinity stays, at an infinite temperature too.
        np.divide(density, self._config.tau, out=density, where=np.isfinite(density))
        return density - self._config.beta * np.maximum(0.0, states.degree - self._config.max_degree)

    def _draw(self, count: int, rng: np.random.Generator) -> AugmentationState:
        operator = rng.choice(len(CHAIN_OPERATORS), size=count, p=self._operator_law)
        in_target = (rng.random(count) < self._config.target_share) & (operator != SOURCE)
        # The gradient reads the teacher's labels, which unlabelled texts do not have yet.
        base = self._draw_from(in_target, rng, NEEDS_GRADIENT[operator])
        u = rng.random((count, self._longest, 2), dtype=np.float32)
        partner = self._draw_from(base < self._other_count, rng)
        return AugmentationState(base, operator, partner, u, np.zeros(count, np.int64), np.zeros(count))

    def _draw_from(self, in_target: Bools, rng: np.random.Generator, labelled: Bools | bool = False) -> Ints:
        other = rng.integers(0, np.where(labelled, self._source_count, self._other_count), size=len(in_target))
        target = rng.integers(self._other_count, len(self._store.inputs), size=len(in_target))
        return np.where(in_target, target, other)

    def _with_texts(self, states: AugmentationState) -> AugmentationState:
        texts, degree = self.project(states)
        return states._replace(row=self.visited.rows(texts), degree=degree)

    def project(self, states: AugmentationState) -> tuple[list[TextInput], Doubles]:
        """Apply each state's operator, x = g(z): C texts, and float64 (C,), the changed share of the base's tokens."""
        texts, degree = [self._store.inputs[base] for base in states.base], np.zeros(len(states.base))
        for code, name in enumerate(CHAIN_OPERATORS):
            chains = np.flatnonzero(states.operator == code)
            if code == SOURCE or not len(chains):
                continue
            base, partner, u = states.base[chains], states.partner[chains], states.u[chains]
            # The place of a text's first token, which is special and stays, is free to draw the degree.
            degrees = self._degrees[(u[:, 0, 1] * np.float32(len(self._degrees))).astype(np.int64)]
            slots = choose_slots(self._store, base, partner, u, degrees)
            for chain, made in zip(chains, write_texts(slots, OPERATORS[name].rewrite(slots)), strict=True):
                texts[chain], degree[chain] = made
        return texts, degree


@dataclass(frozen=True)
class CandidatePool:
    """N candidates, all different, none a test text or one of the target's labelled texts.

    Attributes:
        inputs: The texts.
        origins: The text that each was made from, such as "source:17" or "target:3".
        operators: The operator that made it; a text that came through unchanged counts as "source".
        degrees: float32 (N,), realised share of changed tokens.
        teacher: The teacher's outputs.
        log_density: float32 (N,), standardised log target density.
        domain_probability: float32 (N,), of the target domain.
        max_target_cosine: float32 (N,), to the nearest of the target's labelled texts.
    """

    inputs: tuple[TextInput, ...]
    origins: tuple[str, ...]
    operators: tuple[str, ...]
    degrees: Floats
    teacher: TeacherOutputs
    log_density: Floats
    domain_probability: Floats
    max_target_cosine: Floats

    def __len__(self) -> int:
        """Return the number of candidates."""
        return len(self.inputs)


Diagnostics = Mapping[str, Any]
"""Facts about one run of the chains, as JSON holds them; ``draw_pool`` names them."""


def draw_pool(
    inputs: GeneratorInputs, config: GeneratorConfig, size: int, rng: np.random.Generator, progress: Progress = SILENT
) -> tuple[CandidatePool, Diagnostics]:
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
        The pool, smaller than requested (with a logged warning) if the chains keep returning to the same texts, and
        the chains' diagnostics:
            "steps": Steps of each chain, burn-in included.
            "chains": Chains side by side.
            "degree": Probability with which operators changed a slot.
            "acceptance": By kind of move: accepted share of the proposals that would change the text.
            "proposal_log_density": Mean standardised log density of plain proposals.
            "sample_log_density": Mean over the samples of the chain.
            "target_log_density": Mean over the target texts that the density was fitted on.
            "distinct_share": Distinct texts among the samples.
            "visited_texts": Different texts that were embedded.
            "labelling_seconds": Wall seconds that the teacher took to label the pool.
            "seconds": Wall seconds in all.

    Raises:
        RunError: If no candidate was found at all.
    """
    started = time.perf_counter()
    space = AugmentationSpace(inputs, config)
    initial = space.draw(config.chains, rng)
    excluded = {normalised_hash(text) for text in inputs.target_inputs}
    limit = config.burn_in + 10 * math.ceil(size / config.chains)  # ten times the steps of a full harvest
    candidates: dict[str, tuple[Any, ...]] = {}
    history: list[tuple[np.typing.NDArray[Any], ...]] = []
    with progress.stage("candidates", size) as advance:
        steps = metropolis_hastings(initial, space.propose, space.score, rng)
        for states, proposed_states, kinds, accepted in itertools.islice(steps, limit):
            history.append((states.row, proposed_states.row, kinds, accepted))
            if len(history) <= config.burn_in:
                continue
            before, columns = len(candidates), (states.row, states.base, states.operator, states.degree)
            for candidate in zip(*(column.tolist() for column in columns), strict=True):
                key = None if candidate[0] == FORBIDDEN else space.visited.hashes[candidate[0]]
                if key is not None and key not in excluded and len(candidates) < size:
                    candidates.setdefault(key, candidate)
            advance(len(candidates) - before)
            if len(candidates) >= size:
                break
    if not candidates:
        raise RunError("the generator's chains found no candidate; raise generator.tau or generator.target_share")
    if len(candidates) < size:
        logger.warning("the pool holds %d of %d candidates; a larger tau gives more", len(candidates), size)
    drawn = time.perf_counter()
    pool = _assemble([np.array(column) for column in zip(*candidates.values(), strict=True)], inputs, space)
    labelling_seconds = time.perf_counter() - drawn
    rows, proposed, moves, was_accepted = (np.stack(part) for part in zip(*history, strict=True))
    changes_text = proposed != np.concatenate([initial.row[None], rows[:-1]])
    offered, taken = (np.bincount(moves[of], minlength=3) for of in (changes_text, changes_text & was_accepted))
    sampled, visited = rows[config.burn_in :], space.visited
    plain = np.concatenate([initial.row, proposed[moves == 0]])
    return pool, {
        "steps": len(history), "chains": config.chains, "degree": space.degree,
        "acceptance": dict(zip(MOVES, (taken / np.maximum(offered, 1)).tolist(), strict=True)),
        "proposal_log_density": _finite_mean(visited.densities(plain)),
        "sample_log_density": _finite_mean(visited.densities(sampled)),
        "target_log_density": float(space.density.log_density(inputs.embed(inputs.target_inputs)).mean()),
        "distinct_share": len(np.unique(sampled)) / sampled.size, "visited_texts": len(visited.inputs),
        "labelling_seconds": labelling_seconds, "seconds": time.perf_counter() - started,
    }  # fmt: skip


def _finite_mean(values: Doubles) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _assemble(columns: Sequence[Ints], inputs: GeneratorInputs, space: AugmentationSpace) -> CandidatePool:
    rows, bases, operators, degrees = columns
    texts, density = tuple(space.visited.inputs[row] for row in rows), space.visited.densities(rows)
    origins = [*(f"source:{i}" for i in range(len(inputs.source_inputs))), *inputs.unlabelled.values()]
    is_unchanged = (degrees == 0) & (bases < len(origins))
    origins += [f"target:{i}" for i in range(len(inputs.target_inputs))]
    outputs = inputs.labeller(texts)
    return CandidatePool(
        texts, tuple(origins[base] for base in bases),
        tuple(CHAIN_OPERATORS[operator] for operator in np.where(is_unchanged, SOURCE, operators)),
        degrees.astype(np.float32), outputs, density.astype(np.float32),
        domain_probability=special.expit(density * space.density.scale + space.density.location).astype(np.float32),
        max_target_cosine=max_cosine(outputs.embeddings, inputs.labeller(inputs.target_inputs).embeddings),
    )  # fmt: skip
