"""The policy: one multilayer perceptron shared over candidates, so that their order does not matter; and its files."""

import contextlib
import copy
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from gymnasium import spaces
from stable_baselines3.common import buffers, policies, type_aliases, vec_env
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch import Tensor, nn

from l2a.config import SelectorConfig
from l2a.data import Floats
from l2a.selector import agents, environment
from l2a.util import SILENT, Advance, Progress, RunError, UsageError, files, logger, to_json, training

STATE_WIDTH = len(environment.STATE_FEATURES)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu}
DAMAGES = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, safetensors.SafetensorError)


class CandidateNetwork(nn.Module):
    """Scores every candidate of a batch with shared weights and pools them for the value.

    Permuting the candidates permutes the scores and leaves the pooled summary as it is. The batch can have any size.
    """

    def __init__(self, width: int, hidden: Sequence[int], keep_rate: float = 0.5, activation: str = "tanh") -> None:
        """Make the layers.

        Args:
            width: Numbers that describe a candidate.
            hidden: Widths of the hidden layers.
            keep_rate: The untrained network keeps a candidate with this probability.
            activation: Of the hidden layers.
        """
        super().__init__()
        self.width, self.hidden, self.activation = width, tuple(hidden), activation
        self.candidate_layer = nn.Linear(width, hidden[0])
        self.state_layer = nn.Linear(STATE_WIDTH, hidden[0], bias=False)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(hidden))
        self.score = nn.Linear(hidden[-1], 1)
        self.summary_width = hidden[-1] + STATE_WIDTH
        for layer in (self.candidate_layer, self.state_layer, *self.layers):
            nn.init.orthogonal_(layer.weight, math.sqrt(2.0))
        nn.init.orthogonal_(self.score.weight, 0.01)
        nn.init.constant_(self.score.bias, math.log(keep_rate / max(1.0 - keep_rate, 1e-3)))

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Score the candidates of each batch, float32 (E, B * width + 4) as ``Episodes.observe`` gives it.

        Returns:
            float32 (E, B) logits of the probability to keep each candidate, and float32 (E, summary_width): the mean
            candidate embedding and the state.
        """
        candidates, state = observations[:, :-STATE_WIDTH], observations[:, -STATE_WIDTH:]
        candidates, activation = candidates.reshape(len(observations), -1, self.width), ACTIVATIONS[self.activation]
        embedded = activation(self.candidate_layer(candidates) + self.state_layer(state)[:, None])
        for layer in self.layers:
            embedded = activation(layer(embedded))
        return self.score(embedded).squeeze(-1), torch.cat([embedded.mean(dim=1), state], dim=1)


class TrainedPolicy(NamedTuple):
    """A policy that can score the candidates of any pool.

    Attributes:
        network: The shared network.
        feature_names: Columns of the candidates' fixed features that it was trained on, in order.
        agent: Name of the card that trained it.
        facts: How it was trained, as a saved policy knows it.
    """

    network: CandidateNetwork
    feature_names: tuple[str, ...]
    agent: str
    facts: Mapping[str, Any] = {}

    @torch.no_grad()
    def logits(self, observations: Floats) -> Floats:
        """Give logits, float32 (E, B), of the probability to keep each candidate; see ``CandidateNetwork.forward``."""
        return np.asarray(self.network(torch.from_numpy(observations))[0].numpy())


def snapshot(network: CandidateNetwork) -> CandidateNetwork:
    """Copy a network as it is now, in evaluation mode."""
    return copy.deepcopy(network).eval().requires_grad_(False)


def save_policy(policy: TrainedPolicy, folder: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Write a policy: weights as safetensors, the rest as JSON, with facts of its training that JSON can hold.

    The folder is made where it is missing; its two files are replaced, other files stay.
    """
    network = policy.network
    description = {**environment.LAYOUT, "agent": policy.agent, "feature_names": list(policy.feature_names)}
    description |= {"hidden": list(network.hidden), "activation": network.activation, "facts": dict(facts or {})}
    weights = {name: value.contiguous() for name, value in network.state_dict().items()}
    files.atomic_write_bytes(folder / agents.WEIGHTS, safetensors.torch.save(weights))
    files.atomic_write_text(folder / agents.DESCRIPTION, to_json(description, indent=2) + "\n")


