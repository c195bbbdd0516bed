"""Training: several pools side by side, callbacks and algorithms of one's own."""

import dataclasses

import numpy as np
import pytest
import torch
import yaml
from stable_baselines3.common.callbacks import BaseCallback

from l2a.config import SelectorConfig
from l2a.selector.agents import load_agent
from l2a.selector.algorithms import train_agent
from l2a.selector.environment import Episodes, SelectionVecEnv, SpreadByPool, build_task
from l2a.selector.problem import candidate_features
from l2a.selector.select import select
from l2a.util.errors import UsageError

QUICK = SelectorConfig(agent="ppo", batch=16, episode_steps=4, training_steps=256, snapshots=2, real_evaluations=0)


@pytest.fixture
def task(problem):
    return build_task(problem, QUICK)


@pytest.fixture
def two_tasks(make_problem):
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
    alone = [Episodes(task, count) for task, count in zip(two_tasks, (3, 2), strict=True)]
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


def test_pools_that_differ_in_features_are_refused(make_problem):
    problem = make_problem()[0]
    tasks = [build_task(problem, QUICK), build_task(make_problem(size=9)[0], QUICK)]
    with pytest.raises(UsageError, match=r"selector.batch: .*\[9, 16\]"):
        SelectionVecEnv(tasks, 2, seed=0)


def test_callbacks_of_the_user_run_and_can_end_the_training(task):
    class Stop(BaseCallback):
        def _on_step(self):
            return self.n_calls < 3

    stop = Stop()
    assert train([task], callbacks=[stop]).steps == 3 * load_agent("a2c").environments
    assert stop.n_calls == 3


def test_an_algorithm_of_ones_own_plugs_in_by_a_card(problem, tmp_path, monkeypatch):
    (tmp_path / "my_algorithms.py").write_text(
        "from stable_baselines3 import A2C\n\n\n"
        "class Shy(A2C):\n"
        "    updates = 0\n\n"
        "    def train(self):\n"
        "        Shy.updates += 1\n"
        "        super().train()\n"
    )
    card = {"description": "A trial.", "algorithm": "my_algorithms.Shy", "hyperparameters": {"n_steps": 4}}
    (tmp_path / "shy.yaml").write_text(yaml.safe_dump(card))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    selection = select(problem, dataclasses.replace(QUICK, agent="./shy.yaml"), np.random.default_rng(0))
    import my_algorithms  # type: ignore[import-not-found]

    assert my_algorithms.Shy.updates == 256 // (4 * 16)
    assert selection.policy.agent == "./shy.yaml" and selection.kept.sum() == len(problem) // 2


PLANTED = """
from pathlib import Path

from stable_baselines3 import A2C

Path("ran").touch()


class Agent(A2C):
    pass
"""


@pytest.mark.parametrize("algorithm", ["planted.Agent", "planted:Agent", "planted.deep.Agent"])
def test_a_card_in_the_working_directory_runs_no_module_that_lies_beside_it(problem, tmp_path, monkeypatch, algorithm):
    (tmp_path / "planted.py").write_text(PLANTED)
    (tmp_path / "agents").mkdir()
    card = yaml.safe_dump({"description": "A trial.", "algorithm": algorithm, "hyperparameters": {"n_steps": 4}})
    for name in ("trap", "ppo"):  # the second never hides the shipped one
        (tmp_path / "agents" / f"{name}.yaml").write_text(card)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=r"outside stable_baselines3, sb3_contrib, l2a; .*give the card by its path"):
        select(problem, dataclasses.replace(QUICK, agent="trap"), np.random.default_rng(0))
    assert load_agent("ppo").algorithm == "stable_baselines3.PPO"
    assert not (tmp_path / "ran").exists()
    if algorithm == "planted.Agent":
        select(problem, dataclasses.replace(QUICK, agent="agents/trap.yaml"), np.random.default_rng(0))
        assert (tmp_path / "ran").exists()


def test_every_pool_has_its_own_scale_of_rewards(two_tasks):
    spread = SpreadByPool(SelectionVecEnv(two_tasks, 4, seed=0).get_attr("task"))
    for step in range(20):
        spread.update(np.array([1.0, -1.0, 100.0, -100.0]) * (-1) ** step)
    np.testing.assert_allclose(spread.var, [1.0, 1.0, 1e4, 1e4], rtol=1e-3)


@pytest.mark.parametrize("changes", [{"learning_rate": -1}, {"learning_rate": "fast"}, {"nonsense": 1}])
def test_wrong_hyperparameters_are_a_usage_error(task, changes):
    given = {**load_agent("ppo").hyperparameters, **changes}
    with pytest.raises(UsageError, match="hyperparameters"):
        train([task], name="ppo", hyperparameters=given)


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path, monkeypatch):
    (tmp_path / "agents").mkdir()
    card = "description: A trial.\nalgorithm: stable_baselines3.PPO\nhyperparameters: {learning_rate: 3e-4}\n"
    (tmp_path / "agents" / "mine.yaml").write_text(card)
    monkeypatch.chdir(tmp_path)
    assert load_agent("mine").hyperparameters == {"learning_rate": 3e-4}
