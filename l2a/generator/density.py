"""How close a text is to the target domain, judged by the teacher's embeddings."""

import time
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from l2a.data.examples import TextInput, normalised_hash
from l2a.teacher.store import Labeller, TeacherOutputs
from l2a.util.errors import UsageError

SCALE_POINTS = 2000
"""Texts of each domain, at most, that fix the zero and the unit of the log density."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TargetDensity:
    """A classifier of the two domains: its log odds estimate the log ratio of the target's density to the source's.

    They grow without bound along one direction, so a small tau makes caricatures.

    Attributes:
        mean: float64 (d,), of both domains.
        weights: float64 (d,), logistic regression of target against source.
        bias: Its intercept.
        location: Median of the log odds over the source texts.
        scale: Standard deviation of the log odds over both domains, each with half of the weight.
    """

    mean: Floats
    weights: Floats
    bias: float
    location: float = 0.0
    scale: float = 1.0

    def log_odds(self, embeddings: NDArray[np.float32]) -> Floats:
        """Log odds of the target domain, with both domains equally likely beforehand.

        Args:
            embeddings: float32 (N, d), the teacher's h_T(x).

        Returns:
            float64 (N,).
        """
        odds: Floats = (embeddings - self.mean) @ self.weights + self.bias
        return odds

    def log_density(self, embeddings: NDArray[np.float32]) -> Floats:
        """Standardised log density: 0 for the median source text, in standard deviations over both domains.

        With half of the weight on each domain the mean target text is at most 2 above the mean source text, so the
        chain's temperature means the same whatever the domains, the teacher's width and the number of target texts
        (our derivation).

        Args:
            embeddings: float32 (N, d).

        Returns:
            float64 (N,).
        """
        standardised: Floats = (self.log_odds(embeddings) - self.location) / self.scale
        return standardised


def fit_target_density(source: NDArray[np.float32], target: NDArray[np.float32]) -> TargetDensity:
    """Fit the domain classifier and its scale.

    Args:
        source: float32 (S, d), the teacher's embeddings of source texts.
        target: float32 (n, d), of the few target texts.

    Returns:
        The fitted density.

    Raises:
        UsageError: If there are fewer than 2 texts of a domain.
    """
    if min(len(source), len(target)) < 2:
        raise UsageError(
            f"the generator has {len(source)} source and {len(target)} target texts; give at least 2 of each domain"
        )
    with threadpool_limits(limits=1, user_api="blas"):  # these problems are small: more threads only get in the way
        raw = _fit(source.astype(np.float64), target.astype(np.float64))
        of_source, of_target = (raw.log_odds(few[:: -(-len(few) // SCALE_POINTS)]) for few in (source, target))
    gap = of_target.mean() - of_source.mean()
    scale = float(np.sqrt((of_source.var() + of_target.var()) / 2 + gap**2 / 4))
    return replace(raw, location=float(np.median(of_source)), scale=max(scale, 1e-6))


def _fit(source: Floats, target: Floats) -> TargetDensity:
    mean = np.concatenate([source, target]).mean(axis=0)
    both = np.concatenate([source - mean, target - mean])
    spread = max(float(np.sqrt(both.var(axis=0).mean())), 1e-12)
    model = LogisticRegression(C=0.1, class_weight="balanced", max_iter=200)
    model.fit(both / spread, np.repeat([0, 1], [len(source), len(target)]))
    return TargetDensity(mean, model.coef_[0] / spread, float(model.intercept_[0]))


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
        self._rows |= dict.fromkeys(new, FORBIDDEN)
        wanted = [text for text, key in new.items() if key not in self._forbidden]
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
            rows: int64, of any shape.

        Returns:
            float64, of that shape, minus infinity for forbidden texts.
        """
        values = [-np.inf if row == FORBIDDEN else self.log_density[row] for row in rows.ravel().tolist()]
        return np.array(values).reshape(rows.shape)

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
