"""Training: several pools side by side, callbacks and algorithms of one's own, DVRL among them."""

import dataclasses

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecMonitor

from l2a.config import SelectorConfig
from l2a.selector import environment
from l2a.selector.agents import load_agent
from l2a.selector.algorithms import DVRL, CandidateNetwork, CandidatePolicy, dvrl_loss, train_agent
from l2a.selector.environment import SelectionVecEnv, build_task
from l2a.selector.problem import candidate_features, keep_best
from l2a.selector.reward import surrogate_reward
from l2a.selector.select import score_pool, select
from l2a.util import UsageError

from .conftest import QUICK, SMALL, make_problem


@pytest.fixture
def two_tasks():
    problems = [make_problem(seed=0)[0], make_problem(seed=1, classes=5, size=200)[0]]
    names = candidate_features(problems[0]).names
    return [build_task(problem, QUICK, names) for problem in problems]


def train(tasks, config=QUICK, name="a2c", callbacks=(), **changes):
    return train_agent(tasks, name, dataclasses.replace(load_agent(name), **changes), config, 0, callbacks=callbacks)


def weights(training):
    return training.snapshots[-1].network.state_dict()


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_each_pool_keeps_its_own_environments(two_tasks):
    together = SelectionVecEnv(two_tasks, 5, seed=0)
    together.reset()
    alone = [environment.Episodes(task, count) for task, count in zip(two_tasks, (3, 2), strict=True)]
    for group, episodes in zip(together._groups, alone, strict=True):
        episodes.reset(np.arange(episodes.count), group.candidates.copy())
    actions = np.random.default_rng(0).random((5, 16)) < 0.3
    observations, rewards, ended, infos = together.step(actions)
    expected = np.concatenate([e.step(a)[0] for e, a in zip(alone, np.split(actions, [3]), strict=True)])
    np.testing.assert_allclose(rewards, expected, atol=1e-6)
    np.testing.assert_allclose(observations, np.concatenate([e.observe() for e in alone]), atol=1e-5)
    assert not ended.any() and infos == [{}] * 5


def test_there_are_never_fewer_environments_than_pools(two_tasks):
    assert [group.count for group in SelectionVecEnv(two_tasks, 1, seed=0)._groups] == [1, 1]


def test_a_policy_learns_from_all_pools(two_tasks):
    both, first = train(two_tasks), train(two_tasks[:1])
    assert both.snapshots[-1].feature_names == first.snapshots[-1].feature_names
    assert not same(weights(both), weights(first))
    assert same(weights(both), weights(train(two_tasks)))


def test_pools_that_differ_in_features_are_refused():
    tasks = [build_task(make_problem(size=size)[0], QUICK) for size in (512, 9)]
    with pytest.raises(UsageError, match=r"selector.batch: .*\[9, 16\]"):
        SelectionVecEnv(tasks, 2, seed=0)


def test_callbacks_of_the_user_run_and_can_end_the_training(problem):
    class Stop(BaseCallback):
        def _on_step(self):
            return self.n_calls < 3

    stop = Stop()
    assert train([build_task(problem, QUICK)], callbacks=[stop]).steps == 3 * load_agent("a2c").environments
    assert stop.n_calls == 3


def test_an_algorithm_of_ones_own_plugs_in_by_a_card(problem, tmp_path, monkeypatch, write_card):
    (tmp_path / "my_algorithms.py").write_text("from stable_baselines3 import A2C\n\n\nclass Shy(A2C):\n    pass\n")
    write_card(algorithm="my_algorithms.Shy", hyperparameters={"n_steps": 4})
    monkeypatch.syspath_prepend(tmp_path)
    from my_algorithms import Shy  # type: ignore[import-not-found]

    updates, update = [], Shy.train
    monkeypatch.setattr(Shy, "train", lambda algorithm: updates.append(update(algorithm)))
    selection = select(problem, dataclasses.replace(QUICK, agent="./agents/mine.yaml"), np.random.default_rng(0))
    assert len(updates) == 256 // (4 * 16)
    assert selection.policy.agent == "./agents/mine.yaml" and selection.kept.sum() == len(problem) // 2


