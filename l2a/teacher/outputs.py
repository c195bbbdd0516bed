"""What a teacher says about texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l2a.examples import TextInput


@dataclass(frozen=True)
class TeacherOutputs:
    """A teacher's outputs for N texts.

    Attributes:
        logits: float32 (N, C).
        embeddings: float32 (N, d), the pooled last hidden state h_T(x).
    """

    logits: NDArray[np.float32]
    embeddings: NDArray[np.float32]

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.logits)

    def take(self, indices: NDArray[np.int64]) -> "TeacherOutputs":
        """Select rows by position.

        Args:
            indices: int64 positions.

        Returns:
            The selected rows.
        """
        return TeacherOutputs(self.logits[indices], self.embeddings[indices])

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


Labeller = Callable[[Sequence[TextInput]], TeacherOutputs]
"""Labels texts with the teacher: cached by content, duplicates labelled once."""
