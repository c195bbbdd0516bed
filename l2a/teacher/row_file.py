"""Append-only files of rows of one width, and sums by which a damaged row is noticed."""

import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


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
