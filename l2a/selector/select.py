"""Chooses candidates by a rule or a policy, checks a policy's choice by the real reward, and explains it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from l2a.config import SelectorConfig
from l2a.data import Bools, Floats, TextInput
from l2a.kd.trainer import CLEARLY, standard_error
from l2a.selector import agents, arms, problem as pools, reward
from l2a.selector.algorithms import TrainedPolicy, load_policy, train_agent, warn_if_constant
from l2a.selector.environment import Episodes, SelectionTask, build_task
from l2a.selector.problem import Fact, Selection, SelectionProblem, keep_best
from l2a.util import SILENT, Progress, logger

RETESTED = 3  # selections whose real reward is measured twice
PASSES = 4  # times that a pool is shown to a policy, each in another order


def select(
    problem: SelectionProblem, config: SelectorConfig, rng: np.random.Generator,
    start_from: TrainedPolicy | None = None, progress: Progress = SILENT,
) -> Selection:  # fmt: skip
    """Choose the candidates that the student learns from.

    Args:
        problem: The pool and the state of the student.
        config: Agent, keep rate and budget of the training.
        rng: The source of every random draw.
        start_from: A policy to train further, such as the previous round's; rules and trained policies ignore it.
        progress: Shows the training.

    Raises:
        UsageError: If the agent's card is missing or wrong.
        RunError: If the training diverges, or a saved policy cannot be read.
    """
    card = agents.load_agent(config.agent)
    if card.rule is not None:
        scores = pools.RULES[card.rule](problem, rng)
        rate = 1.0 if card.rule == "all" else config.keep_rate
        return Selection(keep_best(scores, rate, problem.classes), scores, config.agent, {})
    policies: tuple[TrainedPolicy, ...] = (load_policy(card.policy),) if card.policy else ()
    start = policies[0] if policies else start_from
    task, facts = build_task(problem, config, start.feature_names if start else None), dict[str, Fact]()
    others = list[Floats]()
    if policies:
        # It has not seen this surrogate. Random selections are worth much the same, and the two rewards of eight of
        # them would correlate by chance; policies that are trained in the run come near the best themselves.
        others = [sign * reward.marginal_gains(task.surrogate) for sign in (1, -1)]
    else:
        seed, judged = int(rng.integers(2**31)), []
        if card.acts_on == "arms":
            names, arm_of = arms.pool_arms(problem.pool)
            shares, training = arms.train_shares(task, arm_of, card, config, seed, progress)
            facts["arms"] = dict(zip(names, shares.tolist(), strict=True))
            judged = [pools.in_shares(shares, arm_of, task.classes, rng)]
        else:
            training = train_agent([task], config.agent, card, config, seed, start_from, progress)
        policies, facts["training_steps"] = training.snapshots, training.steps
        facts |= {"steps_per_second": training.steps_per_second, "reward_curve": list(training.reward_curve)}
    judged = [score_pool(policy, task, config.keep_rate, rng) for policy in policies] or judged
    best = last = len(judged) - 1
    if problem.real_reward is not None and config.real_evaluations > 0:
        tiers, judged = rerank(judged, task, problem.real_reward, config, rng, others)
        best = tiers.chosen
        facts |= {"tier_correlation": tiers.correlation, "tiers_agree": tiers.trusted}
        facts |= {"surrogate_rewards": list(tiers.surrogate), "real_rewards": list(tiers.real)}
        facts["chosen"] = "learned policy" if best <= last else "another selection"
        facts |= retest([keep_best(values, config.keep_rate, task.classes) for values in judged], tiers, problem)
        judged.append(rng.random(len(problem), np.float32))
        facts |= _label_gain(problem, *(keep_best(judged[i], config.keep_rate, task.classes) for i in (best, -1)))
        if facts.get("vetoed"):
            best, facts["chosen"] = len(judged) - 1, "random: the labels refuse the selection"
            logger.warning("selector: labels of the reward split refuse %s; a random choice is used", config.agent)
    kept = keep_best(judged[best], config.keep_rate, task.classes)
    policy = policies[min(best, last)] if policies else None
    return Selection(kept, judged[best], config.agent, facts, policy, fell_back=best > last)


def _label_gain(problem: SelectionProblem, kept: Bools, plain: Bools) -> dict[str, Fact]:
    """Compare a selection with a random one on the few labels of the reward split, text by text."""
    gains = problem.veto(kept) - problem.veto(plain) if problem.veto is not None else np.zeros(0)
    if len(gains) < 2:
        return {}
    gain, noise = float(gains.mean()), standard_error(gains)
    return {"label_gain": gain, "label_noise": noise, "vetoed": gain < -CLEARLY * noise}


def retest(kept: Sequence[Bools], tiers: "Tiers", problem: SelectionProblem) -> dict[str, Fact]:
    """Measure both rewards of selections again, with other draws of candidates, reward texts and dropout.

    Args:
        kept: bool (N,) of each selection that both tiers judged.
        tiers: What they said.
        problem: Knows the same problem with other draws; without it there is nothing to say.

    Returns:
        Of each reward, the rank correlation of its two measurements and its noise: the standard deviation of one, in
        nats, estimated from their differences. The real reward is measured again for few of the selections.
    """
    if problem.repeated is None or problem.repeated.real_reward is None:
        return {}
    surrogate, real, facts = reward.surrogate_of(problem.repeated), problem.repeated.real_reward, dict[str, Fact]()
    again = [reward.surrogate_reward(surrogate, mask) for mask in kept], [real(mask) for mask in kept[:RETESTED]]
    for name, first, second in zip(("surrogate", "real"), (tiers.surrogate, tiers.real), again, strict=True):
        before = np.array(first[: len(second)])
        facts[f"{name}_retest"] = rank_correlation(before.tolist(), second)
        facts[f"{name}_noise"] = float(np.std(before - second, ddof=1) / 2**0.5) if len(second) > 1 else float("nan")
    return facts


def apply_policy(
    problem: SelectionProblem, policy: TrainedPolicy, config: SelectorConfig, rng: np.random.Generator
) -> Selection:
    """Choose round(keep_rate * N) candidates with a policy as it is: nothing is trained and no real step taken.

    The policy was trained here or on other domains; ``rng`` draws the orders in which candidates are shown.
    """
    scores = score_pool(policy, build_task(problem, config, policy.feature_names), config.keep_rate, rng)
    return Selection(keep_best(scores, config.keep_rate, problem.classes), scores, policy.agent, {}, policy)


def score_pool(policy: TrainedPolicy, task: SelectionTask, keep_rate: float, rng: np.random.Generator) -> Floats:
    """Score every candidate the way the policy was trained: in episodes, each over a random part of the pool.

    The pool is cut into episodes several times in different orders; in each batch the best-scored share is kept, so
    that the state moves as it did in training; a candidate's score is its mean logit, float32 (N,).
    """
    # The last episode is filled up with candidates of the first: an episode is never longer than the pool, so none is
    # shown twice in one.
    shown, passes = task.steps * task.batch, [rng.permutation(len(task)) for _ in range(PASSES)]
    orders = np.concatenate([np.append(order, order[: -len(order) % shown]) for order in passes]).reshape(-1, shown)
    episodes = Episodes(task, len(orders))
    episodes.reset(np.arange(len(orders)), orders)
    totals = np.zeros(len(task))
    share = max(1, round(keep_rate * task.batch))
    for _ in range(task.steps):
        batch, logits = episodes.batch(), policy.logits(episodes.observe())
        np.add.at(totals, batch, logits)
        episodes.step(np.argsort(-logits, axis=1, kind="stable").argsort(axis=1) < share)
    return (totals / np.bincount(orders.ravel())).astype(np.float32)


class Tiers(NamedTuple):
    """What the two tiers of the reward say of the same selections.

    Attributes:
        chosen: Position of the selection to use.
        surrogate: Surrogate reward, one a selection.
        real: Real reward, one a selection.
        correlation: Spearman correlation of the two; nan when one of them is constant.
        trusted: Whether the correlation reaches the required level.
    """

    chosen: int
    surrogate: tuple[float, ...]
    real: tuple[float, ...]
    correlation: float
    trusted: bool


def rerank(
    policy_scores: Sequence[Floats], task: SelectionTask, real_reward: pools.RealReward, config: SelectorConfig,
    rng: np.random.Generator, others: Sequence[Floats] = (),
) -> tuple[Tiers, list[Floats]]:  # fmt: skip
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
    policies, left = len(policy_scores), config.real_evaluations - len(policy_scores) - len(others)
    scores = [*policy_scores, *others, *random_scores(task, max(left, 0), rng)]
    kept = [keep_best(values, config.keep_rate, task.classes) for values in scores]
    first = tuple(reward.surrogate_reward(task.surrogate, mask) for mask in kept)
    second = tuple(float(real_reward(mask)) for mask in kept)
    correlation = rank_correlation(first, second)
    trusted = bool(correlation >= config.tier_correlation)
    varies = [warn_if_constant(name, values) for name, values in (("fast reward", first), ("real reward", second))]
    if not trusted and all(varies):
        ranked = "the surrogate reward and real distillation rank selections differently (Spearman %.2f, below %.2f)"
        message = f"selector: {ranked}; the selection with the best real reward is used, random ones included"
        logger.warning(message, correlation, config.tier_correlation)
    eligible = policies if trusted and policies else len(scores)
    return Tiers(int(np.argmax(second[:eligible])), first, second, correlation, trusted), scores


def random_scores(task: SelectionTask, count: int, rng: np.random.Generator) -> list[Floats]:
    """Draw selections of different worth: one without regard to the candidates, others by random linear policies.

    Each of the ``count`` selections is given by scores, float32 (N,).
    """
    features = task.features.matrix
    weights = rng.normal(size=(features.shape[1], count)).astype(np.float32)
    return [rng.random(len(task), np.float32) if i == 0 else features @ weights[:, i] for i in range(count)]


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Correlate two rewards of the same selections by Spearman's coefficient; nan where one of the two is constant."""
    constant = len(set(first)) < 2 or len(set(second)) < 2
    return float("nan") if constant else float(spearmanr(first, second).statistic)


