"""How text becomes tokens with places in the text, and how changed tokens become text again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l2a.examples import TextInput

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
