"""Runs a trained policy over a whole pool."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from l2a.config import SelectorConfig
from l2a.selector.agents import AgentCard, load_agent
from l2a.selector.environment import Episodes, SelectionTask, build_task
from l2a.selector.network import TrainedPolicy
from l2a.selector.numerics import Floats
from l2a.selector.problem import Fact, RealReward, Selection, SelectionProblem, keep_best
from l2a.selector.reward import surrogate_reward
from l2a.selector.rules import RULES
from l2a.selector.saving import load_policy
from l2a.util.errors import UsageError
from l2a.util.progress import SILENT, Progress

PASSES = 4


def score_pool(policy: TrainedPolicy, task: SelectionTask, keep_rate: float, rng: np.random.Generator) -> Floats:
    """Score every candidate the way the policy was trained: in episodes, each over a random part of the pool.

    The pool is cut into episodes several times in different orders; in each batch the best-scored share is kept, so
    that the state moves as it did in training; a candidate's score is its mean logit.

    Args:
        policy: The policy.
        task: The pool and the shape of an episode.
        keep_rate: Share that is kept in each batch.
        rng: Draws the orders.

    Returns:
        float32 (N,), mean logits.
    """
    orders = np.concatenate([_cut(task, rng) for _ in range(PASSES)])
    episodes = Episodes(task, len(orders))
    episodes.reset(np.arange(len(orders)), orders)
    totals, counts = np.zeros(len(task)), np.zeros(len(task))
    for _ in range(task.steps):
        batch, logits = episodes.batch(), policy.logits(episodes.observe())
        np.add.at(totals, batch, logits)
        np.add.at(counts, batch, 1.0)
        episodes.step(_best_of_each_batch(logits, keep_rate))
    return (totals / counts).astype(np.float32)


def _cut(task: SelectionTask, rng: np.random.Generator) -> NDArray[np.int64]:
    # The last episode is filled up with candidates of the first: an episode is never longer than the pool, so none
    # is shown twice in one.
    shown = task.steps * task.batch
    order = rng.permutation(len(task))
    return np.concatenate([order, order[: -len(order) % shown]]).reshape(-1, shown)


def _best_of_each_batch(logits: Floats, keep_rate: float) -> NDArray[np.bool_]:
    kept = np.zeros(logits.shape, bool)
    best = np.argsort(-logits, axis=1, kind="stable")[:, : max(1, round(keep_rate * logits.shape[1]))]
    np.put_along_axis(kept, best, True, axis=1)
    return kept


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


def select(
    problem: SelectionProblem,
    config: SelectorConfig,
    rng: np.random.Generator,
    start_from: TrainedPolicy | None = None,
    progress: Progress = SILENT,
) -> Selection:
    """Choose the candidates that the student learns from.

    Args:
        problem: The pool and the state of the student.
        config: Agent, keep rate and budget of the training.
        rng: The source of every random draw.
        start_from: A policy to train further, such as the previous round's; rules and trained policies ignore it.
        progress: Shows the training.

    Returns:
        Exactly round(keep_rate * N) kept candidates, whichever agent or rule chose them; "all" keeps all.

    Raises:
        UsageError: If the agent's card is missing or wrong.
        RunError: If the training diverges, or a saved policy cannot be read.
    """
    card = load_agent(config.agent)
    if card.rule is not None:
        return _select_by_rule(problem, config, card.rule, rng)
    if card.policy is not None:
        return _select_by_saved_policy(problem, config, load_policy(Path(card.policy)), rng)
    return _select_by_learning(problem, config, card, rng, start_from, progress)


def select_again(
    problem: SelectionProblem, config: SelectorConfig, rng: np.random.Generator, policy: TrainedPolicy | None
) -> Selection:
    """Choose anew inside a round, for the student as it is now; nothing is trained and no real step taken.

    Args:
        problem: The same pool, with the student's logits as they are now.
        config: As for the round's first selection.
        rng: The source of every random draw.
        policy: That of the first selection; None where a rule chose.

    Returns:
        Exactly round(keep_rate * N) kept candidates.
    """
    return select(problem, config, rng) if policy is None else apply_policy(problem, policy, config, rng)


def apply_policy(
    problem: SelectionProblem, policy: TrainedPolicy, config: SelectorConfig, rng: np.random.Generator
) -> Selection:
    """Choose candidates with a policy as it is, without training.

    Args:
        problem: The pool and the state of the student.
        policy: Trained here or on other domains.
        config: Keep rate, batch and steps.
        rng: Draws the orders in which candidates are shown.

    Returns:
        Exactly round(keep_rate * N) kept candidates.
    """
    task = build_task(problem, config, policy.feature_names)
    scores = score_pool(policy, task, config.keep_rate, rng)
    return Selection(keep_best(scores, config.keep_rate, problem.classes), scores, policy.agent, {}, policy)


def _select_by_rule(
    problem: SelectionProblem, config: SelectorConfig, rule: str, rng: np.random.Generator
) -> Selection:
    if rule not in RULES:
        raise UsageError(f"algorithm: there is no rule {rule!r}; known: {', '.join(RULES)}")
    scores = RULES[rule](problem, rng)
    rate = 1.0 if rule == "all" else config.keep_rate
    return Selection(keep_best(scores, rate, problem.classes), scores, config.agent, {})


def _select_by_saved_policy(
    problem: SelectionProblem, config: SelectorConfig, policy: TrainedPolicy, rng: np.random.Generator
) -> Selection:
    task = build_task(problem, config, policy.feature_names)
    scores = [score_pool(policy, task, config.keep_rate, rng)]
    # It has not seen these influences. Random halves are worth much the same, and the two rewards of eight of them
    # would correlate by chance; policies that are trained in the run come near the best half of themselves.
    extremes = (task.surrogate.influences, -task.surrogate.influences)
    best, chosen, facts = _best_by_real_reward(problem, config, task, scores, rng, extremes)
    kept = keep_best(chosen, config.keep_rate, problem.classes)
    return Selection(kept, chosen, config.agent, facts, policy, fell_back=best > 0)


def _select_by_learning(
    problem: SelectionProblem,
    config: SelectorConfig,
    card: AgentCard,
    rng: np.random.Generator,
    start_from: TrainedPolicy | None,
    progress: Progress,
) -> Selection:
    from l2a.selector.training import train_agent

    task = build_task(problem, config, None if start_from is None else start_from.feature_names)
    seed = int(rng.integers(2**31))
    training = train_agent([task], config.agent, card, config, seed, start_from, progress)
    scores = [score_pool(policy, task, config.keep_rate, rng) for policy in training.snapshots]
    facts: dict[str, Fact] = {
        "training_steps": training.steps,
        "steps_per_second": training.steps_per_second,
        "reward_curve": list(training.reward_curve),
    }
    best, chosen, more_facts = _best_by_real_reward(problem, config, task, scores, rng)
    last, kept = len(scores) - 1, keep_best(chosen, config.keep_rate, problem.classes)
    policy = training.snapshots[min(best, last)]
    return Selection(kept, chosen, config.agent, facts | more_facts, policy, fell_back=best > last)


def _best_by_real_reward(
    problem: SelectionProblem,
    config: SelectorConfig,
    task: SelectionTask,
    scores: list[Floats],
    rng: np.random.Generator,
    others: Sequence[Floats] = (),
) -> tuple[int, Floats, dict[str, Fact]]:
    if problem.real_reward is None or config.real_evaluations == 0:
        return len(scores) - 1, scores[-1], {}
    tiers, judged = rerank(scores, task, problem.real_reward, config, rng, others)
    facts: dict[str, Fact] = {
        "tier_correlation": tiers.correlation,
        "tiers_agree": tiers.trusted,
        "surrogate_rewards": list(tiers.surrogate),
        "real_rewards": list(tiers.real),
        "chosen": "learned policy" if tiers.chosen < len(scores) else "another selection",
    }
    return tiers.chosen, judged[tiers.chosen], facts
