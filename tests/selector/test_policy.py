"""The policy treats candidates alike, whatever their order and number, and survives saving."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save

from l2a.config import SelectorConfig
from l2a.selector.algorithms import CandidateNetwork, CandidatePolicy, TrainedPolicy, load_policy, save_policy
from l2a.selector.environment import CHANGING_FEATURES, STATE_FEATURES, SelectionEnvironment, build_task
from l2a.selector.select import apply_policy
from l2a.util.errors import RunError

FEATURES = ("log_density", "operator=knn", "operator=unheard_of")
WIDTH = len(FEATURES) + len(CHANGING_FEATURES)


def make_network(seed=0):
    torch.manual_seed(seed)
    network = CandidateNetwork(WIDTH, len(STATE_FEATURES), (8, 8))
    torch.nn.init.normal_(network.score.weight)
    return network.eval()


def observations(candidates, state):
    return torch.cat([candidates.flatten(1), state], dim=1)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), batch=st.integers(1, 9))
def test_permuting_candidates_permutes_the_logits_and_leaves_the_value(seed, batch):
    generator = torch.Generator().manual_seed(seed)
    candidates = torch.randn(3, batch, WIDTH, generator=generator)
    state = torch.randn(3, len(STATE_FEATURES), generator=generator)
    order = torch.randperm(batch, generator=generator)
    logits, summary = make_network(seed)(observations(candidates, state))
    permuted_logits, permuted_summary = make_network(seed)(observations(candidates[:, order], state))
    torch.testing.assert_close(permuted_logits, logits[:, order])
    torch.testing.assert_close(permuted_summary, summary)


def test_the_critic_and_the_actor_see_permutations_alike(problem):
    task = build_task(problem, SelectorConfig(batch=8, episode_steps=4), FEATURES)
    environment = SelectionEnvironment(task)
    policy = CandidatePolicy(
        environment.observation_space, environment.action_space, lambda _: 1e-3, network=make_network()
    )
    seen = torch.from_numpy(environment.reset(seed=0)[0])[None]
    candidates, state = seen[:, : -len(STATE_FEATURES)].reshape(1, 8, -1), seen[:, -len(STATE_FEATURES) :]
    order = torch.randperm(8)
    permuted = observations(candidates[:, order], state)
    torch.testing.assert_close(policy.predict_values(permuted), policy.predict_values(seen))
    probabilities = policy.get_distribution(seen).distribution.probs
    torch.testing.assert_close(policy.get_distribution(permuted).distribution.probs, probabilities[:, order])


def test_every_weight_of_the_policy_is_trained(problem):
    task = build_task(problem, SelectorConfig(batch=8, episode_steps=4), FEATURES)
    environment = SelectionEnvironment(task)
    network = make_network()
    policy = CandidatePolicy(environment.observation_space, environment.action_space, lambda _: 1e-3, network=network)
    trained = {id(weight) for group in policy.optimizer.param_groups for weight in group["params"]}
    assert {id(weight) for weight in network.parameters()} <= trained
    assert trained == {id(weight) for weight in policy.parameters()}


def test_an_untrained_network_keeps_the_asked_share():
    network = CandidateNetwork(WIDTH, len(STATE_FEATURES), (8,), keep_rate=0.25)
    logits, _ = network(torch.randn(5, 40 * WIDTH + len(STATE_FEATURES)))
    assert torch.sigmoid(logits).mean().item() == pytest.approx(0.25, abs=0.02)


def test_a_saved_policy_chooses_the_same(problem, tmp_path):
    policy = TrainedPolicy(make_network(), FEATURES, "ppo")
    save_policy(policy, tmp_path / "policy")
    again = load_policy(tmp_path / "policy")
    config = SelectorConfig()
    first = apply_policy(problem, policy, config, np.random.default_rng(0))
    second = apply_policy(problem, again, config, np.random.default_rng(0))
    assert again.feature_names == FEATURES
    assert again.agent == "ppo"
    assert np.array_equal(first.scores, second.scores)
    assert first.kept.sum() == round(config.keep_rate * len(problem))


def test_no_pickle_is_written(tmp_path):
    save_policy(TrainedPolicy(make_network(), FEATURES, "ppo"), tmp_path / "policy")
    assert sorted(path.name for path in (tmp_path / "policy").iterdir()) == ["policy.json", "policy.safetensors"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "policy.json").unlink(),
        lambda folder: (folder / "policy.json").write_text("[1, 2]"),
        lambda folder: (folder / "policy.safetensors").write_bytes(b"\x80\x04not safetensors"),
        lambda folder: (folder / "policy.safetensors").write_bytes(save({"score.weight": torch.zeros(1, 8)})),
        lambda folder: (folder / "policy.json").write_text(
            (folder / "policy.json").read_text().replace('"format": 1', '"format": 7')
        ),
        lambda folder: (folder / "policy.json").write_text(
            json.dumps({**json.loads((folder / "policy.json").read_text()), "hidden": [9]})
        ),
    ],
)
def test_a_damaged_policy_is_refused_in_one_sentence(tmp_path, damage):
    folder = tmp_path / "policy"
    save_policy(TrainedPolicy(make_network(), FEATURES, "ppo"), folder)
    damage(folder)
    with pytest.raises(RunError, match=r"cannot be read .*train it again") as caught:
        load_policy(folder)
    assert "\n" not in str(caught.value)
