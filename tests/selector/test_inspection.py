"""What a policy learned is read off a policy whose one concern is known."""

import numpy as np
import pytest
import torch

from l2a.config import SelectorConfig
from l2a.selector.algorithms import CandidateNetwork, TrainedPolicy
from l2a.selector.environment import CHANGING_FEATURES, STATE_FEATURES
from l2a.selector.problem import candidate_features
from l2a.selector.select import inspect_policy

CONFIG = SelectorConfig(batch=16, episode_steps=4)


def policy_of(problem, concern):
    """A policy that reads one feature (or all operators) alone, and keeps what has much of it."""
    names = candidate_features(problem).names
    network = CandidateNetwork(len(names) + len(CHANGING_FEATURES), len(STATE_FEATURES), (1,)).requires_grad_(False)
    for weight in (*network.candidate_layer.parameters(), *network.state_layer.parameters()):
        torch.nn.init.zeros_(weight)
    network.candidate_layer.weight[0, names.index(concern)] = 0.1
    network.candidate_layer.weight[0, len(names) :] = 0.01  # what depends on the order in which candidates are shown
    torch.nn.init.ones_(network.score.weight)
    return TrainedPolicy(network, names, "ppo")


@pytest.fixture
def explained(problem):
    return inspect_policy(problem, policy_of(problem, "log_density"), CONFIG, np.random.default_rng(0))


def test_only_the_feature_that_decides_is_important(explained):
    first, *others = explained.importances
    assert first == "log_density"
    loss, changed = explained.importances[first]
    assert loss > 0.01 and changed > 0.3
    assert {explained.importances[name] for name in others} == {(0.0, 0.0)}


def test_operators_count_as_one_feature(problem):
    found = inspect_policy(problem, policy_of(problem, "operator=knn"), CONFIG, np.random.default_rng(0))
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


def test_small_pools_show_what_they_have(make_problem):
    problem = make_problem(size=5)[0]
    found = inspect_policy(problem, policy_of(problem, "log_density"), CONFIG, np.random.default_rng(0))
    assert len(found.kept_texts) + len(found.dropped_texts) == 5
