"""The environment keeps the contracts of Gymnasium and Stable-Baselines3."""

import dataclasses
import pickle
import subprocess
import sys
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from hypothesis import given
from hypothesis.strategies import floats, integers
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from l2a.config import SelectorConfig
from l2a.selector.arms import SharesEnvironment
from l2a.selector.environment import ENVIRONMENT_ID, STATE_FEATURES, SelectionEnvironment, SelectionVecEnv, build_task
from l2a.selector.reward import surrogate_reward

from .conftest import SMALL, global_generators, make_problem


@pytest.fixture
def task(problem):
    return build_task(problem, SMALL)


def play(environment, seed, keep=0.5, steps=20):
    """Random actions; returns all that came back."""
    rng, seen, rewards, ends = np.random.default_rng(seed), [environment.reset(seed=seed)[0]], [], []
    for _ in range(steps):
        action = (rng.random(environment.action_space.n) < keep).astype(np.int8)
        observation, reward, terminated, truncated, _ = environment.step(action)
        seen.append(observation)
        rewards.append(reward)
        ends.append((terminated, truncated))
        if terminated or truncated:
            break
    return np.array(seen), np.array(rewards), ends


def test_both_checkers_pass_without_a_warning(task):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sb3_check_env(SelectionEnvironment(task))
        gymnasium_check_env(gymnasium.make(ENVIRONMENT_ID, task=task).unwrapped)
    shares = SharesEnvironment(task, np.arange(len(task)) % 5)
    sb3_check_env(shares)
    gymnasium_check_env(shares, skip_render_check=True)


def test_shares_draw_each_candidate_once_and_earn_the_gain_of_what_they_drew(task):
    environment, arms = SharesEnvironment(task, np.arange(len(task)) % 5), np.array([1, 1, 1, -1, -1], np.float32)
    environment.reset(seed=1)
    rewards, ended = [], False
    while not ended:
        _, reward, ended, _, _ = environment.step(arms)
        rewards.append(reward)
    drawn = [members[:count] for members, count in zip(environment._members, environment._drawn, strict=True)]
    kept = np.zeros(len(task), bool)
    kept[np.concatenate(drawn)] = True
    assert kept.sum() == task.steps * task.batch and kept[3::5].sum() + kept[4::5].sum() <= 2
    assert sum(rewards) == pytest.approx(surrogate_reward(task.surrogate, kept), abs=1e-6)


@given(integers(8, 80), integers(2, 4), integers(1, 12), integers(1, 6), floats(0.01, 1.0), integers(0, 99))
def test_whatever_the_pool_and_the_actions_all_is_finite_and_an_episode_ends(size, classes, batch, steps, keep, seed):
    problem, _ = make_problem(size=size, classes=classes, seed=seed)
    environment = SelectionEnvironment(build_task(problem, SelectorConfig(batch=batch, episode_steps=steps)))
    seen, rewards, ends = play(environment, seed, keep)
    assert np.isfinite(seen).all() and np.isfinite(rewards).all()
    assert environment.observation_space.contains(seen[-1])
    assert any(ends[-1]) and len(ends) <= steps


def test_the_same_seed_gives_the_same_episode_and_no_global_randomness_is_touched(task):
    before = global_generators()
    first, second = play(SelectionEnvironment(task), 3), play(SelectionEnvironment(task), 3)
    assert global_generators() == before
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])
    assert not np.array_equal(first[0], play(SelectionEnvironment(task), 4)[0])


def test_a_pickled_environment_continues_where_it_was(task):
    environment = SelectionEnvironment(task)
    environment.reset(seed=0)
    copy = pickle.loads(pickle.dumps(environment))
    action = np.ones(task.batch, np.int8)
    for got, expected in zip(copy.step(action), environment.step(action), strict=True):
        np.testing.assert_equal(got, expected)
    assert np.array_equal(copy.reset()[0], environment.reset()[0])


