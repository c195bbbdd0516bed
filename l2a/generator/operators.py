"""The registry of operators, and those that change tokens or copy texts: a new one is a function and a line.

AugPro is arXiv 2210.11768; that embedding-space points are projected back to tokens is stated by the paper, the closed
forms are our derivation. A token operator takes ``Slots`` of K tokens to int64 (K,), the tokens in their places.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from l2a.config import GeneratorConfig
from l2a.generator.tokens import Ints, Rewrite, Slots, Texts, TokenSpace, TokenStore, choose_slots, write_texts
from l2a.generator.words import MaskedCandidates, WordSources, eda, tinybert
from l2a.util.errors import UsageError, did_you_mean
from l2a.util.progress import SILENT, Progress

POSITIONS_AT_ONCE = 32


def augpro_mix(slots: Slots) -> Ints:
    """Interpolate each token with one of the partner's and project back, in O(1) a token.

    v = lambda E[x] + (1 - lambda) E[x'] is (1 - lambda) D away from E[x] and lambda D away from E[x'], so of the two
    ends the nearest is x' iff lambda < 1/2, which the degree is the probability of; a third word is rarely nearer.
    """
    return slots.store.offered(slots.places, slots.partners[slots.owners])


def knn(slots: Slots) -> Ints:
    """Take a uniformly chosen near neighbour of each token."""
    neighbours = slots.store.space.neighbours.ids.numpy()
    k = neighbours.shape[1]
    choice = np.minimum((slots.choice * np.float32(k)).astype(np.int64), k - 1)
    found: Ints = neighbours[slots.store.ids[slots.places], choice].astype(np.int64)
    return found


def augpro_fgsm(slots: Slots) -> Ints:
    """Take, for each token x, the neighbour w with the largest (E[w] - E[x]) . g.

    To first order this neighbour raises KL(teacher, student) most; it is the projection of a step along the gradient
    that is about as long as the way to the neighbours. Each text's gradient is computed once.

    Raises:
        ValueError: If a gradient has another shape than its text.
    """
    store, space = slots.store, slots.store.space
    missing = [row for row in np.unique(slots.rows).tolist() if store.steepest[store.starts[row]] < 0]
    if missing:
        if space.gradient is None:
            raise UsageError(
                "operator 'augpro_fgsm' reads the gradient of a teacher and a student; name both, or use knn"
            )
        gradients = space.gradient([store.inputs[row] for row in missing])
        for row, gradient in zip(missing, gradients, strict=True):
            wanted = (store.lengths[row], space.word_embeddings.shape[1])
            if gradient.shape != wanted:
                raise ValueError(f"gradient has shape {gradient.shape}; give {wanted}, one row for each token")
        places = np.concatenate([np.arange(store.starts[row], store.starts[row + 1]) for row in missing])
        store.steepest[places] = store.ids[places]
        is_open = store.slots[places] >= 0
        ids, slopes = torch.from_numpy(store.ids[places[is_open]]), torch.from_numpy(np.concatenate(gradients)[is_open])
        found = steepest_neighbours(ids, slopes, space.neighbours.ids, space.word_embeddings)
        store.steepest[places[is_open]] = found.numpy()
    return store.steepest[slots.places]


def steepest_neighbours(ids: Tensor, gradients: Tensor, neighbours: Tensor, embeddings: Tensor) -> Tensor:
    """Find the neighbour w of each token x with the largest (E[w] - E[x]) . g: ids int64 (P,), g float32 (P, d)."""
    candidates = neighbours.index_select(0, ids).long()
    scores = [gradients.new_empty(0, candidates.shape[1])]
    for some, points in zip(*(torch.split(part, POSITIONS_AT_ONCE) for part in (candidates, gradients)), strict=True):
        # index_select is many times as fast as embeddings[some] on the CPU
        rows = embeddings.index_select(0, some.flatten()).view(*some.shape, embeddings.shape[1])
        # The term E[x] . g is the same for all candidates of a position, so it cannot change the winner.
        scores.append(torch.bmm(rows, points[:, :, None]).squeeze(2))
    return candidates.gather(1, torch.cat(scores).argmax(dim=1, keepdim=True)).squeeze(1)


TextOperator = Callable[[Texts, Texts, float, np.random.Generator], list[Rewrite]]
"""B bases, a partner of the other domain for each, the share to change in (0, 1], and the source of all randomness, to
B new texts, in order."""


def copy_partners(sources: WordSources, bases: Texts, partners: Texts, *_: Any) -> list[Rewrite]:
    """Give the partners as they are; see ``TextOperator``."""
    return [Rewrite(partner, 0.0) for partner in partners]


def copy_bases(sources: WordSources, bases: Texts, *_: Any) -> list[Rewrite]:
    """Give the bases as they are; see ``TextOperator``."""
    return [Rewrite(base, 0.0) for base in bases]


def damage(
    sources: WordSources, bases: Texts, partners: Texts, degree: float, rng: np.random.Generator
) -> list[Rewrite]:
    """Drop a share of each side's words and shuffle the rest, as a control of selectors; see ``TextOperator``."""

    def damaged(side: str) -> str:
        words = rng.permutation(side.split())
        return " ".join(words[round(degree * len(words)) :] if len(words) > 1 else words)

    return [Rewrite(tuple(map(damaged, base)), 1.0) for base in bases]


