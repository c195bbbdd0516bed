"""The JSON lines of an augmented file; those of token operators are put together as bytes, many at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from l2a.examples import TextInput
from l2a.generator.flat_texts import FlatTexts, Ints, TokenChanges
from l2a.generator.rewrite import Rewrite
from l2a.jsontext import to_json

Bytes = NDArray[np.uint8]


class LineFormat:
    """Writes the rows of one job; keeps what its lines have in common."""

    def __init__(self, operator: str, degree: float, seed: int) -> None:
        """Fix what all lines say.

        Args:
            operator: Name of the operator.
            degree: Share of tokens that it was to change.
            seed: Of the job.
        """
        self._middle = f', "operator": {to_json(operator)}, "degree": {to_json(degree)}, "changed_share": '
        self._end = f', "seed": {seed}}}\n'
        self._origins: dict[int, bytes] = {}
        self._shares: dict[float, bytes] = {}
        self._heads: _Heads | None = None

    def of_rewrites(self, origins: Sequence[int], made: Sequence[Rewrite]) -> bytes:
        """Write texts.

        Args:
            origins: The text that each was made from, B numbers.
            made: B new texts.

        Returns:
            B lines in UTF-8.
        """
        heads = [_head(rewrite.text).encode() for rewrite in made]
        return self._lines(heads, origins, [rewrite.changed_share for rewrite in made])

    def of_changes(self, origins: Sequence[int], changes: TokenChanges, surfaces: Sequence[str]) -> bytes:
        """Write texts of which some tokens change, without making each text by itself.

        Args:
            origins: The text that each was made from, B numbers.
            changes: Of B texts.
            surfaces: What each token writes into a text, by id.

        Returns:
            B lines in UTF-8.
        """
        if self._heads is None or self._heads.texts is not changes.texts:
            self._heads = _prepare_heads(changes.texts, surfaces)
        return self._lines(_changed_heads(self._heads, changes), origins, changes.shares.tolist())

    def _lines(self, heads: Sequence[bytes], origins: Sequence[int], shares: Sequence[float]) -> bytes:
        for origin in set(origins).difference(self._origins):
            self._origins[origin] = f', "origin": {origin}{self._middle}'.encode()
        for share in set(shares).difference(self._shares):
            self._shares[share] = (to_json(round(share, 6)) + self._end).encode()
        tails = map(self._origins.__getitem__, origins), map(self._shares.__getitem__, shares)
        return b"".join(chain.from_iterable(zip(heads, *tails, strict=True)))


@dataclass(frozen=True, eq=False)
class _Heads:
    """The starts of all lines, with their texts as they are: what changes is cut out and pasted in.

    Attributes:
        texts: The N texts.
        content: uint8, the N starts of lines, then the surfaces of the V tokens.
        starts: int64 (N + 1,), of the starts of lines in ``content``.
        spans: int64 (T, 2), of the tokens of the texts in ``content``.
        surfaces: int64 (V + 1,), of the surfaces in ``content``.
    """

    texts: FlatTexts
    content: Bytes
    starts: Ints
    spans: Ints
    surfaces: Ints


def _head(text: TextInput) -> str:
    first, second = (*text, None)[:2]
    return to_json({"text": first, "text_pair": second})[:-1]


def _prepare_heads(texts: FlatTexts, surfaces: Sequence[str]) -> _Heads:
    heads = [_head(text).encode() for text in texts.inputs]
    words = [_escaped(surface).encode() for surface in surfaces]
    bounds = np.cumsum([0, *map(len, heads), *map(len, words)])
    spans = np.zeros((len(texts.ids), 2), np.int64)
    for row, text in enumerate(texts.inputs):
        tokens = slice(texts.starts[row], texts.starts[row + 1])
        start = int(bounds[row]) + len('{"text": "')
        for number, side in enumerate(text):
            mine = texts.segments[tokens] == number
            offsets = _byte_offsets(side)
            spans[tokens][mine] = start + (offsets[texts.spans[tokens][mine]])
            start += int(offsets[-1]) + len('", "text_pair": "')
    content = np.frombuffer(b"".join([*heads, *words]), np.uint8)
    return _Heads(texts, content, bounds[: len(heads) + 1], spans, bounds[len(heads) :])


def _escaped(text: str) -> str:
    return to_json(text)[1:-1]


def _byte_offsets(side: str) -> Ints:
    """Where each character of a text starts in its JSON, and where the last one ends."""
    if len(side) == len(_escaped(side).encode()):
        return np.arange(len(side) + 1)
    return np.cumsum([0, *(len(_escaped(character).encode()) for character in side)])


def _changed_heads(heads: _Heads, changes: TokenChanges) -> list[bytes]:
    """Cut and paste: before each change what stands since the one before, then the new token."""
    count, rows = len(changes.rows), changes.rows
    # Pieces of text b: kept, new, kept, new ..., kept; so change i of text b is piece 2 i + b + 1 in all.
    new = 2 * np.arange(len(changes.places)) + changes.owners + 1
    last = np.cumsum(2 * changes.counts + 1) - 1
    begins, ends = np.empty((2, len(new) * 2 + count), np.int64)
    begins[new], ends[new] = heads.surfaces[changes.tokens], heads.surfaces[changes.tokens + 1]
    begins[last - 2 * changes.counts] = heads.starts[rows]
    ends[last] = heads.starts[rows + 1]
    ends[new - 1], begins[new + 1] = heads.spans[changes.places].T
    lengths = ends - begins
    bounds = np.cumsum(lengths)
    index = np.repeat(begins - bounds + lengths, lengths)
    index += np.arange(len(index))
    content = heads.content[index].tobytes()
    stops = bounds[last].tolist()
    return [content[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]
