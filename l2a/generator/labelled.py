"""Texts that the chain has visited, with the teacher's outputs: each text is labelled once."""

import time
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import numpy as np
from numpy.typing import NDArray

from l2a.examples import TextInput, normalised_hash
from l2a.generator.density import TargetDensity
from l2a.teacher.outputs import Labeller, TeacherOutputs

FORBIDDEN = -1


class LabelledTexts:
    """Numbers texts as they come, and keeps their outputs and their log density.

    Attributes:
        inputs: The texts, by row.
        hashes: Their normalised hashes.
        log_density: Their standardised log target densities.
        labelled: How many texts the teacher labelled here.
        labelling_seconds: Wall seconds that it took.
    """

    def __init__(
        self,
        inputs: Sequence[TextInput],
        outputs: TeacherOutputs,
        density: TargetDensity,
        labeller: Labeller,
        forbidden_hashes: AbstractSet[str],
    ) -> None:
        """Start with texts whose outputs are known.

        Args:
            inputs: N texts, which get the rows 0 to N - 1.
            outputs: The teacher's outputs for them.
            density: Judges the embeddings.
            labeller: Labels new texts.
            forbidden_hashes: Normalised hashes of texts that get no row and are never labelled.
        """
        self.inputs: list[TextInput] = []
        self.hashes: list[str] = []
        self.log_density: list[float] = []
        self.labelled, self.labelling_seconds = 0, 0.0
        self._logits: list[NDArray[np.float32]] = []
        self._embeddings: list[NDArray[np.float32]] = []
        self._rows: dict[TextInput, int] = {}
        self._density, self._labeller, self._forbidden = density, labeller, forbidden_hashes
        self._append(inputs, [normalised_hash(text) for text in inputs], outputs)

    def rows(self, inputs: Sequence[TextInput]) -> NDArray[np.int64]:
        """Look texts up, labelling those that are new in one call.

        Args:
            inputs: Texts.

        Returns:
            int64, their rows; -1 for forbidden texts.
        """
        new = {text: normalised_hash(text) for text in inputs if text not in self._rows}
        for text, key in new.items():
            if key in self._forbidden:
                self._rows[text] = FORBIDDEN
        wanted = [text for text in new if text not in self._rows]
        if wanted:
            started = time.perf_counter()
            outputs = self._labeller(wanted)
            self.labelling_seconds += time.perf_counter() - started
            self.labelled += len(wanted)
            self._append(wanted, [new[text] for text in wanted], outputs)
        return np.array([self._rows[text] for text in inputs], dtype=np.int64)

    def densities(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the log densities of texts.

        Args:
            rows: int64 (N,).

        Returns:
            float64 (N,), minus infinity for forbidden texts.
        """
        return np.array([-np.inf if row == FORBIDDEN else self.log_density[row] for row in rows])

    def outputs(self, rows: NDArray[np.int64]) -> TeacherOutputs:
        """Collect the teacher's outputs of texts.

        Args:
            rows: int64 (N,), none forbidden, at least one.

        Returns:
            The outputs, in order.
        """
        return TeacherOutputs(
            np.stack([self._logits[row] for row in rows]), np.stack([self._embeddings[row] for row in rows])
        )

    def _append(self, inputs: Sequence[TextInput], hashes: Sequence[str], outputs: TeacherOutputs) -> None:
        for text, key in zip(inputs, hashes, strict=True):
            self._rows[text] = FORBIDDEN if key in self._forbidden else len(self.inputs)
            self.inputs.append(text)
        self.hashes.extend(hashes)
        self._logits.extend(outputs.logits)
        self._embeddings.extend(outputs.embeddings)
        self.log_density.extend(self._density.log_density(outputs.embeddings).tolist())