def load_policy(folder: Path | str) -> TrainedPolicy:
    """Read what ``save_policy`` wrote, with the facts of its training; nothing is unpickled.

    Raises:
        RunError: If a file is missing, damaged or from another version.
    """
    try:
        description = json.loads(Path(folder, agents.DESCRIPTION).read_text("utf-8"))
        for name, value in environment.LAYOUT.items():
            if description[name] != value:
                raise ValueError(f"{name} is {description[name]}, not {value}")
        names, activation = tuple(description["feature_names"]), description.get("activation", "tanh")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation}, not one of {', '.join(ACTIVATIONS)}")
        width = len(names) + len(environment.CHANGING_FEATURES)
        with torch.device("meta"):  # without memory, however wide it says that it is
            network = CandidateNetwork(width, tuple(description["hidden"]), activation=activation)
        network.load_state_dict(safetensors.torch.load(Path(folder, agents.WEIGHTS).read_bytes()), assign=True)
        network.float().eval().requires_grad_(False)
        return TrainedPolicy(network, names, str(description["agent"]), dict(description.get("facts", {})))
    except DAMAGES as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"policy {folder} cannot be read ({reason}); train it again") from error


class _ActorCriticHeads(nn.Module):
    """What ActorCriticPolicy expects between observations and its last layers."""

    def __init__(self, network: CandidateNetwork, batch: int) -> None:
        super().__init__()
        self.network, self.latent_dim_pi, self.latent_dim_vf = network, batch, network.hidden[-1]
        self.value_layer = nn.Sequential(nn.Linear(network.summary_width, self.latent_dim_vf), nn.Tanh())

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        logits, summary = self.network(observations)
        return logits, self.value_layer(summary)

    def forward_actor(self, observations: Tensor) -> Tensor:
        return self.forward(observations)[0]

    def forward_critic(self, observations: Tensor) -> Tensor:
        return self.forward(observations)[1]


class CandidatePolicy(policies.ActorCriticPolicy):
    """Actor and critic whose decisions follow the candidates when those are permuted.

    The action's distribution is one Bernoulli a candidate, its logit the shared network's score; the value is read
    from the mean candidate embedding and the state.
    """

    mlp_extractor: Any  # a module with the two latent widths

    def __init__(self, *arguments: Any, network: CandidateNetwork, **options: Any) -> None:
        """Make the policy around a network, which is trained in place; all other arguments are ActorCriticPolicy's."""
        self._shared = (network,)  # in a tuple: torch forbids modules before its __init__
        super().__init__(*arguments, **{"ortho_init": False, **options})

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = _ActorCriticHeads(*self._shared, spaces.flatdim(self.action_space))

    def _build(self, lr_schedule: type_aliases.Schedule) -> None:
        super()._build(lr_schedule)
        self.action_net = nn.Identity()  # the network's scores are the logits already
        self.optimizer = self.optimizer_class(self.parameters(), **{"lr": lr_schedule(1.0), **self.optimizer_kwargs})


LOOKS = 20  # points of the reward curve of a whole training
HIGHEST_MEAN = 0.9
PENALTY = 1000.0


class Training(NamedTuple):
    """What a training gives.

    Attributes:
        snapshots: Policies at equal distances of the training, the last one fully trained.
        reward_curve: Mean gain of each twentieth of the episodes, in nats, in the order in which they ended.
        steps: Environment steps taken.
        steps_per_second: Environment steps a second, the policy's updates included.
    """

    snapshots: tuple[TrainedPolicy, ...]
    reward_curve: tuple[float, ...]
    steps: int
    steps_per_second: float


class _Recorder(BaseCallback):
    """Keeps copies of the network and the returns of episodes, and moves the progress bar."""

    def __init__(self, network: CandidateNetwork, config: SelectorConfig, advance: Advance) -> None:
        super().__init__()
        self.network, self.advance = network, advance
        self.copy_at = [round(config.training_steps * i / config.snapshots) for i in range(1, config.snapshots)]
        self.copies, self.returns = list[CandidateNetwork](), list[float]()

    def _on_step(self) -> bool:
        self.returns += [float(info["episode"]["r"]) for info in self.locals["infos"] if "episode" in info]
        self.advance(self.training_env.num_envs)
        return True

    def _on_rollout_start(self) -> None:
        if len(self.copies) < len(self.copy_at) and self.num_timesteps >= self.copy_at[len(self.copies)]:
            self.copies.append(snapshot(self.network))


