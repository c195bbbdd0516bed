"""The second tier of the reward: real distillation steps judge the few selections that the surrogate found."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from l2a.selector.config import SelectorConfig
from l2a.selector.episodes import SelectionTask
from l2a.selector.numerics import Floats
from l2a.selector.problem import RealReward, keep_best
from l2a.selector.surrogate import surrogate_reward

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tiers:
    """What the two tiers say of the same selections.

    Attributes:
        chosen: Position of the selection to use.
        surrogate: Gain in log-likelihood by the surrogate, one a selection.
        real: Log-likelihood (``separation``) after real distillation steps, one a selection.
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
    task: SelectionTask,
    real_reward: RealReward,
    config: SelectorConfig,
    rng: np.random.Generator,
    others: Sequence[Floats] = (),
) -> tuple[Tiers, list[Floats]]:
    """Choose among policies by real reward, and measure how far the surrogate can be trusted.

    Besides the policies' selections, random ones are judged: one drawn without regard to the candidates, and those of
    linear policies with random weights, so that the correlation is measured over selections of different worth.
    Where it is below ``config.tier_correlation``, the run warns, and all others compete with the learned
    ones: a search by real reward over few policies.

    Args:
        policy_scores: float32 (N,) of each learned policy.
        task: The candidates' features and the first tier.
        real_reward: The second tier.
        config: Keep rate, real rewards to compute (at least one a policy) and the correlation that is trusted.
        rng: Draws the random selections.
        others: float32 (N,) of each further selection to judge among the random ones.

    Returns:
        The verdict, and the scores of every selection judged, learned policies first.
    """
    policies = len(policy_scores)
    drawn = random_scores(task, max(config.real_evaluations - policies - len(others), 0), rng)
    scores = [*policy_scores, *others, *drawn]
    kept = [keep_best(values, config.keep_rate, task.classes) for values in scores]
    first = tuple(surrogate_reward(task.surrogate, mask) for mask in kept)
    second = tuple(float(real_reward(mask)) for mask in kept)
    correlation = _spearman(first, second)
    trusted = bool(correlation >= config.tier_correlation)
    if not trusted:
        logger.warning(_distrust(correlation, config.tier_correlation))
    eligible = policies if trusted and policies else len(scores)
    return Tiers(int(np.argmax(second[:eligible])), first, second, correlation, trusted), scores


def random_scores(task: SelectionTask, count: int, rng: np.random.Generator) -> list[Floats]:
    """Draw selections of different worth: one without regard to the candidates, others by random linear policies.

    Args:
        task: The candidates' features.
        count: How many.
        rng: Draws them.

    Returns:
        float32 (N,) each.
    """
    features = task.features.matrix
    weights = rng.normal(size=(features.shape[1], count)).astype(np.float32)
    return [rng.random(len(task), np.float32) if i == 0 else features @ weights[:, i] for i in range(count)]


def _spearman(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    if len(set(first)) < 2 or len(set(second)) < 2:
        return float("nan")
    return float(spearmanr(first, second).statistic)


def _distrust(correlation: float, level: float) -> str:
    return (
        f"selector: the surrogate reward ranks selections unlike real distillation (Spearman {correlation:.2f}, "
        f"below {level:.2f}); the selection with the best real reward is used, random ones included"
    )
