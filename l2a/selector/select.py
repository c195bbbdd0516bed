"""One interface for every agent and rule: candidates in, the kept ones out."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from l2a.errors import UsageError
from l2a.progress import SILENT, Progress
from l2a.selector.agents import AgentCard, load_agent
from l2a.selector.config import SelectorConfig
from l2a.selector.episodes import SelectionTask, build_task
from l2a.selector.numerics import Floats
from l2a.selector.policy import TrainedPolicy
from l2a.selector.problem import Fact, Selection, SelectionProblem, keep_best
from l2a.selector.rules import RULES
from l2a.selector.saving import load_policy
from l2a.selector.scoring import score_pool
from l2a.selector.tiers import rerank


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
