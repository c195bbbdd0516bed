"""Tokenized texts in flat arrays, for operators that change a few tokens of each of many texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from l2a.examples import TextInput
from l2a.generator.corpus import FROZEN, SLOT_KINDS, slot_kinds
from l2a.generator.neighbours import NeighbourTable
from l2a.generator.tokens import SPECIAL, shares_characters, tokenize_texts

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