@dataclass(frozen=True)
class Operator:
    """One way to make new examples.

    Attributes:
        name: As users write it.
        help: What it does, in a line.
        works_on: What it changes: some tokens, words, nothing (copies of texts), or the models' word embeddings.
        rewrite: For tokens, from ``Slots`` to the new tokens; for words and copies, from
            ``WordSources`` and the arguments of a ``TextOperator`` to new texts; None for embeddings, which no text
            can show: those are changed while a student is distilled.
        reads_partner: Whether it mixes in, or copies, the text of the other domain.
        reads_neighbours: Whether it reads the table of near tokens.
        needs_gradient: Whether it reads the gradient of a teacher and a student.
        default_degree: The share of words that its paper states; None takes that of the generator's settings.
    """

    name: str
    help: str
    works_on: Literal["tokens", "words", "copies", "embeddings"]
    rewrite: Any
    reads_partner: bool = False
    reads_neighbours: bool = False
    needs_gradient: bool = False
    default_degree: float | None = None


OPERATORS = {
    operator.name: operator
    for operator in (
        Operator("source", "an unchanged text of the source domain", "copies", copy_partners, reads_partner=True),
        Operator("augpro_mix", "tokens of a text of the other domain", "tokens", augpro_mix, reads_partner=True),
        Operator(
            "augpro_fgsm", "near tokens that part student and teacher", "tokens", augpro_fgsm,
            reads_neighbours=True, needs_gradient=True,
        ),
        Operator("knn", "random near tokens", "tokens", knn, reads_neighbours=True),
        Operator("eda", "synonyms, insertions, swaps, deletions", "words", eda, default_degree=0.1),
        Operator("tinybert", "words that fit in their place", "words", tinybert, default_degree=0.4),
        Operator("damaged", "some words dropped, the others shuffled", "words", damage),
        Operator("target_only", "an unchanged text of the target domain", "copies", copy_bases),
        Operator("mixkd", "interpolated word embeddings", "embeddings", None, reads_partner=True),
        Operator("unprojected_fgsm", "word embeddings along the gradient", "embeddings", None, needs_gradient=True),
    )
}  # fmt: skip
TEXT_OPERATORS = tuple(name for name, operator in OPERATORS.items() if operator.rewrite)
"""Those that make texts, each of which can run alone."""
SOURCE = 0
CHAIN_OPERATORS = ("source", *(name for name, operator in OPERATORS.items() if operator.works_on == "tokens"))
"""Those of the chains' states, in the order of their integer codes."""