def test_an_episode_ends_with_the_budget_or_the_candidates_and_is_truncated_by_a_time_limit(task):
    limited = gymnasium.make(ENVIRONMENT_ID, task=task, max_episode_steps=2)
    assert play(SelectionEnvironment(task), 0, keep=1.0)[2] == [(False, False), (True, False)]  # half of 4 batches
    assert play(SelectionEnvironment(task), 0, keep=0.0)[2] == [(False, False)] * 3 + [(True, False)]
    assert play(limited, 0, keep=0.0)[2] == [(False, False), (False, True)]


def test_no_candidate_is_shown_twice_in_an_episode(task):
    environment = SelectionEnvironment(task)
    _, info = environment.reset(seed=0)
    shown = [info["candidates"]]
    for _ in range(task.steps - 1):
        shown.append(environment.step(np.zeros(task.batch, np.int8))[4]["candidates"])
    assert len(np.unique(np.concatenate(shown))) == task.steps * task.batch


def test_the_rewards_of_an_episode_add_up_to_the_whole_gain_and_keeping_nothing_gains_nothing(task):
    environment = SelectionEnvironment(task)
    assert np.array_equal(play(environment, 0, keep=0.0)[1], np.zeros(task.steps))
    _, rewards, _ = play(environment, 0)
    assert rewards.sum() == pytest.approx(environment._episodes.gains.gain[0], abs=1e-5)


def test_what_exceeds_the_budget_is_dropped(problem):
    task = build_task(problem, dataclasses.replace(SMALL, keep_rate=0.125))
    environment = SelectionEnvironment(task)
    play(environment, 0, keep=1.0)
    assert environment._episodes.kept_count[0] == task.budget == 4


@pytest.mark.parametrize("kind", [DummyVecEnv, pytest.param(SubprocVecEnv, marks=pytest.mark.slow)])
def test_it_works_in_vectorised_environments(task, kind):
    environments = kind([lambda: SelectionEnvironment(task)] * 2)
    assert environments.reset().shape == (2, task.batch * task.candidate_width + len(STATE_FEATURES))
    _, rewards, _, _ = environments.step(np.ones((2, task.batch), np.int8))
    environments.close()
    assert rewards.shape == (2,)


def test_many_environments_in_one_call_follow_the_same_process(task):
    together = SelectionVecEnv([task], 3, seed=0)
    together.reset()
    alone = [SelectionEnvironment(task) for _ in range(3)]
    for position, environment in enumerate(alone):
        environment.reset(seed=0)
        environment._episodes.reset(np.zeros(1, np.intp), together._groups[0].candidates[[position]])
    rng = np.random.default_rng(0)
    for _ in range(task.steps):
        actions = rng.random((3, task.batch)) < [[0.2], [0.5], [1.0]]
        observations, rewards, ended, infos = together.step(actions)
        for position, environment in enumerate(alone):
            observation, reward, terminated, _, _ = environment.step(actions[position])
            last = infos[position].get("terminal_observation", observations[position])
            np.testing.assert_allclose(last, observation, atol=1e-4)
            assert rewards[position] == pytest.approx(reward, abs=1e-5)
            assert ended[position] == terminated
        if ended.any():
            break
    assert ended.tolist() == [False, False, True]


def test_what_labels_say_of_a_candidate_does_not_stand_in_an_observation(problem):
    """The start of an episode looks the same whatever the teacher says of the reward texts."""
    surrogate = problem.surrogate()
    turned = dataclasses.replace(surrogate, judged_teacher=surrogate.judged_teacher[:, ::-1])
    flipped = dataclasses.replace(problem, surrogate=lambda: turned)
    first, second = (SelectionEnvironment(build_task(one, SMALL)).reset(seed=0)[0] for one in (problem, flipped))
    assert np.array_equal(first, second)


@pytest.mark.slow
def test_a_process_that_is_sent_a_task_knows_the_environment(task):
    code = "import pickle, sys, gymnasium\ntask = pickle.load(sys.stdin.buffer)\n"
    code += f"print(gymnasium.make({ENVIRONMENT_ID!r}, task=task).action_space)"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(task), capture_output=True, check=True)
    assert done.stdout.strip() == b"MultiBinary(8)"
