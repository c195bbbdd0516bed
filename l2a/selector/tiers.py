"""The second tier of the reward: real distillation steps judge the few selections that the surrogate found."""

import logging
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from l2a.selector.numerics import Floats
from l2a.selector.problem import RealReward, keep_best
from l2a.selector.surrogate import Surrogate, surrogate_reward

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tiers:
    """What the two tiers say of the same selections.

    Attributes:
        chosen: Position of the selection to use.
        surrogate: Gain in log-likelihood by the surrogate, one a selection.
        real: Log-likelihood after real distillation steps, one a selection.
        correlation: Spearman correlation of the two; nan when one of them is constant.
        trusted: Whether the correlation reaches the level that was asked for.
    """

    chosen: int
    surrogate: tuple[float, ...]
    real: tuple[float, ...]
    correlation: float
    trusted: bool


def rerank(
    policy_scores: list[Floats],
    surrogate: Surrogate,
    real_reward: RealReward,
    keep_rate: float,
    evaluations: int,
    level: float,
    rng: np.random.Generator,
) -> tuple[Tiers, list[Floats]]:
    """Choose among policies by real reward, and measure how far the surrogate can be trusted.

    Besides the policies' selections, random ones are judged, and one that a policy ranks last, so that the
    correlation is measured over selections of different worth. Where it is below the level, the run warns, and the
    random selections compete with the policies.

    Args:
        policy_scores: float32 (N,) of each policy.
        surrogate: The first tier.
        real_reward: The second tier.
        keep_rate: Share that is kept.
        evaluations: Real rewards to compute, at least one a policy.
        level: Smallest correlation that is trusted.
        rng: Draws the random selections and the surrogate's orders.

    Returns:
        The verdict, and the scores of every selection judged, policies first, then random ones.
    """
    policies, size = len(policy_scores), len(policy_scores[0])
    spare = max(evaluations - policies, 0)
    opposite = [-policy_scores[-1]] if spare > 1 else []
    drawn = [rng.random(size, np.float32) for _ in range(spare - len(opposite))]
    scores = [*policy_scores, *drawn, *opposite]
    kept = [keep_best(values, keep_rate) for values in scores]
    first = tuple(surrogate_reward(surrogate, mask, rng) for mask in kept)
    second = tuple(float(real_reward(mask)) for mask in kept)
    correlation = _spearman(first, second)
    trusted = bool(correlation >= level)
    if not trusted:
        logger.warning(_distrust(correlation, level))
    eligible = policies if trusted else policies + len(drawn)
    return Tiers(int(np.argmax(second[:eligible])), first, second, correlation, trusted), scores


def _spearman(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    if len(set(first)) < 2 or len(set(second)) < 2:
        return float("nan")
    return float(spearmanr(first, second).statistic)


def _distrust(correlation: float, level: float) -> str:
    return (
        f"selector: the surrogate reward ranks selections unlike real distillation (Spearman {correlation:.2f}, "
        f"below {level:.2f}); the selection with the best real reward is used, random ones included"
    )
