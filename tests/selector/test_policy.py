"""Policies: what they compute, how they are saved and used again, and what they learned."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save

from l2a.selector import algorithms
from l2a.selector.agents import AgentCard, agent_parts, check_agent, load_agent
from l2a.selector.algorithms import CandidateNetwork, TrainedPolicy, load_policy, save_policy
from l2a.selector.environment import CHANGING_FEATURES, STATE_FEATURES, SelectionEnvironment, build_task
from l2a.selector.problem import candidate_features
from l2a.selector.reward import surrogate_reward
from l2a.selector.select import apply_policy, inspect_policy, select
from l2a.util import RunError, UsageError

from .conftest import QUICK, SMALL, make_problem, rng

FEATURES = ("log_density", "operator=knn", "operator=unheard_of")
WIDTH = len(FEATURES) + len(CHANGING_FEATURES)


def make_network(activation="tanh"):
    torch.manual_seed(0)
    network = CandidateNetwork(WIDTH, (8, 8), activation=activation)
    torch.nn.init.normal_(network.score.weight)
    return network.eval()


def make_policy(problem, activation="tanh"):
    """An actor and a critic for batches of eight candidates."""
    environment = SelectionEnvironment(build_task(problem, SMALL, FEATURES))
    spaces = environment.observation_space, environment.action_space
    return algorithms.CandidatePolicy(*spaces, lambda _: 1e-3, network=make_network(activation))


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_permuting_candidates_permutes_what_the_actor_says_and_leaves_the_critics_value(problem, activation):
    policy = make_policy(problem, activation)
    candidates, state, order = torch.randn(3, 8, WIDTH), torch.randn(3, len(STATE_FEATURES)), torch.randperm(8)
    seen, permuted = (torch.cat([one.flatten(1), state], dim=1) for one in (candidates, candidates[:, order]))
    torch.testing.assert_close(policy.predict_values(permuted), policy.predict_values(seen))
    probabilities = policy.get_distribution(seen).distribution.probs
    torch.testing.assert_close(policy.get_distribution(permuted).distribution.probs, probabilities[:, order])


def test_every_weight_of_the_policy_is_trained(problem):
    policy = make_policy(problem)
    trained = {id(weight) for group in policy.optimizer.param_groups for weight in group["params"]}
    assert {id(weight) for weight in policy.mlp_extractor.network.parameters()} <= trained
    assert trained == {id(weight) for weight in policy.parameters()}


def test_an_untrained_network_keeps_the_asked_share():
    network = CandidateNetwork(WIDTH, (8,), keep_rate=0.25)
    logits, _ = network(torch.randn(5, 40 * WIDTH + len(STATE_FEATURES)))
    assert torch.sigmoid(logits).mean().item() == pytest.approx(0.25, abs=0.02)


def test_a_saved_policy_chooses_the_same_and_holds_no_pickle(problem, tmp_path):
    policy = TrainedPolicy(make_network(), FEATURES, "ppo")
    save_policy(policy, tmp_path / "policy")
    assert {path.name for path in (tmp_path / "policy").iterdir()} == {"policy.json", "policy.safetensors"}
    again = load_policy(tmp_path / "policy")
    first, second = (apply_policy(problem, one, QUICK, rng()) for one in (policy, again))
    assert again.feature_names == FEATURES and again.agent == "ppo"
    assert np.array_equal(first.scores, second.scores)


def edit(folder, **changes):
    path = folder / "policy.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "policy.json").unlink(),
        lambda folder: (folder / "policy.json").write_text("[1, 2]"),
        lambda folder: (folder / "policy.safetensors").write_bytes(b"\x80\x04not safetensors"),
        lambda folder: (folder / "policy.safetensors").write_bytes(save({"score.weight": torch.zeros(1, 8)})),
        *(partial(edit, **change) for change in ({"format": 7}, {"hidden": [9]}, {"hidden": []})),
    ],
)
def test_a_damaged_policy_is_refused_in_one_sentence(tmp_path, damage):
    save_policy(TrainedPolicy(make_network(), FEATURES, "ppo"), tmp_path)
    damage(tmp_path)
    with pytest.raises(RunError, match=r"cannot be read .*train it again") as caught:
        load_policy(tmp_path)
    assert "\n" not in str(caught.value)


FACTS = {"pairs": ["a:b"], "steps": 256, "reward_curve": [0.1, 0.2]}


@pytest.fixture(params=["ppo", "dvrl"])
def saved(problem, tmp_path, monkeypatch, request, write_card):
    """A policy in agents/shipped, and a card beside it; no training is possible any more."""
    policy = select(problem, replace(QUICK, agent=request.param), rng()).policy
    save_policy(policy, tmp_path / "agents" / "shipped", FACTS)
    write_card(algorithm="stable_baselines3.PPO", policy="shipped/")
    monkeypatch.setattr("l2a.selector.select.train_agent", lambda *_: pytest.fail("a trained policy was trained"))
    return policy


@pytest.mark.parametrize("agent", ["agents/shipped", "mine"])
def test_decisions_are_those_of_the_policy_that_was_saved(problem, saved, agent):
    expected, found = apply_policy(problem, saved, QUICK, rng()), select(problem, replace(QUICK, agent=agent), rng())
    assert np.array_equal(found.scores, expected.scores)
    assert np.array_equal(found.kept, expected.kept)
    assert found.policy.network.activation == saved.network.activation


@pytest.mark.parametrize("sign", [1, -1], ids=["rewards that agree", "rewards that disagree"])
def test_both_rewards_are_measured_for_a_saved_policy_too(problem, saved, sign):
    """Where they agree the policy stays; where they disagree the best of it and random ones by real reward is used."""
    surrogate = problem.surrogate()
    judged = replace(problem, real_reward=lambda kept: sign * surrogate_reward(surrogate, kept))
    config = replace(QUICK, agent="mine", real_evaluations=8)
    found, as_it_is = select(judged, config, rng()), apply_policy(problem, saved, QUICK, rng())
    facts = found.diagnostics
    assert found.agent == "mine" and len(facts["real_rewards"]) == 8
    assert facts["tier_correlation"] == pytest.approx(sign, abs=0.4) and facts["tiers_agree"] == (sign > 0)
    assert np.array_equal(found.kept, as_it_is.kept) == (sign > 0) != found.fell_back
    assert sign > 0 or judged.real_reward(found.kept) == max(facts["real_rewards"])


def test_facts_are_kept_beside_the_weights(saved, tmp_path):
    assert load_policy(tmp_path / "agents" / "shipped").facts == FACTS
    save_policy(saved, tmp_path / "bare")
    assert load_policy(tmp_path / "bare").facts == {}


def test_a_card_wins_over_a_folder_of_its_name(problem, saved, tmp_path):
    save_policy(saved, tmp_path / "random")
    assert load_agent("random").rule == "random"


def test_an_unknown_activation_is_refused(saved, tmp_path):
    edit(tmp_path / "agents" / "shipped", activation="__import__")
    with pytest.raises(RunError, match=r"activation is __import__, not one of tanh, relu"):
        check_agent("agents/shipped")


@pytest.mark.parametrize(("agent", "folder"), [("no/such", "no/such"), ("empty", "empty"), ("mine", "gone")])
def test_a_folder_without_a_policy_is_refused_be_it_given_or_named_by_a_card(tmp_path, write_card, agent, folder):
    (tmp_path / "empty").mkdir()
    write_card(algorithm="l2a.B", policy="gone/")
    with pytest.raises(UsageError, match=rf"{folder} holds no policy\.json"):
        load_agent(agent)


@pytest.mark.parametrize(("field", "value"), [("environments", 0), ("hidden", ())])
def test_wrong_numbers_on_a_card_are_refused_by_name(field, value):
    with pytest.raises(UsageError, match=rf"{field} is (0|\[\]);"):
        AgentCard("d", "stable_baselines3.PPO", **{field: value})


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


def policy_of(problem, concern):
    """A policy that reads one feature (or all operators) alone, and keeps what has much of it."""
    names = candidate_features(problem).names
    network = CandidateNetwork(len(names) + len(CHANGING_FEATURES), (1,)).requires_grad_(False)
    for weight in (*network.candidate_layer.parameters(), *network.state_layer.parameters()):
        torch.nn.init.zeros_(weight)
    network.candidate_layer.weight[0, names.index(concern)] = 0.1
    network.candidate_layer.weight[0, len(names) :] = 0.01  # what depends on the order in which candidates are shown
    torch.nn.init.ones_(network.score.weight)
    return TrainedPolicy(network, names, "ppo")


@pytest.fixture
def explained(problem):
    return inspect_policy(problem, policy_of(problem, "log_density"), QUICK, rng())


def test_only_the_feature_that_decides_is_important(explained):
    first, *others = explained.importances
    loss, changed = explained.importances[first]
    assert first == "log_density" and loss > 0.01 and changed > 0.3
    assert {explained.importances[name] for name in others} == {(0.0, 0.0)}


def test_operators_count_as_one_feature(problem):
    found = inspect_policy(problem, policy_of(problem, "operator=knn"), QUICK, rng())
    assert found.importances["operator"][1] > 0.3
    assert not any(name.startswith("operator=") for name in found.importances)
    assert found.operators["knn"][0] > found.operators["knn"][1]
    for side in (0, 1):
        assert sum(shares[side] for shares in found.operators.values()) == pytest.approx(1.0)


def test_quartiles_are_those_of_the_kept_and_the_dropped(problem, explained):
    density, kept = problem.pool.log_density, explained.selection.kept
    for found, values in zip(explained.quartiles["log_density"], (density[kept], density[~kept]), strict=True):
        np.testing.assert_allclose(found, np.quantile(values, [0.25, 0.5, 0.75]), atol=1e-5)


def test_ten_kept_and_ten_dropped_texts_are_shown(problem, explained):
    places = {text: number for number, text in enumerate(problem.pool.inputs)}
    kept = [explained.selection.kept[places[text]] for _, text in explained.kept_texts]
    dropped = [explained.selection.kept[places[text]] for _, text in explained.dropped_texts]
    assert kept == [True] * 10 and dropped == [False] * 10
    assert explained.kept_texts[0][0] == explained.selection.scores.max()
    assert explained.dropped_texts[0][0] == explained.selection.scores.min()


def test_small_pools_show_what_they_have():
    problem = make_problem(size=5)[0]
    found = inspect_policy(problem, policy_of(problem, "log_density"), QUICK, rng())
    assert len(found.kept_texts) + len(found.dropped_texts) == 5
