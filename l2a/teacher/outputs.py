"""What a teacher says about texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l2a.examples import TextInput
from l2a.teacher.row_file import forget_pages


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
