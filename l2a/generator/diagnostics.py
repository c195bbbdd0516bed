"""How well the chain moved, and what it cost."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ChainDiagnostics:
    """Facts about one run of the chains.

    Attributes:
        steps: Steps of each chain, burn-in included.
        chains: Chains side by side.
        degree: Probability with which operators changed a slot.
        acceptance: By kind of move: accepted share of the proposals that would change the text.
        effective_sample_size: Independent draws that the samples are worth, judged by the log density.
        proposal_log_density: Mean standardised log density of plain proposals.
        sample_log_density: Mean over the samples of the chain.
        target_log_density: Mean over the target texts that the density was fitted on.
        distinct_share: Distinct texts among the samples.
        labelled_texts: Texts that the teacher labelled.
        labelling_seconds: Wall seconds spent in the labeller.
        seconds: Wall seconds in all.
    """

    steps: int
    chains: int
    degree: float
    acceptance: Mapping[str, float]
    effective_sample_size: float
    proposal_log_density: float
    sample_log_density: float
    target_log_density: float
    distinct_share: float
    labelled_texts: int
    labelling_seconds: float
    seconds: float


def effective_sample_size(trace: NDArray[np.float64]) -> float:
    """Estimate how many independent draws the draws of several chains are worth.

    Autocorrelations are pooled over the chains and set against the variance of all draws together, so chains that
    disagree count for less; their sum is cut by Geyer's initial positive sequence (Geyer 1992, Practical MCMC).

    Args:
        trace: float64 (T, C), a scalar of the state by step and chain.

    Returns:
        Between 1 and T * C.
    """
    steps, chains = trace.shape
    total = trace.var()
    if steps < 4 or total == 0:
        return float(chains)
    means = trace.mean(axis=0)
    covariance = _autocovariance(trace - means).mean(axis=1) + means.var()
    pairs = covariance[: steps // 2 * 2].reshape(-1, 2).sum(axis=1) / total
    negative = np.flatnonzero(pairs <= 0)
    kept = pairs[: negative[0]] if len(negative) else pairs
    return float(np.clip(steps * chains / (2 * kept.sum() - 1), 1.0, steps * chains))


def _autocovariance(centred: NDArray[np.float64]) -> NDArray[np.float64]:
    steps = len(centred)
    spectrum = np.fft.rfft(centred, 2 * steps, axis=0)
    products: NDArray[np.float64] = np.fft.irfft(np.abs(spectrum) ** 2, 2 * steps, axis=0)[:steps]
    return products / steps
