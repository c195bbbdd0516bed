"""A strategy as the action: which shares of the budget go to which arms, parts of a pool by where its texts come from.

An arm holds the candidates of one origin, operator, degree and nearness. An agent that chooses shares has tens of
numbers to find where one that chooses texts has thousands; it cannot see inside an arm.
"""

import time
from typing import Any

import gymnasium
import numpy as np
from scipy.special import softmax
from stable_baselines3.common.vec_env import DummyVecEnv

from l2a.config import SelectorConfig
from l2a.data import Floats, Ints
from l2a.generator.chain import CandidatePool
from l2a.selector import agents, algorithms, problem, reward
from l2a.selector.environment import SelectionTask
from l2a.util import Progress

MOST_ARMS = 48
SHARPEST = 3.0  # times a number of the action, before the softmax: the largest share is e^6 times the smallest


def pool_arms(pool: CandidatePool) -> tuple[list[str], Ints]:
    """Cut a pool into arms by origin, operator, degree (in tenths) and nearness (above or below the median density).

    Returns:
        The names of the A arms, at most 48: the smallest are one arm, "others"; and int64 (N,), each candidate's.
    """
    near = np.where(pool.log_density >= np.median(pool.log_density), "near", "far")
    columns = zip(problem.origin_names(pool), pool.operators, pool.degrees, near, strict=True)
    labels = np.array(["{}, {}, degree {:.1f}, {}".format(*values) for values in columns])
    names, counts = np.unique(labels, return_counts=True)
    large = names[np.argsort(-counts, kind="stable")[: MOST_ARMS - (len(names) > MOST_ARMS)]]
    found, arms = np.unique(np.where(np.isin(labels, large), labels, "others"), return_inverse=True)
    return found.tolist(), arms.astype(np.int64)


def shares_of(action: Floats) -> Floats:
    """Turn an action, float32 (A,) from -1 to 1, into shares that add up to 1."""
    return np.asarray(softmax(SHARPEST * action))


class SharesEnvironment(gymnasium.Env[Any, Any]):
    """Episodes in which each step draws a batch of candidates in the shares that the action gives.

    The reward is that of ``SelectionEnvironment``, what the batch adds to the gain of the selection.

    Attributes:
        observation_space: Box, float32 (A + 2,): what part of each arm was drawn, the budget left and the gain so far.
        action_space: Box, float32 (A,): the shares, as ``shares_of`` reads them.
        returns: What each finished episode gained, in nats.
    """

    def __init__(self, task: SelectionTask, arms: Ints) -> None:
        """Make the environment of a pool whose candidates have these arms, int64 (N,)."""
        self.task, self._arms, self._sizes = task, arms, np.bincount(arms)
        self.observation_space = gymnasium.spaces.Box(-10.0, 10.0, (len(self._sizes) + 2,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (len(self._sizes),), np.float32)
        self._gains, self.returns = reward.Gains(task.surrogate, 1), list[float]()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Floats, dict[str, Any]]:
        """Start over with all candidates, in a new order; see Gymnasium."""
        super().reset(seed=seed)
        order = self.np_random.permutation(len(self._arms))
        self._members = np.split(order[np.argsort(self._arms[order], kind="stable")], np.cumsum(self._sizes)[:-1])
        self._drawn, self._steps = np.zeros(len(self._sizes), np.int64), 0
        self._gains.reset(np.arange(1))
        return self._observe(), {}

    def step(self, action: Floats) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        """Draw a batch, in the shares of ``action``, float32 (A,); an arm that is used up gives no more."""
        shares = shares_of(action).astype(np.float64) * (self._drawn < self._sizes)
        before = float(self._gains.gain[0])
        wanted = self.np_random.multinomial(self.task.batch, shares / shares.sum())
        ends = np.minimum(self._drawn + wanted, self._sizes)
        parts = zip(self._members, self._drawn, ends, strict=True)
        batch = np.concatenate([members[start:end] for members, start, end in parts])
        self._gains.add(batch[None], np.ones((1, len(batch)), bool))
        self._drawn, self._steps, gain = ends, self._steps + 1, float(self._gains.gain[0])
        if ended := self._steps >= self.task.steps or bool((ends >= self._sizes).all()):
            self.returns.append(gain)
        return self._observe(), gain - before, ended, False, {}

    def _observe(self) -> Floats:
        state = [1 - self._steps / self.task.steps, self._gains.gain[0] / self.task.unit]
        return np.asarray(np.clip(np.append(self._drawn / self._sizes, state), -10, 10), np.float32)


