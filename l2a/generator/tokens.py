"""How text becomes tokens with places in the text, and how changed tokens become text again."""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from l2a.data.examples import TextInput
from l2a.teacher.store import Labeller, TeacherOutputs
from l2a.util.cache import cached_folder, fingerprint
from l2a.util.errors import UsageError
from l2a.util.progress import SILENT, Advance, Progress

SPECIAL = -1


@dataclass(frozen=True)
class TokenizedText:
    """The tokens that a model reads from one text.

    Attributes:
        ids: int32 (L,), special tokens included, cut to the maximum length.
        spans: int32 (L, 2), first and past-the-last character of the token in its side of the text.
        segments: int8 (L,), 0 for the first side, 1 for the second, -1 for special tokens.
    """

    ids: NDArray[np.int32]
    spans: NDArray[np.int32]
    segments: NDArray[np.int8]


def tokenize_texts(inputs: Sequence[TextInput], tokenizer: Any, max_length: int) -> list[TokenizedText]:
    """Tokenize texts as the models do, and keep the place of every token.

    Args:
        inputs: N texts, all single or all pairs.
        tokenizer: A fast tokenizer of transformers.
        max_length: Tokens kept, special ones included.

    Returns:
        N tokenized texts, in order.
    """
    if not inputs:
        return []
    sides = [list(side) for side in zip(*inputs, strict=True)]
    encoded = tokenizer(*sides, truncation=True, max_length=max_length)
    return [_tokenized(encoding) for encoding in encoded.encodings]


def _tokenized(encoding: Any) -> TokenizedText:
    segments = [SPECIAL if segment is None else segment for segment in encoding.sequence_ids]
    return TokenizedText(
        np.asarray(encoding.ids, dtype=np.int32),
        np.asarray(encoding.offsets, dtype=np.int32),
        np.asarray(segments, dtype=np.int8),
    )


def substitute(
    text_input: TextInput, tokenized: TokenizedText, new_ids: NDArray[np.int32], tokens: Sequence[str]
) -> TextInput:
    """Write changed tokens into the text; every other character stays.

    Args:
        text_input: The text that was tokenized.
        tokenized: Its tokens.
        new_ids: int32 (L,), the ids wanted in their places; special positions are ignored.
        tokens: The vocabulary, by id.

    Returns:
        The changed text, equal to ``text_input`` when no id changed.
    """
    changed = np.flatnonzero((new_ids != tokenized.ids) & (tokenized.segments != SPECIAL))
    segments, spans = tokenized.segments[changed].tolist(), tokenized.spans[changed].tolist()
    surfaces = [tokens[token].removeprefix("##") for token in new_ids[changed].tolist()]
    return splice(text_input, list(zip(segments, spans, surfaces, strict=True)))


def splice(text_input: TextInput, pieces: Sequence[tuple[int, Sequence[int], str]]) -> TextInput:
    """Put new pieces in the places of old ones; every other character stays.

    Args:
        text_input: One or two strings.
        pieces: Number of the side, first and past-the-last character in it, and the new piece, in the order of the
            text and without overlaps.

    Returns:
        The changed text.
    """
    sides = list(text_input)
    for segment, (start, end), piece in reversed(pieces):  # from the end, so that the places before stay true
        sides[segment] = sides[segment][:start] + piece + sides[segment][end:]
    return tuple(sides)