def train_agent(
    tasks: Sequence[environment.SelectionTask], name: str, card: agents.AgentCard, config: SelectorConfig, seed: int,
    start_from: TrainedPolicy | None = None, progress: Progress = SILENT, callbacks: Sequence[BaseCallback] = (),
) -> Training:  # fmt: skip
    """Train a policy to choose candidates.

    Args:
        tasks: Pools, of one pair of domains or of several side by side; their feature columns must be those of
            ``start_from``.
        name: The agent's name.
        card: Algorithm, network and hyper-parameters.
        config: Steps and snapshots.
        seed: Seeds the environments, the network and the algorithm.
        start_from: A policy to train further; None for a new one.
        progress: Shown as "selector training".
        callbacks: Callbacks of Stable-Baselines3 that run besides; one that returns False ends the training.

    Raises:
        UsageError: If the card's hyper-parameters are not the algorithm's.
        RunError: If the training diverges.
    """
    with isolated_randomness(seed), progress.stage("selector training", config.training_steps) as advance:
        if start_from is None:
            network = CandidateNetwork(tasks[0].candidate_width, card.hidden, config.keep_rate, card.activation)
        else:
            network = snapshot(start_from.network).train().requires_grad_(True)
        recorder = _Recorder(network, config, advance)
        algorithm = _algorithm(tasks, card, network, seed)
        started = time.perf_counter()
        algorithm.learn(config.training_steps, [recorder, *callbacks])
    speed = algorithm.num_timesteps / (time.perf_counter() - started)
    if not all(torch.isfinite(weight).all() for weight in network.parameters()):
        raise RunError(f"agent {name}: the policy's weights are not finite; lower learning_rate in its card")
    trained = (TrainedPolicy(copy, tasks[0].features.names, name) for copy in [*recorder.copies, snapshot(network)])
    curve = tuple(float(np.mean(part)) for part in np.array_split(recorder.returns, LOOKS) if len(part))
    warn_if_constant("reward in training", curve)
    return Training(tuple(trained), curve, algorithm.num_timesteps, speed)


def warn_if_constant(reward: str, values: Sequence[float]) -> bool:
    """Warn of a reward that never changes, from which nothing can be learned; say whether it does change."""
    varies = len(values) < 2 or min(values) < max(values)
    if not varies:
        message = "selector: the %s is %.4g in all %d cases, so it teaches nothing; raise kd.divergence_size"
        logger.warning(message, reward, values[0], len(values))
    return varies


@contextlib.contextmanager
def isolated_randomness(seed: int) -> Iterator[None]:
    """Seed the global generators inside, with one thread, and give them back as they were."""
    # Stable-Baselines3 seeds and draws from the global generators. One thread is faster than several on matrices this
    # small, and its sums come in a fixed order.
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    threads = torch.get_num_threads()
    try:
        with training.seeded(seed):
            torch.set_num_threads(1)
            yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
        torch.set_num_threads(threads)


def _algorithm(
    tasks: Sequence[environment.SelectionTask], card: agents.AgentCard, network: CandidateNetwork, seed: int
) -> OnPolicyAlgorithm:
    kind, options = agents.algorithm_class(card), {**card.hyperparameters, "policy_kwargs": {"network": network}}
    environments: vec_env.VecEnv = vec_env.VecMonitor(environment.SelectionVecEnv(tasks, card.environments, seed))
    try:
        if card.scale_rewards:  # log-likelihood gains are thousandths, and differ from pool to pool
            spread = environment.SpreadByPool(environments.get_attr("task"))
            environments = vec_env.VecNormalize(environments, norm_obs=False, gamma=float(options.get("gamma", 0.99)))
            environments.ret_rms = spread
        algorithm: OnPolicyAlgorithm = kind(CandidatePolicy, environments, seed=seed, device="cpu", **options)
    except (TypeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"hyperparameters: {reason}; allowed are the arguments of {card.algorithm}") from error
    return algorithm


