"""How text becomes tokens with places in the text, which tokens may stand in each place, and how text comes back."""

import gc
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from l2a.data import Bools, Doubles, Floats, Ints, TextInput
from l2a.student.student import PIECE, refuse_other_tokenizers
from l2a.util import SILENT, Progress, UsageError, cached_folder, fingerprint

SPECIAL, FROZEN = -1, -1
"""The side of a special token, and the slot of a token that must stay."""
SLOT_KINDS = 4
"""Slots that may trade tokens: word starts and continuations, of the first and of the second side."""
UNKNOWN = -1
BLOCK = 1024

Texts = Sequence[TextInput]
Gradient = Callable[[Sequence[TextInput]], Sequence[Floats]]
"""Gradients of KL(teacher, student) with respect to the word embeddings: float32 (L_i, d) for each text, one row for
each token of the tokenizer, special ones included, cut to the maximum length."""


def vocabulary(tokenizer: Any) -> tuple[str, ...]:
    """List the vocabulary of a fast tokenizer by id, added tokens included.

    Raises:
        UsageError: If it is not WordPiece.
    """
    refuse_other_tokenizers(tokenizer)
    return tuple(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))


def token_kinds(tokens: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tell which of V tokens start a word, and which ones operators may change or emit: two bool (V,), by id.

    Allowed are pieces of letters only, two at least: numbers, punctuation, [CLS], [unused7] and the single letters that
    apostrophes leave over ("don't") stay as they are.
    """
    surfaces = [token.removeprefix(PIECE) for token in tokens]
    word_start = torch.tensor([not token.startswith(PIECE) for token in tokens])
    return word_start, torch.tensor([len(surface) > 1 and surface.isalpha() for surface in surfaces])


def unit_rows(rows: Floats) -> Floats:
    """Divide N rows, float (N, d), by their lengths; a row of zeros stays."""
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))


class NeighbourTable(NamedTuple):
    """The k nearest neighbours of each token among the tokens that may stand in its place.

    Attributes:
        ids: int32 (V, k), nearest first; the row of a token that is not allowed repeats the token itself.
        word_start: bool (V,), False for pieces that continue a word ("##ing").
        allowed: bool (V,), tokens that operators may change and emit.
    """

    ids: Tensor
    word_start: Tensor
    allowed: Tensor


def build_neighbour_table(
    embeddings: Tensor, tokens: Sequence[str], k: int = 16, progress: Progress = SILENT
) -> NeighbourTable:
    """Find the nearest neighbours of every token, on the CPU, or load them if this matrix was seen before.

    A neighbour is an allowed token of the same kind (whole words for whole words, "##" pieces for "##" pieces), and
    never the token itself. Where fewer than k exist, the row repeats them in order.

    Args:
        embeddings: float32 (V, d), the word-embedding matrix.
        tokens: The V vocabulary entries, by id.
        k: Neighbours to keep; 0 searches none and only says which tokens may change.
        progress: Told of the rows done.
    """
    word_start, allowed = token_kinds(tokens)
    if k == 0:
        return NeighbourTable(torch.zeros(len(tokens), 0, dtype=torch.int32), word_start, allowed)
    matrix = embeddings.detach().cpu().float()

    def build(folder: Path) -> None:
        np.save(folder / "ids.npy", find_neighbours(matrix, word_start, allowed, k, progress).numpy())

    # The first number is to be raised when the rules for neighbours change.
    folder = cached_folder("neighbours", fingerprint(2, k, list(tokens), matrix.numpy()), build)
    ids = torch.from_numpy(np.load(folder / "ids.npy", allow_pickle=False))
    return NeighbourTable(ids, word_start, allowed & (ids[:, 0] != torch.arange(len(ids))))


def find_neighbours(
    embeddings: Tensor, word_start: Tensor, allowed: Tensor, k: int, progress: Progress = SILENT
) -> Tensor:
    """Search the neighbours of all tokens, int32 (V, k) as in ``NeighbourTable``, by blocked products of unit rows."""
    ids = torch.arange(len(embeddings), dtype=torch.int32)[:, None].repeat(1, k)
    directions = torch.nn.functional.normalize(embeddings, dim=-1)
    with progress.stage("nearest tokens", int(allowed.sum())) as advance:
        for kind in (word_start & allowed, ~word_start & allowed):
            members = kind.nonzero().flatten()
            found = min(k, len(members) - 1)
            if found < 1:
                continue
            same_kind = directions[members]
            for start in range(0, len(members), BLOCK):
                cosine = same_kind[start : start + BLOCK] @ same_kind.T
                cosine[:, start:].fill_diagonal_(-torch.inf)
                nearest = members[cosine.topk(found).indices]
                ids[members[start : start + BLOCK]] = nearest[:, torch.arange(k) % found].to(torch.int32)
                advance(len(cosine))
    return ids


@dataclass(frozen=True)
class TokenSpace:
    """What the token operators read.

    Attributes:
        tokenizer: A fast WordPiece tokenizer; that of the student where ``gradient`` is the student's.
        neighbours: Which tokens may change, and their neighbours; augpro_mix reads no neighbours.
        word_embeddings: float32 (V, d), on the CPU, in the tokenizer's order.
        gradient: For augpro_fgsm, with respect to ``word_embeddings``; None leaves that operator out.
        max_length: Tokens that the models read of a text, special ones included; what lies beyond them stays.
    """

    tokenizer: Any
    neighbours: NeighbourTable
    word_embeddings: Tensor
    gradient: Gradient | None
    max_length: int

    @cached_property
    def surfaces(self) -> tuple[str, ...]:
        """What each token writes into a text, by id."""
        return tuple(token.removeprefix(PIECE) for token in vocabulary(self.tokenizer))

    def tokenize(self, inputs: Sequence[TextInput]) -> "TokenStore":
        """Tokenize texts, all single or all pairs, as the models do, and mark the slots that operators may change."""
        sides = [list(side) for side in zip(*inputs, strict=True)]
        collecting = gc.isenabled()
        gc.disable()  # while many objects are made, the collector would walk all that torch loaded again and again
        try:
            encodings = self.tokenizer(*sides, truncation=True, max_length=self.max_length).encodings
        finally:
            if collecting:
                gc.enable()
        starts = np.cumsum([0, *(len(encoding.ids) for encoding in encodings)])
        ids = np.fromiter(itertools.chain.from_iterable(one.ids for one in encodings), np.int64, starts[-1])
        flat = itertools.chain.from_iterable(encoding.sequence_ids for encoding in encodings)
        segments = np.fromiter((SPECIAL if side is None else side for side in flat), np.int8, len(ids))
        spans = np.concatenate([np.asarray(encoding.offsets, np.int32) for encoding in encodings])
        is_open = self.neighbours.allowed.numpy()[ids] & (segments != SPECIAL) & ~shares_characters(spans, segments)
        kinds = 2 * segments + ~self.neighbours.word_start.numpy()[ids]
        slots = np.where(is_open, kinds, FROZEN).astype(np.int8)
        words = np.add.reduceat(segments != SPECIAL, starts[:-1], dtype=np.int64)
        steepest = np.full(len(ids), UNKNOWN)
        return TokenStore(self, tuple(inputs), starts, np.diff(starts), ids, slots, segments, spans, words, steepest)


def shares_characters(spans: np.typing.NDArray[np.int32], segments: np.typing.NDArray[np.int8]) -> Bools:
    """Find tokens that share a character with the next, such as the parts of a Hangul syllable.

    They cannot be replaced one by one. Segments are -1 for special tokens.
    """
    overlap = (spans[1:, 0] < spans[:-1, 1]) & (segments[1:] == segments[:-1]) & (segments[1:] != SPECIAL)
    return np.asarray(np.append(overlap, False) | np.append(False, overlap))


@dataclass(frozen=True, eq=False)
class TokenStore:
    """N texts and their T tokens, one text after the other, special tokens included.

    Attributes:
        space: Where they are tokenized.
        inputs: The texts.
        starts: int64 (N + 1,), where the tokens of each text start.
        lengths: int64 (N,), tokens of each text, special ones included.
        ids: int64 (T,).
        slots: int8 (T,), 2 * segment + (1 if the token continues a word); -1 where the token must stay.
        segments: int8 (T,), 0 for the first side, 1 for the second, -1 for special tokens.
        spans: int32 (T, 2), first and past-the-last character of the token in its side of the text.
        words: int64 (N,), tokens of each text, special ones not included.
        steepest: int64 (T,), the tokens that augpro_fgsm found so far; -1 for texts whose gradient was never asked.
    """

    space: TokenSpace
    inputs: tuple[TextInput, ...]
    starts: Ints
    lengths: Ints
    ids: Ints
    slots: np.typing.NDArray[np.int8]
    segments: np.typing.NDArray[np.int8]
    spans: np.typing.NDArray[np.int32]
    words: Ints
    steepest: Ints

    @cached_property
    def _by_slot(self) -> tuple[Ints, Ints, Ints]:
        """The tokens of each text by slot, the number of each slot's first, and the place of every token in it."""
        kinds = SLOT_KINDS + 1  # FROZEN is one of them
        key = np.repeat(np.arange(len(self.words)) * kinds, self.lengths) + self.slots + 1
        order = np.argsort(key, kind="stable")
        firsts = np.searchsorted(key[order], np.arange(len(self.words) * kinds + 1))
        ranks = np.empty(len(key), np.int64)
        ranks[order] = np.arange(len(key)) - firsts[key[order]]
        return self.ids[order], firsts, ranks

    def offered(self, places: Ints, partners: Ints) -> Ints:
        """Find what partners offer in the places of tokens, int64 (K,); the own token where one has nothing to offer.

        The j-th word start of a side meets the j-th word start of the same side of the partner, counted in a circle
        where the partner is shorter; continuations likewise. Matching by rank and not by bare position keeps first
        with first, second with second and "##" with "##", and leaves no slot idle (our derivation).

        Args:
            places: int64 (K,), open tokens, among all T.
            partners: int64 (K,), numbers of texts.
        """
        by_slot, firsts, ranks = self._by_slot
        kind = partners * (SLOT_KINDS + 1) + self.slots[places] + 1
        count = firsts[kind + 1] - firsts[kind]
        found = by_slot[np.minimum(firsts[kind] + ranks[places] % np.maximum(count, 1), len(by_slot) - 1)]
        return np.where(count > 0, found, self.ids[places])


class Slots(NamedTuple):
    """K open tokens of B texts, in the order of the texts and of their tokens, that an operator is to change.

    Attributes:
        store: The texts.
        rows: int64 (B,), numbers of the texts.
        partners: int64 (B,), numbers of their partners, texts of the other domain.
        owners: int64 (K,), which of the B texts each token belongs to.
        places: int64 (K,), among all tokens of ``store``.
        choice: float32 (K,), uniform in [0, 1): decides to which token it changes.
    """

    store: TokenStore
    rows: Ints
    partners: Ints
    owners: Ints
    places: Ints
    choice: Floats


def choose_slots(store: TokenStore, rows: Ints, partners: Ints, u: Floats, degree: float | Doubles) -> Slots:
    """Choose the tokens to change: each open one with probability ``degree``, in (0, 1].

    Args:
        store: The texts.
        rows: int64 (B,), numbers of the texts.
        partners: int64 (B,), numbers of their partners.
        u: float32 (B, L, 2), uniform in [0, 1): whether a token changes, and to what; L is no less than any length.
        degree: The probability, one for all or float64 (B,).
    """
    owners, positions = np.divmod(np.flatnonzero(u[..., 0] < np.asarray(degree)[..., None]), u.shape[1])
    places = np.minimum(store.starts[rows[owners]] + positions, len(store.ids) - 1)
    is_open = (positions < store.lengths[rows[owners]]) & (store.slots[places] != FROZEN)
    owners, positions, places = owners[is_open], positions[is_open], places[is_open]
    return Slots(store, rows, partners, owners, places, u[owners, positions, 1])


class Rewrite(NamedTuple):
    """A text that an operator made.

    Attributes:
        text: The new text; equal to the base where nothing could change.
        changed_share: Share of the base's tokens (token operators) or words (word operators) that it changed.
    """

    text: TextInput
    changed_share: float


def changed_shares(slots: Slots, tokens: Ints) -> Doubles:
    """Measure the share of each of B texts' tokens, float64, that the new tokens, int64 (K,), change."""
    changed = slots.owners[tokens != slots.store.ids[slots.places]]
    return np.bincount(changed, minlength=len(slots.rows)) / np.maximum(slots.store.words[slots.rows], 1)


def write_texts(slots: Slots, tokens: Ints) -> list[Rewrite]:
    """Write new tokens, int64 (K,), into their B texts; every other character stays."""
    store, is_new = slots.store, tokens != slots.store.ids[slots.places]
    sides, places = [list(store.inputs[row]) for row in slots.rows], slots.places[is_new]
    columns = (slots.owners[is_new], tokens[is_new], store.segments[places], store.spans[places])
    changes = zip(*(column.tolist() for column in columns), strict=True)
    for owner, token, side, (start, end) in reversed(list(changes)):  # so that the places before stay true
        old = sides[owner][side]
        sides[owner][side] = old[:start] + store.space.surfaces[token] + old[end:]
    return list(map(Rewrite, map(tuple, sides), changed_shares(slots, tokens).tolist()))


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
    return np.asarray(neighbours[slots.store.ids[slots.places], choice], np.int64)


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
            needed = "the gradient of a teacher and a student; name both, or use knn"
            raise UsageError(f"operator 'augpro_fgsm' reads {needed}")
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