def shares_characters(spans: NDArray[np.int32], segments: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Find tokens that share a character with the next, such as the parts of a Hangul syllable.

    They cannot be replaced one by one.

    Args:
        spans: int32 (T, 2), of one text or of several, one after the other.
        segments: int8 (T,), -1 for special tokens.

    Returns:
        bool (T,).
    """
    overlap = (spans[1:, 0] < spans[:-1, 1]) & (segments[1:] == segments[:-1]) & (segments[1:] != SPECIAL)
    shared = np.zeros(len(segments), dtype=np.bool_)
    shared[1:] |= overlap
    shared[:-1] |= overlap
    return shared


BLOCK = 1024
LAYOUT = 2
"""Part of the cache key: raise it when the rules for neighbours change."""


@dataclass(frozen=True)
class NeighbourTable:
    """The k nearest neighbours of each token among the tokens that may stand in its place.

    Attributes:
        ids: int32 (V, k), nearest first; the row of a token that is not allowed repeats the token itself.
        distances: float32 (V, k), Euclidean between unit rows; infinity for tokens that are not allowed.
        word_start: bool (V,), False for pieces that continue a word ("##ing").
        allowed: bool (V,), tokens that operators may change and emit.
    """

    ids: Tensor
    distances: Tensor
    word_start: Tensor
    allowed: Tensor

    def to(self, device: torch.device | str) -> "NeighbourTable":
        """Move the table to a device.

        Args:
            device: Such as "cuda".

        Returns:
            The table there.
        """
        parts = (self.ids, self.distances, self.word_start, self.allowed)
        return NeighbourTable(*(part.to(device) for part in parts))


def build_neighbour_table(
    embeddings: Tensor, tokens: Sequence[str], k: int = 16, progress: Progress = SILENT
) -> NeighbourTable:
    """Find the nearest neighbours of every token, or load them if this matrix was seen before.

    A neighbour is an allowed token of the same kind (whole words for whole words, "##" pieces for "##" pieces),
    and never the token itself. Where fewer than k exist, the row repeats them in order.

    Args:
        embeddings: float32 (V, d), the word-embedding matrix.
        tokens: The V vocabulary entries, by id.
        k: Neighbours to keep.
        progress: Told of the rows done.

    Returns:
        The table, on the CPU.

    Raises:
        UsageError: If the vocabulary is not WordPiece.
    """
    word_start, allowed = token_kinds(tokens)

    def build(folder: Path) -> None:
        ids, distances = find_neighbours(embeddings.detach().cpu().float(), word_start, allowed, k, progress)
        np.save(folder / "ids.npy", ids.numpy())
        np.save(folder / "distances.npy", distances.numpy())

    key = fingerprint(LAYOUT, k, list(tokens), embeddings.detach().cpu().float().numpy())
    folder = cached_folder("neighbours", key, build)
    ids = torch.from_numpy(np.load(folder / "ids.npy", allow_pickle=False))
    distances = torch.from_numpy(np.load(folder / "distances.npy", allow_pickle=False))
    return NeighbourTable(ids, distances, word_start, allowed & (distances[:, 0] < float("inf")))


def token_kinds(tokens: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tell which tokens start a word and which ones operators may change or emit.

    Allowed are pieces of letters only, two at least: numbers, punctuation, [CLS], [unused7] and the single letters
    that apostrophes leave over ("don't") stay as they are.

    Args:
        tokens: The V vocabulary entries, by id.

    Returns:
        Two bool (V,): starts a word, is allowed.

    Raises:
        UsageError: If the vocabulary is not WordPiece.
    """
    marked = next((token for token in tokens if len(token) > 1 and token[0] in "\u0120\u2581"), None)
    if marked is not None:
        raise UsageError(
            f"tokenizer: the vocabulary holds {marked!r}, so it is not WordPiece; "
            "the generator reads and writes WordPiece tokens: use a teacher of the BERT family"
        )
    surfaces = [token.removeprefix("##") for token in tokens]
    word_start = torch.tensor([not token.startswith("##") for token in tokens])
    return word_start, torch.tensor([len(surface) > 1 and surface.isalpha() for surface in surfaces])


def find_neighbours(
    embeddings: Tensor, word_start: Tensor, allowed: Tensor, k: int, progress: Progress = SILENT
) -> tuple[Tensor, Tensor]:
    """Search the neighbours of all tokens, by blocked matrix products.

    Args:
        embeddings: float32 (V, d).
        word_start: bool (V,).
        allowed: bool (V,).
        k: Neighbours to keep.
        progress: Told of the rows done.

    Returns:
        int32 (V, k) ids and float32 (V, k) distances, as in ``NeighbourTable``.
    """
    ids = torch.arange(len(embeddings), dtype=torch.int32)[:, None].repeat(1, k)
    distances = torch.full((len(embeddings), k), float("inf"))
    directions = unit_rows(embeddings)
    with progress.stage("nearest tokens", int(allowed.sum())) as advance:
        for kind in (word_start & allowed, ~word_start & allowed):
            members = kind.nonzero().flatten()
            if len(members) > 1:
                _search_kind(directions[members], members, ids, distances, advance)
    return ids, distances


def unit_rows(embeddings: Tensor) -> Tensor:
    """Scale every row to length 1: the space in which tokens are compared.

    Args:
        embeddings: float32 (..., d).

    Returns:
        float32 (..., d).
    """
    return torch.nn.functional.normalize(embeddings, dim=-1)


def _search_kind(directions: Tensor, members: Tensor, ids: Tensor, distances: Tensor, advance: Advance) -> None:
    found = min(ids.shape[1], len(members) - 1)
    repeats = torch.arange(ids.shape[1]) % found
    for start in range(0, len(members), BLOCK):
        rows = slice(start, start + BLOCK)
        cosine = directions[rows] @ directions.T
        cosine[torch.arange(len(cosine)), torch.arange(start, start + len(cosine))] = -float("inf")
        nearest = cosine.topk(found)
        ids[members[rows]] = members[nearest.indices][:, repeats].to(torch.int32)
        distances[members[rows]] = (2 - 2 * nearest.values).clamp_min(0).sqrt()[:, repeats]
        advance(len(cosine))


Gradient = Callable[[Sequence[TextInput]], Sequence[NDArray[np.float32]]]
"""Gradients of KL(teacher, student) with respect to the word embeddings: float32 (L_i, d) for each text, one row for
each token of the problem's tokenizer, special ones included, cut to the maximum length."""


@dataclass(frozen=True)
class GeneratorInputs:
    """All that the generator reads.

    Attributes:
        source_inputs: S texts of the source domain.
        target_inputs: The n labelled texts of the target domain.
        source_outputs: The teacher's outputs for the source texts.
        target_outputs: The teacher's outputs for the target texts.
        tokenizer: A fast WordPiece tokenizer; that of the student where ``gradient`` is the student's.
        word_embeddings: float32 (V, d), on the CPU, in the tokenizer's order.
        neighbours: The table built from ``word_embeddings``.
        labeller: Labels new texts with the teacher.
        gradient: For AugPro-FGSM; None leaves that operator out.
        forbidden_hashes: Normalised hashes of the test texts, which are never drawn.
        max_length: Tokens that the models read of a text, special ones included.
    """

    source_inputs: tuple[TextInput, ...]
    target_inputs: tuple[TextInput, ...]
    source_outputs: TeacherOutputs
    target_outputs: TeacherOutputs
    tokenizer: Any
    word_embeddings: Tensor
    neighbours: NeighbourTable
    labeller: Labeller
    gradient: Gradient | None
    forbidden_hashes: AbstractSet[str]
    max_length: int

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """The vocabulary, by id."""
        return vocabulary(self.tokenizer)


def vocabulary(tokenizer: Any) -> tuple[str, ...]:
    """List the vocabulary of a tokenizer, added tokens included.

    Args:
        tokenizer: A tokenizer of transformers.

    Returns:
        V token texts, by id.
    """
    tokens: list[str] = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return tuple(tokens)


FROZEN = -1
SLOT_KINDS = 4
"""Slots that may trade tokens: word starts and continuations, of the first and of the second side."""


@dataclass(frozen=True)
class TokenCorpus:
    """N tokenized texts.

    Attributes:
        inputs: The texts.
        texts: Their tokens, without padding.
        ids: int64 (N, L), padded with 0.
        slots: int8 (N, L), 2 * segment + (1 if the token continues a word); -1 where the token must stay.
        lengths: int64 (N,), tokens of each text, special ones included.
        words: int64 (N,), tokens of each text, special ones not included.
    """

    inputs: tuple[TextInput, ...]
    texts: tuple[TokenizedText, ...]
    ids: Tensor
    slots: Tensor
    lengths: NDArray[np.int64]
    words: NDArray[np.int64]


def tokenize_corpus(inputs: Sequence[TextInput], tokenizer: Any, max_length: int, table: NeighbourTable) -> TokenCorpus:
    """Tokenize texts and mark the slots that operators may change.

    Args:
        inputs: N texts, at least one.
        tokenizer: A fast WordPiece tokenizer.
        max_length: Tokens kept of each text, special ones included.
        table: Says which tokens may change.

    Returns:
        The corpus, on the CPU.
    """
    texts = tokenize_texts(inputs, tokenizer, max_length)
    lengths = np.array([len(text.ids) for text in texts], dtype=np.int64)
    ids = np.zeros((len(texts), int(lengths.max())), dtype=np.int64)
    segments, shared = np.full(ids.shape, SPECIAL, dtype=np.int8), np.zeros(ids.shape, dtype=np.bool_)
    for row, text in enumerate(texts):
        ids[row, : lengths[row]] = text.ids
        segments[row, : lengths[row]] = text.segments
        shared[row, : lengths[row]] = shares_characters(text.spans, text.segments)
    slots = slot_kinds(torch.from_numpy(ids), torch.from_numpy(segments), table)
    slots[torch.from_numpy(shared)] = FROZEN
    words = (segments != SPECIAL).sum(axis=1).astype(np.int64)
    return TokenCorpus(tuple(inputs), tuple(texts), torch.from_numpy(ids), slots, lengths, words)


def slot_kinds(ids: Tensor, segments: Tensor, table: NeighbourTable) -> Tensor:
    """Say which tokens may stand in each place.

    Args:
        ids: int64 (N, L).
        segments: int8 (N, L), -1 for special tokens and padding.
        table: Says which tokens start a word and which may change.

    Returns:
        int8 (N, L), as ``TokenCorpus.slots``.
    """
    kinds = 2 * segments + (~table.word_start[ids]).to(torch.int8)
    is_open = table.allowed[ids] & (segments != SPECIAL)
    return torch.where(is_open, kinds, torch.full_like(kinds, FROZEN))


def align_partners(ids: Tensor, slots: Tensor, partner_ids: Tensor, partner_slots: Tensor) -> Tensor:
    """Give every open slot of a text a token of its partner.

    The j-th word start of a side meets the j-th word start of the same side of the partner, counted in a circle
    where the partner is shorter; continuations likewise. Matching by rank and not by bare position keeps first with
    first, second with second and "##" with "##", and leaves no slot idle (our derivation).

    Args:
        ids: int64 (B, L).
        slots: int8 (B, L).
        partner_ids: int64 (B, M).
        partner_slots: int8 (B, M).

    Returns:
        int64 (B, L); the text's own token where the partner has nothing to offer.
    """
    aligned = ids
    for kind in range(SLOT_KINDS):
        mine, theirs = slots == kind, partner_slots == kind
        count = theirs.sum(dim=1, keepdim=True)
        rank = (mine.cumsum(dim=1) - 1).clamp_min(0) % count.clamp_min(1)
        places = theirs.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        offered = partner_ids.gather(1, places.gather(1, rank))
        aligned = torch.where(mine & (count > 0), offered, aligned)
    return aligned


Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class FlatTexts:
    """N different texts and their T tokens, one text after the other, special tokens included.

    Attributes:
        inputs: The texts.
        starts: int64 (N + 1,), where the tokens of each text start.
        ids: int64 (T,).
        slots: int8 (T,), as ``TokenCorpus.slots``.
        segments: int8 (T,), the side of the text, -1 for special tokens.
        spans: int32 (T, 2), first and past-the-last character in that side.
        words: int64 (N,), tokens of each text, special ones not included.
    """

    inputs: tuple[TextInput, ...]
    starts: Ints
    ids: Ints
    slots: NDArray[np.int8]
    segments: NDArray[np.int8]
    spans: NDArray[np.int32]
    words: Ints

    def numbers(self, inputs: Sequence[TextInput]) -> Ints:
        """Look texts up.

        Args:
            inputs: Texts.

        Returns:
            int64, their numbers.

        Raises:
            KeyError: If one is not among these.
        """
        return np.fromiter(map(self._places.__getitem__, inputs), np.int64, len(inputs))

    @cached_property
    def _places(self) -> dict[TextInput, int]:
        return {text: number for number, text in enumerate(self.inputs)}

    @cached_property
    def lengths(self) -> Ints:
        """int64 (N,), tokens of each text, special ones included."""
        lengths: Ints = np.diff(self.starts)
        return lengths

    @cached_property
    def _sorted(self) -> tuple[Ints, Ints, Ints]:
        """The tokens of each text by slot, the number of each slot's first, and the place of every token in it."""
        kinds = SLOT_KINDS + 1  # FROZEN is one of them
        key = np.repeat(np.arange(len(self.words)) * kinds, self.lengths) + self.slots + 1
        order = np.argsort(key, kind="stable")
        firsts = np.searchsorted(key[order], np.arange(len(self.words) * kinds + 1))
        ranks = np.empty(len(key), np.int64)
        ranks[order] = np.arange(len(key)) - firsts[key[order]]
        return self.ids[order], firsts, ranks

    def offered(self, places: Ints, partners: Ints) -> Ints:
        """Find what a partner offers in the place of a token, by the rule of ``align_partners``.

        Args:
            places: int64 (K,), open tokens, among all T.
            partners: int64 (K,), numbers of texts.

        Returns:
            int64 (K,), the tokens; the own one where the partner has nothing to offer.
        """
        by_slot, firsts, ranks = self._sorted
        kind = partners * (SLOT_KINDS + 1) + self.slots[places] + 1
        count = firsts[kind + 1] - firsts[kind]
        found = by_slot[np.minimum(firsts[kind] + ranks[places] % np.maximum(count, 1), len(by_slot) - 1)]
        tokens: Ints = np.where(count > 0, found, self.ids[places])
        return tokens


@dataclass(frozen=True, eq=False)
class TokenChanges:
    """Which tokens of B texts change, and to what: K changes in the order of the texts and of their tokens.

    Attributes:
        texts: Where the tokens stand.
        rows: int64 (B,), numbers of the texts.
        owners: int64 (K,), which of the B texts changes.
        places: int64 (K,), among all tokens of ``texts``.
        tokens: int64 (K,), the new ids, each different from the old one.
    """

    texts: FlatTexts
    rows: Ints
    owners: Ints
    places: Ints
    tokens: Ints

    @cached_property
    def counts(self) -> Ints:
        """int64 (B,), changes of each text."""
        return np.bincount(self.owners, minlength=len(self.rows))

    @property
    def shares(self) -> NDArray[np.float64]:
        """float64 (B,), changes of each text as a share of its tokens."""
        shares: NDArray[np.float64] = self.counts / np.maximum(self.texts.words[self.rows], 1)
        return shares


def flatten_texts(inputs: Sequence[TextInput], tokenizer: Any, max_length: int, table: NeighbourTable) -> FlatTexts:
    """Tokenize texts and mark the slots that operators may change.

    Args:
        inputs: One or more texts, all single or all pairs; what comes twice is kept once.
        tokenizer: A fast WordPiece tokenizer.
        max_length: Tokens kept of each text, special ones included.
        table: Says which tokens may change.

    Returns:
        The texts.
    """
    distinct = list(dict.fromkeys(inputs))
    made = tokenize_texts(distinct, tokenizer, max_length)
    ids, segments = (np.concatenate([getattr(text, name) for text in made]) for name in ("ids", "segments"))
    spans = np.concatenate([text.spans for text in made])
    slots = slot_kinds(torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(segments), table).numpy()
    slots[shares_characters(spans, segments)] = FROZEN
    starts = np.cumsum([0, *(len(text.ids) for text in made)])
    return FlatTexts(
        inputs=tuple(distinct),
        starts=starts,
        ids=ids.astype(np.int64),
        slots=slots,
        segments=segments,
        spans=spans,
        words=np.add.reduceat(segments != SPECIAL, starts[:-1], dtype=np.int64),
    )
