"""Saved policies as agents: a folder, or a card that names one, chooses without any training."""

import dataclasses
import json

import numpy as np
import pytest
import yaml

from l2a.config import SelectorConfig
from l2a.selector.agents import AgentCard, agent_parts, check_agent, load_agent
from l2a.selector.algorithms import load_facts, load_policy, save_policy
from l2a.selector.reward import build_surrogate, surrogate_reward
from l2a.selector.select import apply_policy, select
from l2a.util.errors import RunError, UsageError

QUICK = SelectorConfig(agent="ppo", batch=16, episode_steps=4, training_steps=256, snapshots=1, real_evaluations=0)
FACTS = {"pairs": ["a:b"], "steps": 256, "reward_curve": [0.1, 0.2]}


def rng():
    return np.random.default_rng(0)


@pytest.fixture(params=["ppo", "dvrl"])
def saved(problem, tmp_path, monkeypatch, request):
    """A policy in agents/shipped, and a card beside it; no training is possible any more."""
    policy = select(problem, dataclasses.replace(QUICK, agent=request.param), rng()).policy
    save_policy(policy, tmp_path / "agents" / "shipped", FACTS)
    card = {"description": "A trial.", "algorithm": "stable_baselines3.PPO", "policy": "shipped/"}
    (tmp_path / "agents" / "mine.yaml").write_text(yaml.safe_dump(card))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("l2a.selector.select.train_agent", lambda *_: pytest.fail("a trained policy was trained"))
    return policy


@pytest.mark.parametrize("agent", ["agents/shipped", "mine"])
def test_decisions_are_those_of_the_policy_that_was_saved(problem, saved, agent):
    expected = apply_policy(problem, saved, QUICK, rng())
    found = select(problem, dataclasses.replace(QUICK, agent=agent), rng())
    assert np.array_equal(found.scores, expected.scores)
    assert np.array_equal(found.kept, expected.kept)
    assert found.policy.network.activation == saved.network.activation


@pytest.mark.parametrize("sign", [1, -1], ids=["rewards that agree", "rewards that disagree"])
def test_both_rewards_are_measured_for_a_saved_policy_too(problem, saved, sign):
    """Where they agree the policy stays; where they disagree the best of it and random ones by real reward is used."""
    surrogate = build_surrogate(problem)
    judged = dataclasses.replace(problem, real_reward=lambda kept: sign * surrogate_reward(surrogate, kept))
    config = dataclasses.replace(QUICK, agent="mine", real_evaluations=8)
    found, as_it_is = select(judged, config, rng()), apply_policy(problem, saved, QUICK, rng())
    facts = found.diagnostics
    assert found.agent == "mine" and len(facts["real_rewards"]) == 8
    assert facts["tier_correlation"] == pytest.approx(sign, abs=0.4) and facts["tiers_agree"] == (sign > 0)
    assert np.array_equal(found.kept, as_it_is.kept) == (sign > 0) != found.fell_back
    assert sign > 0 or judged.real_reward(found.kept) == max(facts["real_rewards"])


def test_facts_are_kept_beside_the_weights(saved, tmp_path):
    assert load_facts(tmp_path / "agents" / "shipped") == FACTS
    save_policy(saved, tmp_path / "bare")
    assert load_facts(tmp_path / "bare") == {}


def test_a_card_wins_over_a_folder_of_its_name(problem, saved, tmp_path):
    save_policy(saved, tmp_path / "random")
    assert load_agent("random").rule == "random"


def test_an_unknown_activation_is_refused(saved, tmp_path):
    path = tmp_path / "agents" / "shipped" / "policy.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "activation": "__import__"}))
    with pytest.raises(RunError, match=r"activation is __import__, not one of tanh, relu"):
        check_agent("agents/shipped")


@pytest.mark.parametrize(("agent", "message"), [("no/such", "no/such holds no policy.json"), ("empty", "policy.json")])
def test_a_folder_without_a_policy_is_refused(tmp_path, monkeypatch, agent, message):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        load_agent(agent)


def test_a_card_whose_policy_is_missing_is_refused(tmp_path, monkeypatch):
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "mine.yaml").write_text("{description: d, algorithm: l2a.B, policy: gone/}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"gone holds no policy\.json"):
        load_agent("mine")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"environments": 0}, "environments is 0"),
        ({"hidden": ()}, "hidden"),
        ({"rescore_every": 0}, "rescore_every is 0"),
    ],
)
def test_wrong_numbers_on_a_card_are_refused_by_name(changes, message):
    with pytest.raises(UsageError, match=message):
        AgentCard("d", "stable_baselines3.PPO", **changes)


def test_a_hash_of_a_policy_holds_however_long_it_was_trained(saved, tmp_path):
    before = agent_parts("agents/shipped")
    save_policy(saved, tmp_path / "agents" / "shipped", {**FACTS, "steps_per_second": 12.5})
    assert agent_parts("agents/shipped") == before
    saved.network.score.weight.data += 1
    save_policy(saved, tmp_path / "agents" / "shipped", FACTS)
    assert agent_parts("agents/shipped") != before
    (tmp_path / "agents" / "shipped" / "policy.json").write_text("7")
    assert "policy.json" not in agent_parts("agents/shipped"), "a damaged policy is not for this to refuse"


def test_a_policy_that_reads_what_is_not_measured_is_refused(problem, saved, tmp_path):
    path = tmp_path / "agents" / "shipped" / "policy.json"
    path.write_text(path.read_text().replace('"log_density"', '"density"'))
    with pytest.raises(RunError, match="the policy reads density"):
        apply_policy(problem, load_policy(path.parent), QUICK, rng())


def test_a_policy_without_widths_is_refused(saved, tmp_path):
    path = tmp_path / "agents" / "shipped" / "policy.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden": []}))
    with pytest.raises(RunError, match="cannot be read"):
        load_policy(path.parent)
