"""A teacher's outputs on disk: append-only files read by memory map, keyed by content.

Each row has a key (digest of the text), a checksum, its logits and its embedding, so that a torn or damaged row is
noticed and labelled again instead of being trusted.
"""

import hashlib
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from l2a.examples import TextInput
from l2a.files import full_disk_as_run_error
from l2a.teacher.outputs import TeacherOutputs

KEY_BYTES = 16


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
    """Outputs of one teacher at one maximum length.

    Rows of 16 bytes of key, 4 of checksum, 4 C of logits and 2 d of embedding (float16) lie in one file; a new row is
    appended, never rewritten.
    """

    def __init__(self, folder: Path, classes: int, width: int) -> None:
        """Open a store, creating its folder.

        Args:
            folder: Where the file lives; its name should hold the teacher's fingerprint and the maximum length.
            classes: C.
            width: d.
        """
        self._row = np.dtype(
            [("key", f"V{KEY_BYTES}"), ("sum", "<u4"), ("logits", "<f4", (classes,)), ("embedding", "<f2", (width,))]
        )
        self._path = folder / f"outputs-{classes}x{width}.bin"
        with full_disk_as_run_error(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._positions: dict[bytes, int] = {}
        self._rows = self._map()
        self._index(0)

    def __len__(self) -> int:
        """Return the number of texts known."""
        return len(self._positions)

    def _map(self) -> NDArray[np.void]:
        count = self._path.stat().st_size // self._row.itemsize if self._path.exists() else 0
        if count == 0:
            return np.zeros(0, self._row)
        return np.memmap(self._path, dtype=self._row, mode="r", shape=(count,))

    def _index(self, start: int) -> None:
        for position in range(start, len(self._rows)):
            self._positions[self._rows["key"][position].tobytes()] = position

    def find(self, keys: Sequence[bytes]) -> NDArray[np.int64]:
        """Look texts up.

        Args:
            keys: N content keys.

        Returns:
            int64 (N,): the row of each text, or -1 where it is missing or its row is damaged.
        """
        found = np.array([self._positions.get(key, -1) for key in keys], dtype=np.int64)
        for i, position in enumerate(found):
            if position >= 0 and _checksum(self._rows[position]) != self._rows["sum"][position]:
                found[i] = -1
        return found

    def read(self, positions: NDArray[np.int64]) -> TeacherOutputs:
        """Read rows.

        Args:
            positions: int64 (N,), as found.

        Returns:
            The outputs in that order.
        """
        rows = self._rows[positions]
        return TeacherOutputs(np.array(rows["logits"]), rows["embedding"].astype(np.float32))

    def append(self, keys: Sequence[bytes], outputs: TeacherOutputs) -> None:
        """Add new texts.

        Args:
            keys: N content keys.
            outputs: Their outputs.

        Raises:
            RunError: If the disk is full.
        """
        rows = np.zeros(len(keys), self._row)
        rows["key"] = np.frombuffer(b"".join(keys), dtype=f"V{KEY_BYTES}")
        rows["logits"], rows["embedding"] = outputs.logits, outputs.embeddings.astype(np.float16)
        rows["sum"] = [_checksum(row) for row in rows]
        with full_disk_as_run_error(self._path), FileLock(f"{self._path}.lock"):
            known = self._path.stat().st_size // self._row.itemsize if self._path.exists() else 0
            with self._path.open("r+b" if self._path.exists() else "wb") as file:
                file.seek(known * self._row.itemsize)  # a torn row of a killed writer is overwritten
                file.write(rows.tobytes())
        before = len(self._rows)
        self._rows = self._map()
        self._index(before)


def _checksum(row: np.void) -> int:
    return zlib.crc32(row["embedding"].tobytes(), zlib.crc32(row["logits"].tobytes(), zlib.crc32(row["key"].tobytes())))
