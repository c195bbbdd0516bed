"""Finds the row of a key among millions: sorted arrays, 24 bytes a key."""

import hashlib
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from l2a.data.examples import TextInput
from l2a.util.files import full_disk_as_run_error

KEY_TYPE = "S16"
"""16 bytes that sort and compare as a whole; a key is its bytes padded with zeros, so none is lost at the end."""


class KeyIndex:
    """Maps keys of 16 bytes to rows; a key that comes again moves to its later row."""

    def __init__(self) -> None:
        """Start empty."""
        self._keys = np.zeros(0, KEY_TYPE)  # ascending, each once
        self._rows = np.zeros(0, np.int64)

    def __len__(self) -> int:
        """Return the number of different keys."""
        return len(self._keys)

    def add(self, keys: NDArray[np.bytes_], first_row: int) -> None:
        """Add the keys of consecutive rows.

        Args:
            keys: S16 (N,).
            first_row: Row of the first of them.
        """
        new, back = np.unique(keys[::-1], return_index=True)  # of equal keys the last
        rows = first_row + len(keys) - 1 - back
        places, known = self._look_up(new)
        self._rows[places[known]] = rows[known]
        self._keys = np.insert(self._keys, places[~known], new[~known])
        self._rows = np.insert(self._rows, places[~known], rows[~known])

    def find(self, keys: NDArray[np.bytes_]) -> NDArray[np.int64]:
        """Look keys up.

        Args:
            keys: S16 (N,).

        Returns:
            int64 (N,): the row of each, or -1.
        """
        places, known = self._look_up(keys)
        rows = np.full(len(keys), -1, np.int64)
        rows[known] = self._rows[places[known]]
        return rows

    def _look_up(self, keys: NDArray[np.bytes_]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        places = np.searchsorted(self._keys, keys)
        known = places < len(self._keys)
        known[known] = self._keys[places[known]] == keys[known]
        return places, known


@dataclass(frozen=True)
class RowFile:
    """A file of N rows of numbers; a torn row at its end does not count.

    Attributes:
        path: The file, which may not exist yet.
        dtype: Type of the numbers, its byte order included.
        width: Numbers in a row, w.
    """

    path: Path
    dtype: str
    width: int

    def __len__(self) -> int:
        """Return the number of whole rows."""
        row_bytes = np.dtype(self.dtype).itemsize * self.width
        return self.path.stat().st_size // row_bytes if self.path.exists() else 0

    def map(self) -> NDArray[Any]:
        """Map the rows that are there now.

        Returns:
            Read-only (N, w), on disk; rows that are appended later need another call.
        """
        shape = (len(self), self.width)
        if not shape[0]:
            return np.zeros(shape, self.dtype)
        return np.memmap(self.path, self.dtype, mode="r", shape=shape)

    def write(self, start: int, rows: NDArray[Any]) -> None:
        """Write rows from a position on, over whatever a killed writer has left there.

        Args:
            start: Position of the first, at most a little beyond the end.
            rows: (n, w), converted to the file's type.
        """
        content = np.ascontiguousarray(rows, self.dtype)
        with os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            file.seek(start * self.width * content.itemsize)
            file.write(content.tobytes())


def forget_pages(rows: NDArray[Any]) -> None:
    """Let go of the pages that were read of a memory map, which else count as this process's memory until the end.

    Args:
        rows: What ``RowFile.map`` returned; it stays readable. Other arrays are left alone.
    """
    base: object = rows.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):  # not on every system
        base.madvise(mmap.MADV_DONTNEED)


def row_sums(keys: NDArray[np.uint32], values: NDArray[Any]) -> NDArray[np.uint32]:
    """Hash each row together with its key: the high half of a + sum_i b_i w_i modulo 2^64 over all words w_i.

    The factors are fixed random numbers. Guards against what disks and killed processes do: a changed bit always
    changes the sum; rows that are zeroed, cut short, exchanged or overwritten keep it with probability 2^-32. It does
    not guard against forgery. Source: "multilinear", Lemire and Kaser (2014), arXiv 1202.4961.

    Args:
        keys: uint32 (N, k).
        values: (N, w), numbers of 1 to 4 bytes.

    Returns:
        uint32 (N,).
    """
    words = values.view(f"<u{values.dtype.itemsize}")
    first, *factors = np.split(hash_factors(1 + keys.shape[1] + words.shape[1]), [1, 1 + keys.shape[1]])
    parts = [np.einsum("ij,j->i", part.astype(np.uint64), b) for part, b in zip((keys, words), factors, strict=True)]
    sums: NDArray[np.uint32] = ((first + parts[0] + parts[1]) >> np.uint64(32)).astype(np.uint32)
    return sums