class Inspection(NamedTuple):
    """A policy's choice from one pool, explained.

    Attributes:
        selection: The choice.
        importances: By feature, what shuffling it over the candidates costs on the mean (permutation importance:
            Breiman, 2001): surrogate reward in nats, and the share of candidates then decided on otherwise. The most
            important comes first; all operators together count as one, and all origins.
        quartiles: By feature, the quartiles among the kept and among the dropped candidates, in its own units.
        operators: By operator, its share of the kept and of the dropped candidates.
        kept_texts: Up to ten kept candidates with their scores, the best first.
        dropped_texts: Up to ten dropped candidates with their scores, the worst first.
    """

    selection: Selection
    importances: Mapping[str, tuple[float, float]]
    quartiles: Mapping[str, tuple[Floats, Floats]]
    operators: Mapping[str, tuple[float, float]]
    kept_texts: tuple[tuple[float, TextInput], ...]
    dropped_texts: tuple[tuple[float, TextInput], ...]


def inspect_policy(
    problem: SelectionProblem, policy: TrainedPolicy, config: SelectorConfig, rng: np.random.Generator
) -> Inspection:
    """Explain what a policy keeps of a pool; ``rng`` draws the orders in which it is shown, and the permutations."""
    task = build_task(problem, config, policy.feature_names)
    matrix, seed = task.features.matrix, int(rng.integers(2**31))  # every scoring shows candidates in the same orders

    def choose(seen: Floats) -> tuple[Floats, Bools]:
        shown = replace(task, features=task.features._replace(matrix=seen))
        scores = score_pool(policy, shown, config.keep_rate, np.random.default_rng(seed))
        return scores, keep_best(scores, config.keep_rate, task.classes)

    scores, kept = choose(matrix)
    groups = np.array([name.partition("=")[0] for name in task.features.names])
    importances: dict[str, tuple[float, float]] = {}
    for name in dict.fromkeys(groups.tolist()):
        others = [choose(np.where(groups == name, matrix[rng.permutation(len(matrix))], matrix))[1] for _ in range(4)]
        left = float(np.mean([reward.surrogate_reward(task.surrogate, other) for other in others]))
        changed = float(np.mean([(other != kept).mean() for other in others]))
        importances[name] = (reward.surrogate_reward(task.surrogate, kept) - left, changed)
    shares = pd.crosstab(np.array(problem.pool.operators), kept, normalize="columns")
    both = shares.reindex(columns=[True, False], fill_value=0.0)
    order = np.argsort(-scores, kind="stable")
    sides = (order[kept[order]], order[~kept[order]][::-1])
    best, worst = (tuple((float(scores[i]), problem.pool.inputs[i]) for i in side[:10]) for side in sides)
    quartiles = {name: (_quartiles(v[kept]), _quartiles(v[~kept])) for name, v in pools.measurements(problem).items()}
    operators = {str(name): (of_kept, of_dropped) for name, of_kept, of_dropped in both.itertuples(name=None)}
    importances = dict(sorted(importances.items(), key=lambda item: (-item[1][0], item[0])))
    return Inspection(Selection(kept, scores, policy.agent, {}, policy), importances, quartiles, operators, best, worst)


def _quartiles(values: Floats) -> Floats:
    return np.asarray(np.quantile(values if len(values) else [np.nan], (0.25, 0.5, 0.75)), np.float32)
