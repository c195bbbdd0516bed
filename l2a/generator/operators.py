"""The token operators: each maps tokens and given randomness to tokens, for a whole batch at once.

All take ``u``, float32 (B, L, 2) uniform in [0, 1): ``u[..., 0]`` decides whether a position changes, ``u[..., 1]``
to what. Only open slots change (``slots`` is not -1), so special tokens, numbers and punctuation stay. AugPro is
arXiv 2210.11768; that embedding-space points are projected back to tokens is stated by the paper, the closed forms
are our derivation.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from l2a.data.examples import TextInput
from l2a.generator.lexicons import load_glove, load_wordnet
from l2a.generator.tokens import (
    FROZEN,
    FlatTexts,
    Gradient,
    Ints,
    NeighbourTable,
    TokenChanges,
    flatten_texts,
    splice,
    vocabulary,
)
from l2a.generator.words import (
    CANDIDATES,
    Eda,
    MaskedCandidates,
    Rewrite,
    TextOperator,
    TinyBertAugmentation,
    copy_bases,
    copy_partners,
)
from l2a.util.errors import UsageError
from l2a.util.progress import SILENT, Progress

POSITIONS_AT_ONCE = 32


def changed_positions(slots: Tensor, u: Tensor, degree: float) -> Tensor:
    """Choose the positions to change: each open slot with probability ``degree``.

    Args:
        slots: int8 (B, L).
        u: float32 (B, L, 2).
        degree: In (0, 1].

    Returns:
        bool (B, L).
    """
    return (slots != FROZEN) & (u[..., 0] < degree)


def mix_weights(u: Tensor, degree: float) -> Tensor:
    """Turn uniform numbers into interpolation weights lambda with P(lambda < 1/2) = ``degree``.

    Args:
        u: float32 (B, L, 2).
        degree: In (0, 1].

    Returns:
        float32 (B, L), the weight of the text's own token, in [0, 1).
    """
    decide = u[..., 0]
    return torch.where(decide < degree, decide / (2 * degree), 0.5 + (decide - degree) / (2 * max(1 - degree, 1e-9)))


def mix_tokens(ids: Tensor, slots: Tensor, partner_ids: Tensor, u: Tensor, degree: float) -> Tensor:
    """AugPro-Mix: interpolate with the partner's tokens and project back, in O(1) a token.

    v = lambda E[x] + (1 - lambda) E[x'] is (1 - lambda) D away from E[x] and lambda D away from E[x'], so of the two
    ends the nearest is x' iff lambda < 1/2, and a third word is rarely nearer than both.

    Args:
        ids: int64 (B, L).
        slots: int8 (B, L).
        partner_ids: int64 (B, L), aligned by ``align_partners``.
        u: float32 (B, L, 2).
        degree: P(lambda < 1/2).

    Returns:
        int64 (B, L).
    """
    return torch.where(changed_positions(slots, u, degree), partner_ids, ids)


def mix_tokens_between(
    ids: Tensor, slots: Tensor, partner_ids: Tensor, u: Tensor, degree: float, table: NeighbourTable, directions: Tensor
) -> Tensor:
    """AugPro-Mix without the ends: a third word near the segment that joins the two tokens.

    The candidates are the neighbours of both tokens; lambda is ``u[..., 1]``, the nearest direction to
    lambda E[x] + (1 - lambda) E[x'] wins.

    Args:
        ids: int64 (B, L).
        slots: int8 (B, L).
        partner_ids: int64 (B, L), aligned by ``align_partners``.
        u: float32 (B, L, 2).
        degree: Probability that a position changes.
        table: Neighbours of every token.
        directions: float32 (V, d), E, rows of length 1 (``unit_rows``).

    Returns:
        int64 (B, L).
    """
    where = changed_positions(slots, u, degree)
    own, other, weight = ids[where], partner_ids[where], u[..., 1][where][:, None]
    candidates = torch.cat([table.ids.index_select(0, own), table.ids.index_select(0, other)], dim=1).long()
    points = weight * directions.index_select(0, own) + (1 - weight) * directions.index_select(0, other)
    scores = _products(candidates, points, directions)
    is_end = (candidates == own[:, None]) | (candidates == other[:, None])
    return ids.masked_scatter(where, _best(candidates, scores.masked_fill(is_end, -torch.inf)))


def knn_tokens(ids: Tensor, slots: Tensor, u: Tensor, degree: float, table: NeighbourTable) -> Tensor:
    """Token replacement: a uniformly chosen near neighbour of the token.

    Args:
        ids: int64 (B, L).
        slots: int8 (B, L).
        u: float32 (B, L, 2).
        degree: Probability that a position changes.
        table: Neighbours of every token.

    Returns:
        int64 (B, L).
    """
    return torch.where(changed_positions(slots, u, degree), random_neighbours(ids, u[..., 1], table), ids)


def random_neighbours(ids: Tensor, u: Tensor, table: NeighbourTable) -> Tensor:
    """Choose one of the neighbours of each token.

    Args:
        ids: int64, of any shape.
        u: float32, of that shape, uniform in [0, 1).
        table: Neighbours of every token.

    Returns:
        int64, of that shape.
    """
    k = table.ids.shape[1]
    choice = (u * k).long().clamp_max(k - 1)
    return table.ids[ids, choice].long()


def fgsm_replacements(
    ids: Tensor, slots: Tensor, gradients: Tensor, table: NeighbourTable, embeddings: Tensor
) -> Tensor:
    """AugPro-FGSM's token for every open slot: the neighbour w with the largest (E[w] - E[x]) . g.

    To first order this neighbour raises the loss most; it is the projection of a step along the gradient that is
    about as long as the way to the neighbours.

    Args:
        ids: int64 (B, L).
        slots: int8 (B, L).
        gradients: float32 (B, L, d), of KL(teacher, student) with respect to the word embeddings.
        table: Neighbours of every token.
        embeddings: float32 (V, d).

    Returns:
        int64 (B, L); the token itself where the slot is closed.
    """
    where = slots != FROZEN
    return ids.masked_scatter(where, steepest_neighbours(ids[where], gradients[where], table, embeddings))


def steepest_neighbours(ids: Tensor, gradients: Tensor, table: NeighbourTable, embeddings: Tensor) -> Tensor:
    """Find the neighbour w of each token x with the largest (E[w] - E[x]) . g.

    Args:
        ids: int64 (P,).
        gradients: float32 (P, d).
        table: Neighbours of every token.
        embeddings: float32 (V, d).

    Returns:
        int64 (P,).
    """
    candidates = table.ids.index_select(0, ids).long()
    # The term E[x] . g is the same for all candidates of a position, so it cannot change the winner.
    return _best(candidates, _products(candidates, gradients, embeddings))


def fgsm_tokens(ids: Tensor, slots: Tensor, replacements: Tensor, u: Tensor, degree: float) -> Tensor:
    """AugPro-FGSM at a degree: some positions take the token of ``fgsm_replacements``.

    Args:
        ids: int64 (B, L).
        slots: int8 (B, L).
        replacements: int64 (B, L).
        u: float32 (B, L, 2).
        degree: Probability that a position changes.

    Returns:
        int64 (B, L).
    """
    return torch.where(changed_positions(slots, u, degree), replacements, ids)


def exhaustive_projection(points: Tensor, rows: Tensor, eligible: Tensor) -> Tensor:
    """Find the nearest row for every point by looking at all rows: the slow reference.

    Args:
        points: float32 (P, d).
        rows: float32 (V, d).
        eligible: bool (P, V), rows that a point may become.

    Returns:
        int64 (P,).
    """
    return torch.cdist(points, rows).masked_fill(~eligible, torch.inf).argmin(dim=1)


def _best(candidates: Tensor, scores: Tensor) -> Tensor:
    return candidates.gather(1, scores.argmax(dim=1, keepdim=True)).squeeze(1)


def _products(candidates: Tensor, vectors: Tensor, embeddings: Tensor) -> Tensor:
    parts = [vectors.new_empty(0, candidates.shape[1])]
    for start in range(0, len(candidates), POSITIONS_AT_ONCE):
        some, points = candidates[start : start + POSITIONS_AT_ONCE], vectors[start : start + POSITIONS_AT_ONCE]
        # index_select is many times as fast as embeddings[some] on the CPU
        rows = embeddings.index_select(0, some.flatten()).view(*some.shape, embeddings.shape[1])
        parts.append(torch.bmm(rows, points[:, :, None]).squeeze(2))
    return torch.cat(parts)


@dataclass(frozen=True)
class TokenSpace:
    """What the token operators read.

    Attributes:
        tokenizer: A fast WordPiece tokenizer.
        neighbours: Which tokens may change, and their neighbours; augpro_mix reads no neighbours.
        word_embeddings: float32 (V, d), on the CPU, in the tokenizer's order.
        gradient: For augpro_fgsm, with respect to ``word_embeddings``; None leaves that operator out.
        max_length: Tokens read of a text; what lies beyond them stays.
    """

    tokenizer: Any
    neighbours: NeighbourTable
    word_embeddings: Tensor
    gradient: Gradient | None
    max_length: int


class TokenRewriting:
    """augpro_mix, augpro_fgsm or knn on texts."""

    def __init__(self, name: str, space: TokenSpace) -> None:
        """Choose the operator.

        Args:
            name: "augpro_mix", "augpro_fgsm" or "knn".
            space: Tokens, neighbours and gradients.

        Raises:
            UsageError: If augpro_fgsm came without gradients.
        """
        if name == "augpro_fgsm" and space.gradient is None:
            raise UsageError(
                "operator 'augpro_fgsm': it needs the gradient of a teacher and a student; name both, or use knn"
            )
        self._name, self._space = name, space

    @cached_property
    def surfaces(self) -> tuple[str, ...]:
        """What each token writes into a text, by id."""
        return tuple(token.removeprefix("##") for token in vocabulary(self._space.tokenizer))

    def tokenize(self, inputs: Sequence[TextInput]) -> FlatTexts:
        """Tokenize texts, so that many batches can be drawn from them.

        Args:
            inputs: One or more texts; what comes twice is kept once.

        Returns:
            The texts.
        """
        return flatten_texts(inputs, self._space.tokenizer, self._space.max_length, self._space.neighbours)

    def __call__(
        self, bases: Sequence[TextInput], partners: Sequence[TextInput], degree: float, rng: np.random.Generator
    ) -> list[Rewrite]:
        """Change each base; see ``TextOperator``."""
        if not bases:
            return []
        texts = self.tokenize([*bases, *partners] if self._name == "augpro_mix" else bases)
        others = texts.numbers(partners if self._name == "augpro_mix" else ())
        changes = self.changes(texts, texts.numbers(bases), others, degree, rng)
        written = _write(bases, changes, self.surfaces)
        return [Rewrite(text, share) for text, share in zip(written, changes.shares.tolist(), strict=True)]

    def changes(
        self, texts: FlatTexts, rows: Ints, partners: Ints, degree: float, rng: np.random.Generator
    ) -> TokenChanges:
        """Choose the tokens to change, each open one with probability ``degree``, and their replacements.

        Args:
            texts: Made by ``tokenize``.
            rows: int64 (B,), numbers of the texts to change, at least one.
            partners: int64 (B,), numbers of their partners; only augpro_mix reads them.
            degree: In (0, 1].
            rng: Source of all randomness.

        Returns:
            The changes.
        """
        read = np.concatenate([rows, partners]) if self._name == "augpro_mix" else rows
        u = rng.random((len(rows), int(texts.lengths[read].max()), 2), dtype=np.float32)
        owners, positions = np.divmod(np.flatnonzero(u[..., 0] < degree), u.shape[1])
        chosen = rows[owners]
        places = np.minimum(texts.starts[chosen] + positions, len(texts.ids) - 1)
        is_open = (positions < texts.lengths[chosen]) & (texts.slots[places] != FROZEN)
        owners, positions, places = owners[is_open], positions[is_open], places[is_open]
        if self._name == "augpro_mix":
            tokens = texts.offered(places, partners[owners])
        elif self._name == "knn":
            tokens = self._random_neighbours(texts.ids[places], u[owners, positions, 1])
        else:
            tokens = self._steepest_neighbours(texts, rows, owners, positions)
        new = tokens != texts.ids[places]
        return TokenChanges(texts, rows, owners[new], places[new], tokens[new])

    def _random_neighbours(self, ids: Ints, u: NDArray[np.float32]) -> Ints:
        table = self._space.neighbours
        found: Ints = random_neighbours(torch.from_numpy(ids), torch.from_numpy(u), table).numpy()
        return found

    def _steepest_neighbours(self, texts: FlatTexts, rows: Ints, owners: Ints, positions: Ints) -> Ints:
        space = self._space
        assert space.gradient is not None  # checked when the operator was chosen
        gradients = [torch.as_tensor(gradient) for gradient in space.gradient([texts.inputs[row] for row in rows])]
        firsts = np.cumsum([0, *map(len, gradients)])[:-1]
        slopes = torch.cat(gradients)[torch.from_numpy(firsts[owners] + positions)]
        ids = torch.from_numpy(texts.ids[texts.starts[rows[owners]] + positions])
        found: Ints = steepest_neighbours(ids, slopes, space.neighbours, space.word_embeddings).numpy()
        return found


def _write(bases: Sequence[TextInput], changes: TokenChanges, surfaces: Sequence[str]) -> list[TextInput]:
    texts, places = changes.texts, changes.places
    segments, spans = texts.segments[places].tolist(), texts.spans[places].tolist()
    pieces = list(zip(segments, spans, [surfaces[token] for token in changes.tokens.tolist()], strict=True))
    bounds = itertools.pairwise([0, *np.cumsum(changes.counts).tolist()])
    return [splice(base, pieces[start:end]) for base, (start, end) in zip(bases, bounds, strict=True)]


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
    if name == "source":
        return copy_partners
    if name == "target_only":
        return copy_bases
    if name == "eda":
        return Eda(load_wordnet(progress))
    if name == "tinybert":
        return TinyBertAugmentation(load_glove(CANDIDATES, progress), masked())
    return TokenRewriting(name, space())