def hash_factors(count: int) -> NDArray[np.uint64]:
    """Draw the factors of ``row_sums``; the raw output of a bit generator is the same in every version of numpy.

    Args:
        count: How many; more begin with the same.

    Returns:
        uint64 (count,).
    """
    return np.random.PCG64(0).random_raw(count)


@dataclass(frozen=True)
class StoredRows:
    """Rows of arrays that are read when they are asked for, so that memory maps stay on disk until then.

    Attributes:
        parts: Arrays (n_i, d) of any floating type, at least one; laid one behind another they have M rows.
        places: int64 (N,), 0 to M - 1.
    """

    parts: tuple[NDArray[Any], ...]
    places: NDArray[np.int64]

    def take(self, indices: NDArray[np.int64]) -> "StoredRows":
        """Select rows by position; nothing is read.

        Args:
            indices: int64 positions, 0 to N - 1.

        Returns:
            The selected rows.
        """
        return StoredRows(self.parts, self.places[indices])

    def read(self) -> NDArray[np.float32]:
        """Read all rows.

        Returns:
            float32 (N, d).
        """
        starts = np.cumsum([0, *(len(part) for part in self.parts[:-1])])
        owners = np.searchsorted(starts, self.places, side="right") - 1
        rows = np.empty((len(self.places), self.parts[0].shape[1]), np.float32)
        for number, part in enumerate(self.parts):
            mine = owners == number
            rows[mine] = part[self.places[mine] - starts[number]]
            forget_pages(part)
        return rows


@dataclass(frozen=True)
class TeacherOutputs:
    """A teacher's outputs for N texts.

    Attributes:
        logits: float32 (N, C).
        states: float32 (N, d), the pooled last hidden state h_T(x), or where it is stored.
    """

    logits: NDArray[np.float32]
    states: NDArray[np.float32] | StoredRows

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.logits)

    @property
    def embeddings(self) -> NDArray[np.float32]:
        """The pooled last hidden state h_T(x), float32 (N, d); every look at stored ones reads them anew."""
        return self.states.read() if isinstance(self.states, StoredRows) else self.states

    def take(self, indices: NDArray[np.int64]) -> "TeacherOutputs":
        """Select rows by position.

        Args:
            indices: int64 positions.

        Returns:
            The selected rows.
        """
        states = self.states.take(indices) if isinstance(self.states, StoredRows) else self.states[indices]
        return TeacherOutputs(self.logits[indices], states)

    def probabilities(self, temperature: float = 1.0) -> NDArray[np.float32]:
        """Turn logits into class probabilities.

        Args:
            temperature: Softens the distribution when above 1.

        Returns:
            float32 (N, C), rows sum to 1.
        """
        scaled = self.logits / temperature
        exponents = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        probabilities: NDArray[np.float32] = (exponents / exponents.sum(axis=1, keepdims=True)).astype(np.float32)
        return probabilities


def join_outputs(parts: Sequence[TeacherOutputs]) -> TeacherOutputs:
    """Lay outputs one behind another; embeddings that are stored are not read.

    Args:
        parts: One or more, of one teacher.

    Returns:
        All outputs, in order.
    """
    stored = [_stored(part.states) for part in parts]
    starts = np.cumsum([0, *(sum(map(len, rows.parts)) for rows in stored)])
    places = np.concatenate([rows.places + start for rows, start in zip(stored, starts, strict=False)])
    states = StoredRows(tuple(part for rows in stored for part in rows.parts), places)
    return TeacherOutputs(np.concatenate([part.logits for part in parts]), states)


def _stored(states: NDArray[np.float32] | StoredRows) -> StoredRows:
    return states if isinstance(states, StoredRows) else StoredRows((states,), np.arange(len(states)))


Labeller = Callable[[Sequence[TextInput]], TeacherOutputs]
"""Labels texts with the teacher: cached by content, duplicates labelled once."""


KEY_BYTES, KEY_WORDS = 16, 4
CHECKED_AT_ONCE = 2048
"""Rows in memory while they are checked."""