def thompson(task: SelectionTask, arms: Ints, pulls: int, seed: int) -> tuple[Floats, list[float]]:
    """Find shares by Thompson sampling: draw the mean of every arm from what is known of it, and pull the best.

    A pull shows what a batch of the arm's candidates gains. Before it, an arm is known as well as by one pull of the
    whole pool. Source: Thompson (1933); for normal rewards Agrawal and Goyal (AISTATS 2013).

    Args:
        task: Judges the batches.
        arms: int64 (N,).
        pulls: How many.
        seed: Of all draws.

    Returns:
        float32 (A,), the share that each arm got of the second half of the pulls, and the gain of each pull, in nats.
    """
    rng, sizes = np.random.default_rng(seed), np.bincount(arms)
    members = np.split(np.argsort(arms, kind="stable"), np.cumsum(sizes)[:-1])

    def pull(some: Ints) -> float:
        return reward.surrogate_reward(task.surrogate, rng.choice(some, min(task.batch, len(some)), replace=False))

    of_all = [pull(np.arange(len(arms))) for _ in range(32)]
    spread, sums, counts = np.std(of_all), np.full(len(sizes), np.mean(of_all)), np.ones(len(sizes))
    pulled, rewards = np.zeros(pulls, np.int64), list[float]()
    for number in range(pulls):
        pulled[number] = arm = int(np.argmax(rng.normal(sums / counts, spread / np.sqrt(counts))))
        rewards.append(pull(members[arm]))
        if (counts[arm] - 1) * task.batch < sizes[arm]:  # seeing the same candidates again makes no arm better known
            sums[arm], counts[arm] = sums[arm] + rewards[-1], counts[arm] + 1
    return (np.bincount(pulled[pulls // 2 :], minlength=len(sizes)) / (pulls - pulls // 2)).astype(np.float32), rewards


def train_shares(
    task: SelectionTask, arms: Ints, card: agents.AgentCard, config: SelectorConfig, seed: int, progress: Progress
) -> tuple[Floats, algorithms.Training]:
    """Train an agent to give shares of the budget to the arms of one pool.

    Args:
        task: The pool's candidates and what selections are judged by.
        arms: int64 (N,), each candidate's arm.
        card: Names the bandit, or an on-policy algorithm of Stable-Baselines3 with its hyper-parameters.
        config: Gives the number of steps.
        seed: Of every draw.
        progress: Shown as "selector training".

    Returns:
        float32 (A,), the shares, which add up to 1, and the course of the training, without a policy.
    """
    started, steps = time.perf_counter(), config.training_steps
    with progress.stage("selector training"), algorithms.isolated_randomness(seed):
        if card.algorithm == agents.BANDIT:
            shares, rewards = thompson(task, arms, steps, seed)
        else:
            several = DummyVecEnv([lambda: SharesEnvironment(task, arms)] * card.environments)
            kind: Any = agents.algorithm_class(card)
            options = {"policy_kwargs": {"net_arch": [*card.hidden]}, "device": "cpu", **card.hyperparameters}
            algorithm = kind("MlpPolicy", several, seed=seed, **options).learn(steps)
            played = zip(*several.get_attr("returns"), strict=False)  # side by side, in order of the episodes
            steps, rewards = algorithm.num_timesteps, [gain for gains in played for gain in gains]
            shares = _played(algorithm, SharesEnvironment(task, arms), seed)
    curve = tuple(float(np.mean(part)) for part in np.array_split(rewards, algorithms.LOOKS) if len(part))
    return shares, algorithms.Training((), curve, steps, steps / (time.perf_counter() - started))


def _played(algorithm: Any, shares: SharesEnvironment, seed: int) -> Floats:
    """Play one episode without exploring: the mean shares of its steps."""
    observation, ended, chosen = shares.reset(seed=seed)[0], False, []
    while not ended:
        action = algorithm.predict(observation, deterministic=True)[0]
        observation, _, ended, _, _ = shares.step(action)
        chosen.append(shares_of(action))
    return np.asarray(np.mean(chosen, axis=0, dtype=np.float32))