def check_operators(config: GeneratorConfig) -> None:
    """Check the operators that a configuration names, before anything is trained.

    Args:
        config: Settings.

    Raises:
        UsageError: If one is unknown, or the chains could propose none.
    """
    if config.operator is not None and config.operator not in OPERATORS:
        hint = did_you_mean(config.operator, OPERATORS)
        raise UsageError(f"generator.operator is {config.operator!r}{hint}; give one of {', '.join(OPERATORS)}")
    words = [name for name, operator in OPERATORS.items() if operator.works_on == "words"]
    for field, names, known in (("operators", config.operators, CHAIN_OPERATORS), ("mixture", config.mixture, words)):
        for name in names:
            if name not in known:
                hint = did_you_mean(name, known)
                raise UsageError(f"generator.{field} names {name!r}{hint}; weigh {', '.join(known)}")
    operator_law(config, has_gradient=True)


def operator_law(config: GeneratorConfig, has_gradient: bool) -> NDArray[np.float64]:
    """Turn the weights into the probabilities with which the chains propose each of ``CHAIN_OPERATORS``, float64.

    Args:
        config: Settings; an operator that ``operators`` does not name weighs 1.
        has_gradient: Whether there is a student whose gradient can be read.

    Raises:
        UsageError: If no operator is left.
    """
    weights = np.array([config.operators.get(name, 1.0) for name in CHAIN_OPERATORS])
    if not has_gradient:
        weights[[OPERATORS[name].needs_gradient for name in CHAIN_OPERATORS]] = 0.0
    if weights.sum() == 0:
        can = "can run" if has_gradient else "can run without a student's gradient"
        names = ", ".join(CHAIN_OPERATORS)
        raise UsageError(f"generator.operators weighs no operator that {can}; give one of {names} a weight above 0")
    law: NDArray[np.float64] = weights / weights.sum()
    return law


def draw_changes(
    operator: Operator, store: TokenStore, rows: Ints, partners: Ints, degree: float, rng: np.random.Generator
) -> tuple[Slots, Ints]:
    """Draw which tokens change, each open one with probability ``degree``, and to what.

    Args:
        operator: One that works on tokens.
        store: The texts.
        rows: int64 (B,), numbers of the texts to change.
        partners: int64 (B,), numbers of their partners.
        degree: Probability that an open token changes.
        rng: Source of all randomness.

    Returns:
        K slots, and int64 (K,), the tokens that come into them.
    """
    read = np.concatenate([rows, partners]) if operator.reads_partner else rows
    u = rng.random((len(rows), int(store.lengths[read].max()), 2), dtype=np.float32)
    slots = choose_slots(store, rows, partners, u, degree)
    return slots, operator.rewrite(slots)


def build_operator(
    name: str,
    space: Callable[[], TokenSpace],
    masked: Callable[[], MaskedCandidates | None],
    progress: Progress = SILENT,
) -> TextOperator:
    """Make a text operator, loading only what it reads.

    Args:
        name: One of ``TEXT_OPERATORS``.
        space: Gives tokens, neighbours and gradients.
        masked: Gives a masked language model, or None where there is none.
        progress: Shows downloads.

    Returns:
        The operator.

    Raises:
        RunError: If a word list cannot be had.
        UsageError: If augpro_fgsm lacks its models.
    """
    operator = OPERATORS[name]
    if operator.works_on == "tokens":
        return partial(rewrite_tokens, operator, space())
    return partial(operator.rewrite, WordSources(masked, progress))


def rewrite_tokens(
    operator: Operator, space: TokenSpace, bases: Texts, partners: Texts, degree: float, rng: np.random.Generator
) -> list[Rewrite]:
    """Apply a token operator to a batch of texts; see ``TextOperator``."""
    if not bases:
        return []
    read = dict.fromkeys([*bases, *partners] if operator.reads_partner else bases)
    numbers = {text: number for number, text in enumerate(read)}
    rows = np.array([numbers[base] for base in bases])
    others = np.array([numbers[partner] for partner in partners]) if operator.reads_partner else rows
    return write_texts(*draw_changes(operator, space.tokenize(list(read)), rows, others, degree, rng))
