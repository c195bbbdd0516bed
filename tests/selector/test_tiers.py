"""Real distillation steps re-rank policies, and tell when the surrogate cannot be trusted."""

import dataclasses

import numpy as np
import pytest

from l2a.selector.environment import build_task
from l2a.selector.reward import surrogate_reward
from l2a.selector.select import Tiers, rank_correlation, rerank, retest, select

from .conftest import QUICK, make_problem, rng

CONFIG = dataclasses.replace(QUICK, real_evaluations=8)


@pytest.fixture
def policy_scores():
    problem, good = make_problem()
    noise = rng().normal(size=len(problem)).astype(np.float32)
    return [good + 3 * noise, good + noise]


@pytest.fixture
def by_surrogate(problem):
    """A real reward that is the surrogate one."""
    surrogate = problem.surrogate()
    return lambda kept: surrogate_reward(surrogate, kept)


@pytest.fixture
def judged():
    """The problem with a real reward: the share of good candidates among those that are kept."""
    problem, good = make_problem()
    return dataclasses.replace(problem, real_reward=lambda kept: float(good[kept].mean()))


def judge(problem, scores, real_reward, evaluations=8):
    config = dataclasses.replace(CONFIG, real_evaluations=evaluations)
    return rerank(scores, build_task(problem, config), real_reward, config, rng())


def test_tiers_that_agree_are_trusted_and_other_selections_do_not_compete(policy_scores, by_surrogate):
    """Not even the best half of all by both rewards, which is judged beside the policies."""
    problem, good = make_problem()
    task, others = build_task(problem, CONFIG), (good.astype(np.float32),)
    tiers, scores = rerank(policy_scores, task, by_surrogate, CONFIG, rng(), others)
    assert tiers.correlation > 0.6 and tiers.trusted
    assert int(np.argmax(tiers.real)) == 2  # the best half: it comes after the two policies
    assert tiers.chosen == int(np.argmax(tiers.real[:2])) and scores[tiers.chosen] is policy_scores[tiers.chosen]


def test_without_a_policy_the_best_random_selection_is_chosen(problem, by_surrogate):
    tiers, _ = judge(problem, [], by_surrogate)
    assert tiers.trusted and tiers.chosen == int(np.argmax(tiers.real))


def test_tiers_that_disagree_warn_and_let_random_policies_compete(problem, policy_scores, by_surrogate, caplog):
    tiers, _ = judge(problem, policy_scores, lambda kept: -by_surrogate(kept))
    assert tiers.correlation < -0.6 and not tiers.trusted
    assert tiers.chosen == int(np.argmax(tiers.real)) >= 2
    assert "Spearman" in caplog.text


def test_a_constant_real_reward_is_not_trusted_and_warned_of(problem, policy_scores, caplog):
    tiers, _ = judge(problem, policy_scores, lambda kept: 0.0)
    assert np.isnan(tiers.correlation) and not tiers.trusted
    (message,) = caplog.messages
    assert message.startswith("selector: the real reward is 0 in all 8 cases, so")


def test_two_values_of_a_reward_are_enough_to_correlate():
    assert rank_correlation([0, 0, 1], [1, 2, 3]) == rank_correlation([1, 2, 3], [5, 5, 6]) == pytest.approx(0.75**0.5)


def test_the_number_of_real_rewards_is_what_was_asked_for(problem, policy_scores):
    calls = []
    judge(problem, policy_scores, lambda kept: calls.append(kept) or float(len(calls)), evaluations=6)
    assert len(calls) == len({kept.tobytes() for kept in calls}) == 6
    assert {int(kept.sum()) for kept in calls} == {len(problem) // 2}


def test_select_reports_the_tiers(judged):
    selection = select(judged, CONFIG, rng())
    facts = selection.diagnostics
    assert len(facts["real_rewards"]) == len(facts["surrogate_rewards"]) == 8
    assert -1.0 <= facts["tier_correlation"] <= 1.0
    assert judged.real_reward(selection.kept) in facts["real_rewards"]
    assert facts["steps_per_second"] > 0 and len(facts["reward_curve"]) > 0


@pytest.mark.parametrize(("fall", "vetoed"), [(0.0, False), (0.05, False), (1.0, True)])
def test_labels_refuse_a_selection_under_which_they_clearly_fall(judged, caplog, fall, vetoed):
    """They fall by so much for each good candidate that is kept beyond half; the noise of 32 of them is 0.1."""
    noise, longer = rng().normal(size=32), dataclasses.replace(CONFIG, training_steps=4000)

    def labels(kept):
        return (judged.real_reward(kept) > 0.55) * (noise * 0.5 - fall)

    found = select(dataclasses.replace(judged, veto=labels), longer, rng())
    facts = found.diagnostics
    assert facts["vetoed"] is vetoed is found.fell_back
    assert facts["label_gain"] == pytest.approx(noise.mean() / 2 - fall) and facts["label_noise"] > 0.05
    assert (judged.real_reward(found.kept) > 0.55) is not vetoed and ("refuse" in caplog.text) is vetoed
    assert ("labels refuse" in facts["chosen"]) is vetoed


def test_both_rewards_are_measured_again(judged):
    surrogate, other = judged.surrogate(), rng().normal(size=len(judged)).astype(np.float32)
    same = select(dataclasses.replace(judged, repeated=judged), CONFIG, rng()).diagnostics
    assert same["surrogate_retest"] == pytest.approx(1) and same["real_retest"] == pytest.approx(1)
    assert same["surrogate_noise"] == same["real_noise"] == 0
    noisy = dataclasses.replace(surrogate, judged=surrogate.judged[::-1])
    again = dataclasses.replace(judged, surrogate=lambda: noisy, real_reward=lambda kept: other[kept].mean())
    facts = select(dataclasses.replace(judged, repeated=again), CONFIG, rng()).diagnostics
    assert facts["surrogate_retest"] < 1 and facts["surrogate_noise"] > 0 and facts["real_noise"] > 0


@pytest.mark.parametrize(("first", "noise"), [((0.0, 1.0, 5.0), (7 / 2) ** 0.5), ((0.3,), np.nan)])
def test_the_noise_of_a_reward_is_unbiased_and_unknown_from_one_selection(problem, first, noise):
    kept = [np.ones(len(problem), bool)] * len(first)
    again = dataclasses.replace(problem, real_reward=lambda kept: 0.0)
    facts = retest(kept, Tiers(0, first, first, 1.0, True), dataclasses.replace(problem, repeated=again))
    assert facts["real_noise"] == pytest.approx(noise, nan_ok=True)


def test_the_second_tier_can_be_switched_off(problem):
    never = dataclasses.replace(problem, real_reward=lambda kept: pytest.fail("a real reward was asked for"))
    assert select(never, dataclasses.replace(CONFIG, real_evaluations=0), rng()).policy is not None
