"""How close a text is to the target domain, judged by the teacher's embeddings."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.special import expit, logsumexp
from sklearn.covariance import ledoit_wolf
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from l2a.errors import UsageError

MAX_DIMENSIONS = 16
BLOCK = 512
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TargetDensity:
    """A kernel density of the target's embeddings and a classifier of the two domains.

    Attributes:
        mean: float64 (d,), of both domains.
        whitening: float64 (d, r), to the r leading principal directions, unit variance each.
        points: float64 (n, r), the whitened target embeddings.
        bandwidth: Standard deviation of the Gaussian kernel.
        location: Median raw log density of the source texts.
        scale: Standard deviation of the raw log density of the source texts.
        domain_weights: float64 (d,), logistic regression of target against source.
        domain_bias: Its intercept.
    """

    mean: Floats
    whitening: Floats
    points: Floats
    bandwidth: float
    location: float
    scale: float
    domain_weights: Floats
    domain_bias: float

    def log_density(self, embeddings: NDArray[np.float32]) -> Floats:
        """Standardised log density: 0 for the median source text, one unit is one standard deviation over the source.

        The unit gives the chain's temperature the same meaning whatever the domains, the teacher's width and the
        number of target texts (our derivation).

        Args:
            embeddings: float32 (N, d), the teacher's h_T(x).

        Returns:
            float64 (N,).
        """
        whitened = (embeddings - self.mean) @ self.whitening
        standardised: Floats = (kernel_log_density(whitened, self.points, self.bandwidth) - self.location) / self.scale
        return standardised

    def domain_probability(self, embeddings: NDArray[np.float32]) -> Floats:
        """Probability that a text is from the target, with both domains equally likely beforehand.

        Args:
            embeddings: float32 (N, d).

        Returns:
            float64 (N,).
        """
        probability: Floats = expit((embeddings - self.mean) @ self.domain_weights + self.domain_bias)
        return probability


def fit_target_density(source: NDArray[np.float32], target: NDArray[np.float32]) -> TargetDensity:
    """Fit the density and the domain classifier.

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
            f"generator: {len(source)} source and {len(target)} target texts came; give at least 2 of each domain"
        )
    with threadpool_limits(limits=1, user_api="blas"):  # these problems are small: more threads only get in the way
        return _fit(source.astype(np.float64), target.astype(np.float64))


def _fit(source: Floats, target: Floats) -> TargetDensity:
    both = np.concatenate([source, target])
    mean = both.mean(axis=0)
    whitening = fit_whitening(both, dimensions=min(MAX_DIMENSIONS, max(1, len(target) // 2)))
    points = (target - mean) @ whitening
    bandwidth = float(len(points) ** (-1 / (points.shape[1] + 4)))  # Scott's rule at unit variance
    reference = kernel_log_density((source - mean) @ whitening, points, bandwidth)
    weights, bias = _fit_domain_classifier(source - mean, target - mean)
    scale = max(float(reference.std()), 1e-6)
    return TargetDensity(mean, whitening, points, bandwidth, float(np.median(reference)), scale, weights, bias)


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
        squared = (block**2).sum(axis=1)[:, None] + squares - 2 * block @ points.T
        result[start : start + BLOCK] = logsumexp(-np.maximum(squared, 0) / (2 * bandwidth**2), axis=1) - constant
    return result


def _fit_domain_classifier(source: Floats, target: Floats) -> tuple[Floats, float]:
    spread = float(np.sqrt(np.concatenate([source, target]).var(axis=0).mean()))
    is_target = np.repeat([0, 1], [len(source), len(target)])
    model = LogisticRegression(C=0.1, class_weight="balanced", max_iter=200)
    model.fit(np.concatenate([source, target]) / max(spread, 1e-12), is_target)
    return model.coef_[0] / max(spread, 1e-12), float(model.intercept_[0])