@pytest.mark.parametrize("algorithm", ["planted.Agent", "planted:Agent", "planted.deep.Agent"])
def test_a_card_in_the_working_directory_runs_no_module_that_lies_beside_it(
    problem, tmp_path, monkeypatch, write_card, algorithm
):
    planted = "from pathlib import Path\nfrom stable_baselines3 import A2C as Agent\nPath('ran').touch()\n"
    (tmp_path / "planted.py").write_text(planted)
    for name in ("trap", "ppo"):  # the second never hides the shipped one
        write_card(name, algorithm=algorithm, hyperparameters={"n_steps": 4})
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=r"outside stable_baselines3, sb3_contrib, l2a; .*give the card by its path"):
        select(problem, dataclasses.replace(QUICK, agent="trap"), np.random.default_rng(0))
    assert load_agent("ppo").algorithm == "stable_baselines3.PPO"
    assert not (tmp_path / "ran").exists()
    if algorithm == "planted.Agent":
        select(problem, dataclasses.replace(QUICK, agent="agents/trap.yaml"), np.random.default_rng(0))
        assert (tmp_path / "ran").exists()


def test_every_pool_has_its_own_scale_of_rewards(two_tasks):
    spread = environment.SpreadByPool(SelectionVecEnv(two_tasks, 4, seed=0).get_attr("task"))
    for step in range(20):
        spread.update(np.array([1.0, -1.0, 100.0, -100.0]) * (-1) ** step)
    np.testing.assert_allclose(spread.var, [1.0, 1.0, 1e4, 1e4], rtol=1e-3)


def test_numbers_that_yaml_reads_as_text_are_numbers(write_card):
    write_card(algorithm="stable_baselines3.PPO", hyperparameters={"learning_rate": "3e-4"})
    assert load_agent("mine").hyperparameters == {"learning_rate": 3e-4}


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
    network = CandidateNetwork(tasks[0].candidate_width, (8,))
    return DVRL(CandidatePolicy, environments, policy_kwargs={"network": network}, seed=0, device="cpu")


def test_its_baseline_is_the_gain_of_everything():
    tasks = [build_task(make_problem(seed=seed)[0], SMALL) for seed in (0, 1)]
    gains = make_dvrl(tasks, 4).gains_of_everything
    expected = [environment.gain_of_everything(task, np.random.default_rng(0)) for task in tasks]
    assert gains[:2] == pytest.approx(expected[0], abs=1e-6) and len(set(gains[2:])) == 1
    assert gains[2] == pytest.approx(expected[1], abs=0.15) and gains[0] != gains[2]


def test_an_update_sees_one_whole_episode_of_each_environment(problem, monkeypatch):
    """The gains that it learns from are those of the episodes that the monitor saw."""
    task = build_task(problem, dataclasses.replace(SMALL, keep_rate=0.25))
    algorithm, seen = make_dvrl([task], 3), []
    monkeypatch.setattr("l2a.selector.algorithms.dvrl_loss", lambda *values: seen.append(values) or dvrl_loss(*values))
    algorithm.learn(12)
    (logits, kept, counts, advantages), baseline = seen[0], algorithm.gains_of_everything
    assert logits.shape == kept.shape == (4, 3, 8) and len(seen) == 1
    returns = [info["r"] for info in algorithm.ep_info_buffer]
    assert all(any(abs(value - other) < 1e-5 for other in returns) for value in advantages.numpy() + baseline)
    assert counts.sum(dim=0).max() < 4  # the budget of a quarter is spent before the rollout ends


@pytest.mark.slow
def test_it_learns_to_beat_random_selection():
    problem, good = make_problem(size=512)
    config = SelectorConfig(training_steps=8000)
    task, rng = build_task(problem, config), np.random.default_rng
    card = dataclasses.replace(load_agent("dvrl"), hidden=(32, 32))
    policy = train_agent([task], "dvrl", card, config, 0).snapshots[-1]
    kept = keep_best(score_pool(policy, task, 0.5, rng(0)), 0.5, task.classes)
    chance = keep_best(rng(1).random(512, np.float32), 0.5, task.classes)
    assert surrogate_reward(task.surrogate, kept) > surrogate_reward(task.surrogate, chance) + 0.02
    assert good[kept].mean() > 0.55
