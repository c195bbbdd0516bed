"""Trains a policy on the surrogate reward with Stable-Baselines3, on the CPU, the same for the same seed."""

import contextlib
import importlib.util
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, VecNormalize

from l2a.config import SelectorConfig
from l2a.selector.agents import AgentCard, algorithm_class
from l2a.selector.environment import STATE_FEATURES, SelectionTask, SelectionVecEnv, SpreadByPool
from l2a.selector.network import CandidateNetwork, CandidatePolicy, TrainedPolicy, snapshot
from l2a.util.errors import RunError, UsageError
from l2a.util.progress import SILENT, Advance, Progress
from l2a.util.training import seeded

LOOKS = 20  # points of the reward curve, and looks at it for early stopping, in a whole training


@dataclass(frozen=True)
class Training:
    """What a training gives.

    Attributes:
        snapshots: Policies at equal distances of the training, the last one fully trained.
        reward_curve: Mean gain of each twentieth of the episodes, in nats, in the order in which they ended.
        steps: Environment steps taken, fewer than asked for where patience ran out.
        steps_per_second: Environment steps a second, the policy's updates included.
    """

    snapshots: tuple[TrainedPolicy, ...]
    reward_curve: tuple[float, ...]
    steps: int
    steps_per_second: float


class _Recorder(BaseCallback):
    """Keeps copies of the network and the returns of episodes, moves the progress bar, and ends a stalled training."""

    def __init__(self, network: CandidateNetwork, config: SelectorConfig, card: AgentCard, advance: Advance) -> None:
        super().__init__()
        self.network, self.patience, self.advance = network, card.patience, advance
        steps, copies = config.training_steps, config.snapshots
        self.copy_at = [round(steps * (i + 1) / copies) for i in range(copies - 1)]
        self.copies: list[CandidateNetwork] = []
        self.returns: list[float] = []
        self.look_every, self.looks, self.seen, self.best, self.stale = steps / LOOKS, 1, 0, -np.inf, 0

    def _on_step(self) -> bool:
        self.returns += [float(info["episode"]["r"]) for info in self.locals["infos"] if "episode" in info]
        self.advance(self.training_env.num_envs)
        return self.patience is None or self.stale < self.patience

    def _on_rollout_start(self) -> None:
        if len(self.copies) < len(self.copy_at) and self.num_timesteps >= self.copy_at[len(self.copies)]:
            self.copies.append(snapshot(self.network))

    def _on_rollout_end(self) -> None:
        if self.num_timesteps < self.looks * self.look_every or self.seen == len(self.returns):
            return
        mean = float(np.mean(self.returns[self.seen :]))
        self.looks, self.seen = int(self.num_timesteps // self.look_every) + 1, len(self.returns)
        self.stale = 0 if mean > self.best else self.stale + 1
        self.best = max(self.best, mean)


def train_agent(
    tasks: Sequence[SelectionTask],
    name: str,
    card: AgentCard,
    config: SelectorConfig,
    seed: int,
    start_from: TrainedPolicy | None = None,
    progress: Progress = SILENT,
    callbacks: Sequence[BaseCallback] = (),
) -> Training:
    """Train a policy to choose candidates.

    Args:
        tasks: Pools, of one pair of domains or of several side by side; their feature columns must be those of
            ``start_from``.
        name: The agent's name.
        card: Algorithm, network and hyper-parameters.
        config: Steps, snapshots and TensorBoard's folder.
        seed: Seeds the environments, the network and the algorithm.
        start_from: A policy to train further; None for a new one.
        progress: Shown as "selector training".
        callbacks: Callbacks of Stable-Baselines3 that run besides; one that returns False ends the training.

    Returns:
        The policies and the course of the training.

    Raises:
        UsageError: If the card's hyper-parameters are not the algorithm's, or TensorBoard is asked for and missing.
        RunError: If the training diverges.
    """
    if config.tensorboard is not None and importlib.util.find_spec("tensorboard") is None:
        raise UsageError(
            f"selector.tensorboard: {config.tensorboard!r} needs a package: pip install 'l2a[tensorboard]'"
        )
    with _isolated_randomness(seed), progress.stage("selector training", config.training_steps) as advance:
        if start_from is None:
            widths = tasks[0].candidate_width, len(STATE_FEATURES)
            network = CandidateNetwork(*widths, card.hidden, config.keep_rate, card.activation)
        else:
            network = snapshot(start_from.network).train().requires_grad_(True)
        recorder = _Recorder(network, config, card, advance)
        algorithm = _algorithm(tasks, card, network, seed, config.tensorboard)
        started = time.perf_counter()
        every = 1 if config.tensorboard else LOOKS
        algorithm.learn(config.training_steps, CallbackList([recorder, *callbacks]), every, tb_log_name=name)
        seconds = time.perf_counter() - started
    if not all(torch.isfinite(weight).all() for weight in network.parameters()):
        raise RunError(f"agent {name}: the policy's weights are not finite; lower learning_rate in its card")
    policies = (TrainedPolicy(copy, tasks[0].features.names, name) for copy in [*recorder.copies, snapshot(network)])
    curve = tuple(float(np.mean(part)) for part in np.array_split(recorder.returns, LOOKS) if len(part))
    return Training(tuple(policies), curve, algorithm.num_timesteps, algorithm.num_timesteps / seconds)


@contextlib.contextmanager
def _isolated_randomness(seed: int) -> Iterator[None]:
    # Stable-Baselines3 seeds and draws from the global generators: give them back as they were. One thread is faster
    # than several on matrices this small, and its sums come in a fixed order.
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    threads = torch.get_num_threads()
    try:
        with seeded(seed):
            torch.set_num_threads(1)
            yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
        torch.set_num_threads(threads)


def _algorithm(
    tasks: Sequence[SelectionTask], card: AgentCard, network: CandidateNetwork, seed: int, tensorboard: str | None
) -> OnPolicyAlgorithm:
    options, kind = dict(card.hyperparameters), algorithm_class(card)
    environments: VecEnv = VecMonitor(SelectionVecEnv(tasks, card.environments, seed))
    options |= {"policy_kwargs": {"network": network}, "tensorboard_log": tensorboard}
    try:
        if card.scale_rewards:  # log-likelihood gains are thousandths, and differ from pool to pool
            spread = SpreadByPool(environments.get_attr("task"))
            environments = VecNormalize(environments, norm_obs=False, gamma=float(options.get("gamma", 0.99)))
            environments.ret_rms = spread
        algorithm: OnPolicyAlgorithm = kind(CandidatePolicy, environments, seed=seed, device="cpu", **options)
    except (TypeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"hyperparameters: {reason}; allowed are the arguments of {card.algorithm}") from error
    return algorithm
