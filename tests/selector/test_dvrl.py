"""DVRL as one more agent: its loss, its baseline, and what it shares with the others."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from stable_baselines3.common.vec_env import VecMonitor

from l2a.config import SelectorConfig
from l2a.selector.agents import load_agent
from l2a.selector.algorithms import DVRL, CandidateNetwork, CandidatePolicy, TrainedPolicy, dvrl_loss, train_agent
from l2a.selector.environment import STATE_FEATURES, SelectionVecEnv, build_task, gain_of_everything
from l2a.selector.problem import keep_best
from l2a.selector.reward import surrogate_reward
from l2a.selector.select import score_pool

WIDTH = 7


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), batch=st.integers(1, 9))
def test_permuting_candidates_permutes_its_scores(seed, batch):
    card, generator = load_agent("dvrl"), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    network = CandidateNetwork(WIDTH, len(STATE_FEATURES), card.hidden, 0.5, card.activation).eval()
    policy = TrainedPolicy(network.requires_grad_(False), tuple("abcde"), "dvrl")
    candidates = torch.randn(2, batch, WIDTH, generator=generator)
    state = torch.randn(2, len(STATE_FEATURES), generator=generator)
    order = torch.randperm(batch, generator=generator)
    first = policy.logits(torch.cat([candidates.flatten(1), state], dim=1).numpy())
    second = policy.logits(torch.cat([candidates[:, order].flatten(1), state], dim=1).numpy())
    np.testing.assert_allclose(second, first[:, order.numpy()], atol=1e-5)


def test_the_loss_is_the_published_one():
    logits = torch.tensor([[[0.5, -1.0]], [[2.0, 3.0]]])  # 2 steps, 1 episode, 2 candidates
    kept, counts = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]]]), torch.tensor([[1.0], [0.0]])
    p = 1 / (1 + np.exp([-0.5, 1.0]))
    expected = 0.3 * -(np.log(p[0]) + np.log(1 - p[1]))
    assert dvrl_loss(logits, kept, counts, torch.tensor([0.3])).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("logit", "distance"), [(6.0, 0.09753), (-6.0, 0.09753), (0.0, 0.0)])
def test_a_mean_probability_near_0_or_1_is_fined(logit, distance):
    ones = torch.ones(1, 1, 4)
    loss = dvrl_loss(logit * ones, ones, torch.ones(1, 1), torch.zeros(1))
    assert loss.item() == pytest.approx(1000 * distance, rel=1e-3)


def make_dvrl(tasks, count):
    environments = VecMonitor(SelectionVecEnv(tasks, count, seed=0))
    torch.manual_seed(0)
    network = CandidateNetwork(tasks[0].candidate_width, len(STATE_FEATURES), (8,))
    return DVRL(CandidatePolicy, environments, policy_kwargs={"network": network}, seed=0, device="cpu")


def test_its_baseline_is_the_gain_of_everything(make_problem):
    tasks = [build_task(make_problem(seed=seed)[0], SelectorConfig(batch=8, episode_steps=4)) for seed in (0, 1)]
    gains = make_dvrl(tasks, 4).gains_of_everything
    expected = [gain_of_everything(task, np.random.default_rng(0)) for task in tasks]
    assert gains[:2] == pytest.approx(expected[0], abs=1e-6) and len(set(gains[2:])) == 1
    assert gains[2] == pytest.approx(expected[1], abs=0.02) and gains[0] != gains[2]


def test_an_update_sees_one_whole_episode_of_each_environment(problem, monkeypatch):
    """The gains that it learns from are those of the episodes that the monitor saw."""
    task = build_task(problem, SelectorConfig(batch=8, episode_steps=4, keep_rate=0.25))
    algorithm = make_dvrl([task], 3)
    seen = []
    loss = dvrl_loss
    monkeypatch.setattr("l2a.selector.algorithms.dvrl_loss", lambda *values: seen.append(values) or loss(*values))
    algorithm.learn(12)
    (logits, kept, counts, advantages), baseline = seen[0], algorithm.gains_of_everything
    assert logits.shape == kept.shape == (4, 3, 8) and len(seen) == 1
    returns = [info["r"] for info in algorithm.ep_info_buffer]
    whole = advantages.numpy() + baseline
    assert all(any(abs(value - other) < 1e-5 for other in returns) for value in whole)
    assert counts.sum(dim=0).max() < 4  # the budget of a quarter is spent before the rollout ends


@pytest.mark.slow
def test_it_learns_to_beat_random_selection(make_problem):
    problem, good = make_problem(size=512)
    config = SelectorConfig(training_steps=8000)
    task, rng = build_task(problem, config), np.random.default_rng
    card = dataclasses.replace(load_agent("dvrl"), hidden=(32, 32))
    policy = train_agent([task], "dvrl", card, config, 0).snapshots[-1]
    kept = keep_best(score_pool(policy, task, 0.5, rng(0)), 0.5, task.classes)
    chance = keep_best(rng(1).random(512, np.float32), 0.5, task.classes)
    gains = [surrogate_reward(task.surrogate, mask) for mask in (kept, chance)]
    assert gains[0] > gains[1] + 0.02
    assert good[kept].mean() > 0.55
