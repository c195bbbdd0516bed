"""A teacher's outputs on disk, keyed by content: append-only files that are read by memory map.

An index holds 24 bytes a text (key, sum of the logits, sum of the embedding); logits, 4 bytes a class, and embeddings,
2 bytes a dimension, lie in files of their own. A row that is torn or damaged is labelled again instead of being
trusted.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from l2a.examples import TextInput
from l2a.files import full_disk_as_run_error
from l2a.teacher.key_index import KEY_TYPE, KeyIndex
from l2a.teacher.outputs import StoredRows, TeacherOutputs
from l2a.teacher.row_file import RowFile, forget_pages, row_sums

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
