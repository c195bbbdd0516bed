"""How close a text is to the target domain, judged by the teacher's embeddings."""

import time
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.special import expit
from sklearn.covariance import ledoit_wolf
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from l2a.data.examples import TextInput, normalised_hash
from l2a.teacher.store import Labeller, TeacherOutputs
from l2a.util.errors import UsageError

MAX_DIMENSIONS = 4
"""On four pairs of domains with 8 to 256 target texts, 4 directions ranked held-out target text above source text as
well as any number (AUC 0.77 to 1.00) and 16 clearly worse (0.72 to 0.99): a kernel density fades in many dimensions."""
BLOCK = 512
SCALE_POINTS = 2000
"""Texts of each domain, at most, that fix the zero and the unit of the log density."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TargetDensity:
    """A classifier of the two domains and a kernel density of the target's embeddings.

    The chain seeks the classifier's log odds by default: they rank held-out target text above source text better (AUC
    0.92 to 0.99 on the shipped pairs). They grow without bound along one direction, so a small tau makes caricatures.

    Attributes:
        kind: "ratio" or "kde": which of the two ``log_density`` gives.
        mean: float64 (d,), of both domains.
        whitening: float64 (d, r), to the r leading principal directions, unit variance each.
        points: float64 (n, r), the whitened target embeddings.
        bandwidth: Standard deviation of the Gaussian kernel.
        domain_weights: float64 (d,), logistic regression of target against source.
        domain_bias: Its intercept.
        location: Median of the raw values over the source texts.
        scale: Standard deviation of the raw values over both domains, each with half of the weight.
    """

    kind: str
    mean: Floats
    whitening: Floats
    points: Floats
    bandwidth: float
    domain_weights: Floats
    domain_bias: float
    location: float = 0.0
    scale: float = 1.0

    def log_density(self, embeddings: NDArray[np.float32]) -> Floats:
        """Standardised log density: 0 for the median source text, in standard deviations over both domains.

        With half of the weight on each domain the mean target text is at most 2 above the mean source text, so the
        chain's temperature means the same whatever the domains, the teacher's width and the number of target texts
        (our derivation).

        Args:
            embeddings: float32 (N, d), the teacher's h_T(x).

        Returns:
            float64 (N,).
        """
        raw = self._log_odds(embeddings) if self.kind == "ratio" else self._kernel(embeddings)
        standardised: Floats = (raw - self.location) / self.scale
        return standardised

    def domain_probability(self, embeddings: NDArray[np.float32]) -> Floats:
        """Probability that a text is from the target, with both domains equally likely beforehand.

        Args:
            embeddings: float32 (N, d).

        Returns:
            float64 (N,).
        """
        probability: Floats = expit(self._log_odds(embeddings))
        return probability

    def _kernel(self, embeddings: NDArray[np.float32]) -> Floats:
        return kernel_log_density((embeddings - self.mean) @ self.whitening, self.points, self.bandwidth)

    def _log_odds(self, embeddings: NDArray[np.float32]) -> Floats:
        odds: Floats = (embeddings - self.mean) @ self.domain_weights + self.domain_bias
        return odds


def fit_target_density(source: NDArray[np.float32], target: NDArray[np.float32], kind: str = "ratio") -> TargetDensity:
    """Fit the density and the domain classifier.

    Args:
        source: float32 (S, d), the teacher's embeddings of source texts.
        target: float32 (n, d), of the few target texts.
        kind: "ratio" for the classifier's log odds, "kde" for the kernel density.

    Returns:
        The fitted density.

    Raises:
        UsageError: If there are fewer than 2 texts of a domain.
    """
    if min(len(source), len(target)) < 2:
        raise UsageError(
            f"generator: {len(source)} source and {len(target)} target texts came; give at least 2 of each domain"
        )
    with threadpool_limits(limits=1, user_api="blas"):  # these problems are small: more threads only get in the way
        raw = _fit(source.astype(np.float64), target.astype(np.float64), kind)
        return _standardise(raw, raw.log_density(_thinned(source)), raw.log_density(_thinned(target)))


def _thinned(embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    return embeddings[:: -(-len(embeddings) // SCALE_POINTS)]


def _standardise(raw: TargetDensity, source_values: Floats, target_values: Floats) -> TargetDensity:
    gap = target_values.mean() - source_values.mean()
    scale = float(np.sqrt((source_values.var() + target_values.var()) / 2 + gap**2 / 4))
    return replace(raw, location=float(np.median(source_values)), scale=max(scale, 1e-6))


def _fit(source: Floats, target: Floats, kind: str) -> TargetDensity:
    both = np.concatenate([source, target])
    mean = both.mean(axis=0)
    whitening = fit_whitening(both, dimensions=min(MAX_DIMENSIONS, max(1, len(target) // 2)))
    points = (target - mean) @ whitening
    bandwidth = float(len(points) ** (-1 / (points.shape[1] + 4)))  # Scott's rule at unit variance
    weights, bias = _fit_domain_classifier(source - mean, target - mean)
    return TargetDensity(kind, mean, whitening, points, bandwidth, weights, bias)


def fit_whitening(embeddings: Floats, dimensions: int) -> Floats:
    """Fit PCA whitening with a Ledoit-Wolf covariance, which is sane with fewer points than dimensions.

    Args:
        embeddings: float64 (N, d).
        dimensions: Leading directions to keep.

    Returns:
        float64 (d, r).
    """
    covariance, _ = ledoit_wolf(embeddings)
    width = len(covariance)
    values, vectors = eigh(covariance, subset_by_index=[max(0, width - dimensions), width - 1])
    scaled: Floats = vectors / np.sqrt(np.maximum(values, 1e-12))
    return scaled


def kernel_log_density(queries: Floats, points: Floats, bandwidth: float) -> Floats:
    """Log density of a Gaussian kernel estimate.

    Args:
        queries: float64 (N, r).
        points: float64 (n, r).
        bandwidth: Standard deviation of the kernel.

    Returns:
        float64 (N,).
    """
    constant = np.log(len(points)) + 0.5 * points.shape[1] * np.log(2 * np.pi * bandwidth**2)
    squares = (points**2).sum(axis=1)
    result = np.empty(len(queries))
    for start in range(0, len(queries), BLOCK):
        block = queries[start : start + BLOCK]
        exponents = ((block**2).sum(axis=1)[:, None] + squares - 2 * block @ points.T) / (-2 * bandwidth**2)
        highest = exponents.max(axis=1)
        exponents -= highest[:, None]
        result[start : start + BLOCK] = highest + np.log(np.exp(exponents).sum(axis=1)) - constant
    return result


def _fit_domain_classifier(source: Floats, target: Floats) -> tuple[Floats, float]:
    spread = float(np.sqrt(np.concatenate([source, target]).var(axis=0).mean()))
    is_target = np.repeat([0, 1], [len(source), len(target)])
    model = LogisticRegression(C=0.1, class_weight="balanced", max_iter=200)
    model.fit(np.concatenate([source, target]) / max(spread, 1e-12), is_target)
    return model.coef_[0] / max(spread, 1e-12), float(model.intercept_[0])


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
