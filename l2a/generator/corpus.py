"""All texts of both domains as padded token arrays: tokenized once, then indexed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from l2a.examples import TextInput
from l2a.generator.neighbours import NeighbourTable
from l2a.generator.tokens import SPECIAL, TokenizedText, shares_characters, tokenize_texts

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