def content_key(text_input: TextInput) -> bytes:
    """Digest one text exactly, case and spacing included.

    Args:
        text_input: One or two strings.

    Returns:
        16 bytes.
    """
    joined = "\x1f".join(text_input).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(joined, digest_size=KEY_BYTES).digest()


class PredictionStore:
    """Outputs of one teacher at one maximum length; a new row is appended, never rewritten.

    Logits and embedding of a row are written before its line of the index, so that a row without that line does not
    count: the next writer overwrites what a killed one has left.
    """

    def __init__(self, folder: Path, classes: int, width: int) -> None:
        """Open a store, creating its folder.

        Args:
            folder: Where the files live; its name should hold the teacher's fingerprint and the maximum length.
            classes: C.
            width: d.
        """
        shape = f"{classes}x{width}"
        self._index = RowFile(folder / f"index-{shape}.bin", "<u4", KEY_WORDS + 2)
        self._logits = RowFile(folder / f"logits-{shape}.bin", "<f4", classes)
        self._embeddings = RowFile(folder / f"embeddings-{shape}.bin", "<f2", width)
        with full_disk_as_run_error(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._known, self._rows_read = KeyIndex(), 0
        self._read_index()

    def __len__(self) -> int:
        """Return the number of texts known."""
        return len(self._known)

    def _read_index(self) -> None:
        lines = self._index.map()
        if len(lines) < self._rows_read:  # somebody emptied the cache while it was open
            self._known, self._rows_read = KeyIndex(), 0
        keys = np.ascontiguousarray(lines[self._rows_read :, :KEY_WORDS]).view(KEY_TYPE)[:, 0]
        self._known.add(keys, self._rows_read)
        self._rows_read = len(lines)

    def find(self, keys: Sequence[bytes], embeddings: bool = True) -> NDArray[np.int64]:
        """Look texts up and check their rows.

        Args:
            keys: N content keys.
            embeddings: Check the embeddings too; a reader of logits alone leaves their file alone.

        Returns:
            int64 (N,): the row of each text, or -1 where it is missing or its row is damaged.
        """
        joined = b"".join(keys)
        rows, words = self._known.find(np.frombuffer(joined, KEY_TYPE)), np.frombuffer(joined, "<u4")
        asked = words.reshape(-1, KEY_WORDS)
        index, parts = self._index.map(), [self._logits.map(), *([self._embeddings.map()] if embeddings else [])]
        for start in range(0, len(rows), CHECKED_AT_ONCE):
            some = rows[start : start + CHECKED_AT_ONCE]
            some[~_are_intact(some, asked[start : start + CHECKED_AT_ONCE], index, parts)] = -1
            for file in (index, *parts):
                forget_pages(file)
        return rows

    def read(self, rows: NDArray[np.int64]) -> TeacherOutputs:
        """Read rows; their embeddings stay on disk until they are asked for.

        Args:
            rows: int64 (N,), as found.

        Returns:
            The outputs in that order.
        """
        return TeacherOutputs(self._logits.map()[rows], StoredRows((self._embeddings.map(),), rows))

    def append(self, keys: Sequence[bytes], outputs: TeacherOutputs) -> None:
        """Add new texts.

        Args:
            keys: N content keys.
            outputs: Their outputs.

        Raises:
            RunError: If the disk is full.
        """
        words = np.frombuffer(b"".join(keys), "<u4").reshape(-1, KEY_WORDS)
        logits, embeddings = outputs.logits.astype("<f4"), outputs.embeddings.astype("<f2")
        sums = [row_sums(words, values) for values in (logits, embeddings)]
        with full_disk_as_run_error(self._index.path), FileLock(f"{self._index.path}.lock"):
            start = len(self._index)
            self._logits.write(start, logits)
            self._embeddings.write(start, embeddings)
            self._index.write(start, np.column_stack([words, *sums]))
        self._read_index()


def _are_intact(
    rows: NDArray[np.int64], asked: NDArray[np.uint32], index: NDArray[np.uint32], parts: Sequence[NDArray[Any]]
) -> NDArray[np.bool_]:
    intact = (rows >= 0) & (rows < min(map(len, (index, *parts))))  # a power cut may shorten a file
    checked = np.flatnonzero(intact)
    lines = index[rows[checked]]
    intact[checked] = (lines[:, :KEY_WORDS] == asked[checked]).all(axis=1)
    for column, part in enumerate(parts, start=KEY_WORDS):
        intact[checked] &= row_sums(lines[:, :KEY_WORDS], part[rows[checked]]) == lines[:, column]
    return intact