def dvrl_loss(logits: Tensor, kept: Tensor, counts: Tensor, advantages: Tensor) -> Tensor:
    """Loss of the data value estimator for whole episodes, averaged over them (Yoon et al., equation 8 and code).

    Args:
        logits: float32 (T, E, B) of the probability p to keep each candidate.
        kept: float32 (T, E, B), 1 where it was sampled as kept.
        counts: float32 (T, E), 1 for the steps that belong to the episode.
        advantages: float32 (E,), what each episode gained beyond the model that was trained on everything.

    Returns:
        Scalar: advantage * BCE_sum(p, kept) + 1000 * [relu(mean p - 0.9) + relu(0.1 - mean p)].
    """
    entropies = nn.functional.binary_cross_entropy_with_logits(logits, kept, reduction="none").sum(dim=2)
    mean = (torch.sigmoid(logits).mean(dim=2) * counts).sum() / counts.sum()
    outside = nn.functional.relu(mean - HIGHEST_MEAN) + nn.functional.relu(1.0 - HIGHEST_MEAN - mean)
    return ((entropies * counts).sum(dim=0) * advantages).mean() + PENALTY * outside


class DVRL(OnPolicyAlgorithm):
    """REINFORCE over one whole episode of each environment an update, against a fixed baseline.

    Each rollout plays every environment from its start. The baseline is what keeping everything gains. The paper's
    estimator also reads |y - y_val|; here the candidates' features hold KL(p_T || p_S) in its place (our adaptation),
    and an episode stands for the paper's batch. There is no critic; rewards must come in nats.
    """

    def __init__(self, policy: Any, env: vec_env.VecEnv, learning_rate: float = 0.01, **options: Any) -> None:
        """Make the algorithm, and measure its baseline; a rollout is as long as an episode, nothing is discounted.

        Args:
            policy: Class of the policy.
            env: Many ``SelectionVecEnv`` environments, monitored.
            learning_rate: Of Adam.
            **options: Further arguments of OnPolicyAlgorithm, such as seed and policy_kwargs.

        Raises:
            ValueError: If a discount is given.
        """
        for name in ("gamma", "gae_lambda"):
            if options.get(name, 1.0) != 1.0:
                raise ValueError(f"{name} is {options[name]}, but whole episodes are not discounted; leave it out")
        rng, tasks = np.random.default_rng(0), env.get_attr("task")  # of its own: the episodes stay as they are
        gains = {task: environment.gain_of_everything(task, rng) for task in dict.fromkeys(tasks)}
        self.gains_of_everything = np.array([gains[task] for task in tasks], np.float32)
        fixed: dict[str, Any] = {"gamma": 1.0, "gae_lambda": 1.0, "use_sde": False, "sde_sample_freq": -1}
        fixed |= {"supported_action_spaces": (spaces.MultiBinary,), "n_steps": max(task.steps for task in tasks)}
        unused = {"ent_coef": 0.0, "vf_coef": 0.0, "max_grad_norm": np.inf}
        super().__init__(policy, env, learning_rate, **{**unused, **options, **fixed})

    def collect_rollouts(
        self, env: vec_env.VecEnv, callback: BaseCallback, rollout_buffer: buffers.RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Reset every environment and play, so that each gives one whole episode; False if the callback ended it."""
        self._last_obs = np.asarray(env.reset())
        self._last_episode_starts = np.ones(env.num_envs, bool)
        return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)

    def train(self) -> None:
        """Take one step on the loss of the first episode of each environment."""
        self.policy.set_training_mode(True)
        buffer = self.rollout_buffer
        in_first = np.cumsum(buffer.episode_starts, axis=0) == 1  # bool (T, E)
        gains = (buffer.rewards * in_first).sum(axis=0) - self.gains_of_everything
        seen = torch.from_numpy(buffer.observations).flatten(0, 1)
        logits = self.policy.mlp_extractor.forward_actor(seen).reshape(buffer.actions.shape)
        kept, counts = torch.from_numpy(buffer.actions).float(), torch.from_numpy(in_first).float()
        loss = dvrl_loss(logits, kept, counts, torch.from_numpy(gains).float())
        self._update_learning_rate(self.policy.optimizer)
        self.policy.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.policy.optimizer.step()
