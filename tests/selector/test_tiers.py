"""Real distillation steps re-rank policies, and tell when the surrogate cannot be trusted."""

import dataclasses
import logging

import numpy as np
import pytest

from l2a.config import SelectorConfig
from l2a.selector.environment import build_task
from l2a.selector.reward import build_surrogate, surrogate_reward
from l2a.selector.select import rerank, select

CONFIG = SelectorConfig(agent="ppo", batch=16, episode_steps=4, training_steps=256, snapshots=2, real_evaluations=8)


def rng():
    return np.random.default_rng(0)


@pytest.fixture
def policy_scores(problem_and_good):
    problem, good = problem_and_good
    noise = rng().normal(size=len(problem)).astype(np.float32)
    return [good + 3 * noise, good + noise]


def judge(problem, scores, real_reward, evaluations=8):
    config = dataclasses.replace(CONFIG, real_evaluations=evaluations)
    return rerank(scores, build_task(problem, config), real_reward, config, rng())


def test_tiers_that_agree_are_trusted(problem, policy_scores):
    surrogate = build_surrogate(problem)
    tiers, _ = judge(problem, policy_scores, lambda kept: surrogate_reward(surrogate, kept))
    assert tiers.correlation > 0.6
    assert tiers.trusted
    assert tiers.chosen == int(np.argmax(tiers.real[:2]))


def test_other_selections_do_not_compete_while_the_surrogate_is_trusted(problem, policy_scores):
    """Not even the best half of all by both rewards, which is judged beside the policies."""
    surrogate, task = build_surrogate(problem), build_task(problem, CONFIG)

    def real_reward(kept):
        return surrogate_reward(surrogate, kept)

    tiers, scores = rerank(policy_scores, task, real_reward, CONFIG, rng(), (surrogate.influences,))
    assert tiers.trusted and int(np.argmax(tiers.real)) == 2  # the best half: it comes after the two policies
    assert tiers.chosen == int(np.argmax(tiers.real[:2])) and scores[tiers.chosen] is policy_scores[tiers.chosen]


def test_without_a_policy_the_best_random_selection_is_chosen(problem):
    surrogate = build_surrogate(problem)
    tiers, _ = judge(problem, [], lambda kept: surrogate_reward(surrogate, kept))
    assert tiers.trusted
    assert tiers.chosen == int(np.argmax(tiers.real))


def test_tiers_that_disagree_warn_and_let_random_policies_compete(problem, policy_scores, caplog):
    surrogate = build_surrogate(problem)
    with caplog.at_level(logging.WARNING):
        tiers, _ = judge(problem, policy_scores, lambda kept: -surrogate_reward(surrogate, kept))
    assert tiers.correlation < -0.6
    assert not tiers.trusted
    assert tiers.chosen == int(np.argmax(tiers.real)) >= 2
    assert "Spearman" in caplog.text


def test_a_constant_real_reward_is_not_trusted_and_warned_of(problem, policy_scores, caplog):
    tiers, _ = judge(problem, policy_scores, lambda kept: 0.0)
    assert np.isnan(tiers.correlation)
    assert not tiers.trusted
    assert [message.split(", so")[0] for message in caplog.messages] == [
        "selector: the real reward is 0 in all 8 cases"
    ]


def test_the_number_of_real_rewards_is_what_was_asked_for(problem, policy_scores):
    calls = []
    judge(problem, policy_scores, lambda kept: calls.append(kept) or float(len(calls)), evaluations=6)
    assert len(calls) == 6
    assert len({kept.tobytes() for kept in calls}) == 6
    assert {int(kept.sum()) for kept in calls} == {len(problem) // 2}


def test_select_reports_the_tiers(problem_and_good):
    problem, good = problem_and_good
    with_reward = dataclasses.replace(problem, real_reward=lambda kept: float(good[kept].mean()))
    selection = select(with_reward, CONFIG, rng())
    facts = selection.diagnostics
    assert len(facts["real_rewards"]) == len(facts["surrogate_rewards"]) == 8
    assert -1.0 <= facts["tier_correlation"] <= 1.0
    assert float(good[selection.kept].mean()) in facts["real_rewards"]
    assert facts["steps_per_second"] > 0
    assert len(facts["reward_curve"]) > 0


def test_the_second_tier_can_be_switched_off(problem):
    def never(kept):
        raise AssertionError("no real reward was asked for")

    config = dataclasses.replace(CONFIG, real_evaluations=0)
    assert select(dataclasses.replace(problem, real_reward=never), config, rng()).policy is not None
