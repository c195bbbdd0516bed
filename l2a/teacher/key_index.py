"""Finds the row of a key among millions: sorted arrays, 24 bytes a key."""

import numpy as np
from numpy.typing import NDArray

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
