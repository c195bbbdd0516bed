"""Selection policies on their own: trained on pairs of domains, compared with the rules, explained."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from l2a.config import DistillConfig
from l2a.kd.data import DistillationSet
from l2a.kd.trainer import KDTrainer
from l2a.pipeline.session import RunContext, TrainingSession, mixture, open_session
from l2a.pipeline.students import Drawn, draw_candidates, selection_problem
from l2a.report.run_folder import versions
from l2a.selector.agents import AgentCard, check_agent, load_agent
from l2a.selector.algorithms import TrainedPolicy, Training, load_facts, load_policy, save_policy, train_agent
from l2a.selector.environment import build_task
from l2a.selector.problem import RULES, SelectionProblem, candidate_features
from l2a.selector.reward import build_surrogate, reward_score, score_after, surrogate_reward
from l2a.selector.select import Inspection, apply_policy, inspect_policy, rank_correlation, select
from l2a.util.errors import UsageError
from l2a.util.files import CHECKPOINT, Checkpoint, output_folder
from l2a.util.progress import SILENT, Progress


@dataclass(frozen=True)
class PreparedPair:
    """A pair of domains at the moment when candidates are to be selected.

    Attributes:
        session: The student, warmed up.
        drawn: The pool.
        problem: What a selector is given.
    """

    session: TrainingSession
    drawn: Drawn
    problem: SelectionProblem


@dataclass(frozen=True)
class Verdict:
    """What a selection is worth.

    Attributes:
        name: "policy" or the rule.
        kept: Candidates kept.
        surrogate: Mean influence of the kept candidates, in nats: against steps on texts without influence.
        real: Gain of the student's score on the reward split after real updates, in nats.
    """

    name: str
    kept: int
    surrogate: float
    real: float


@dataclass(frozen=True)
class Evaluation:
    """A policy beside every rule on one pair.

    Attributes:
        verdicts: The policy's first.
        updates: Real updates of the student for each of them.
        correlation: Spearman correlation of the two rewards over the selections; nan when one is constant.
    """

    verdicts: tuple[Verdict, ...]
    updates: int
    correlation: float


def pair_name(config: DistillConfig) -> str:
    """Name a pair as a saved policy does, "source:target"."""
    return f"{config.source}:{config.target}"


def training_facts(
    configs: Sequence[DistillConfig], steps: int, steps_per_second: float, reward_curve: Sequence[float]
) -> dict[str, Any]:
    """Say how a policy was trained, for its folder.

    Args:
        configs: One a pair and seed.
        steps: Environment steps.
        steps_per_second: Of the training.
        reward_curve: Of the training, in nats.

    Returns:
        Values that JSON can hold.
    """
    return {
        "pairs": list(dict.fromkeys(pair_name(config) for config in configs)),
        "seeds": sorted({config.seed for config in configs}), "shots": configs[0].shots,
        "dev_shots": configs[0].dev_shots, "keep_rate": configs[0].selector.keep_rate, "steps": steps,
        "steps_per_second": round(steps_per_second, 1), "reward_curve": list(reward_curve), "versions": versions(),
    }  # fmt: skip


def prepare_pair(config: DistillConfig, progress: Progress = SILENT) -> PreparedPair:
    """Train the teacher (or take it from the cache), warm the student up and draw a pool.

    Args:
        config: The pair and the budget.
        progress: Shows how far it is.

    Returns:
        The pair.
    """
    session = open_session(RunContext(config, progress))
    session.distil(None, config.kd.warmup_steps, "warm-up")
    drawn = draw_candidates(session, np.random.default_rng([config.seed, 2, 0]))
    return PreparedPair(session, drawn, selection_problem(session, drawn))


def surrogate_problem(config: DistillConfig, progress: Progress = SILENT) -> SelectionProblem:
    """Prepare a pair for training by the surrogate alone.

    Args:
        config: The pair and the budget.
        progress: Shows how far it is.

    Returns:
        The problem, its influences measured and without its real reward, so that it holds no teacher and no student.
    """
    problem = prepare_pair(config, progress).problem
    influences = build_surrogate(problem).influences
    return replace(problem, influences=lambda: influences, real_reward=None)


def train_selector(
    configs: Sequence[DistillConfig], folder: Path, overwrite: bool = False, progress: Progress = SILENT
) -> Training:
    """Train one policy on the surrogate environments of one pair or several, side by side, and save it.

    Args:
        configs: One a pair and seed; agent and training are those of the first.
        folder: Gets the policy and how it was trained.
        overwrite: Replace a policy that is there.
        progress: Shows how far it is.

    Returns:
        The course of the training.

    Raises:
        UsageError: If the agent does not learn, or the folder is in use.
        RunError: If the training diverges.
    """
    _learning_card(configs[0])
    settings = {str(number): asdict(one) | {"output_dir": None} for number, one in enumerate(configs)}
    with output_folder(folder, "policy", overwrite) as unfinished:
        progress = progress.keeping(Checkpoint(folder / CHECKPOINT, settings))
        return train_on([surrogate_problem(one, progress) for one in configs], configs, unfinished, progress)


def train_on(
    problems: Sequence[SelectionProblem], configs: Sequence[DistillConfig], folder: Path, progress: Progress = SILENT
) -> Training:
    """Train one policy on prepared pairs and save it.

    Args:
        problems: One a pair, at least one.
        configs: What they were prepared with; agent, training and seed are those of the first.
        folder: Gets the policy and how it was trained.
        progress: Shows how far it is.

    Returns:
        The course of the training.

    Raises:
        UsageError: If the agent does not learn.
        RunError: If the training diverges.
    """
    config, card = configs[0].selector, _learning_card(configs[0])
    # One set of columns for all: a pool that lacks an operator has zeros there.
    names = tuple(dict.fromkeys(name for problem in problems for name in candidate_features(problem).names))
    tasks = [build_task(problem, one.selector, names) for problem, one in zip(problems, configs, strict=True)]
    training = train_agent(tasks, config.agent, card, config, configs[0].seed, progress=progress)
    facts = training_facts(configs, training.steps, training.steps_per_second, training.reward_curve)
    save_policy(training.snapshots[-1], folder, facts)
    return training


def _learning_card(config: DistillConfig) -> AgentCard:
    card = load_agent(config.selector.agent)
    check_agent(config.selector.agent)
    if not card.learns:
        raise UsageError(
            f"selector.agent is {config.selector.agent!r}, which does not learn; give an algorithm's card, such as ppo"
        )
    return card


def open_policy(name: str) -> tuple[TrainedPolicy, dict[str, Any]]:
    """Read a saved policy.

    Args:
        name: Its folder, or a card that names one.

    Returns:
        The policy, and how it was trained.

    Raises:
        UsageError: If it is not a trained policy.
        RunError: If it cannot be read.
    """
    folder = load_agent(name).policy
    if folder is None:
        raise UsageError(f"policy: {name!r} is a card without a trained policy; give a folder that holds policy.json")
    return load_policy(Path(folder)), load_facts(Path(folder))


def evaluate_policy(
    config: DistillConfig, policy: TrainedPolicy, updates: int | None = None, progress: Progress = SILENT
) -> Evaluation:
    """Compare a policy with every rule at the same keep rate and the same updates, on the reward split.

    Args:
        config: The pair; the policy is not trained on it.
        policy: The policy.
        updates: Real updates of the student for each selection; None for those of a round.
        progress: Shows how far it is.

    Returns:
        Both rewards of every selection.
    """
    pair, steps = prepare_pair(config, progress), updates or config.kd.round_steps
    surrogate, verdicts = build_surrogate(pair.problem), []
    with progress.stage("real updates", 1 + len(RULES)) as advance:
        for name in ("policy", *RULES):
            rng = np.random.default_rng([config.seed, 6])
            if name == "policy":
                selection = apply_policy(pair.problem, policy, config.selector, rng)
            else:
                selection = select(pair.problem, replace(config.selector, agent=name), rng)
            kept = np.flatnonzero(selection.kept)
            real = _gain(pair.session, pair.drawn.candidates.take(kept), steps)
            verdicts.append(Verdict(name, len(kept), surrogate_reward(surrogate, selection.kept), real))
            advance(1)
    correlation = rank_correlation([one.surrogate for one in verdicts], [one.real for one in verdicts])
    return Evaluation(tuple(verdicts), steps, correlation)


def _gain(session: TrainingSession, kept: DistillationSet, steps: int) -> float:
    """Distil as a round does, on the whole mixture, and take the steps back."""

    def whole_mixture(trial: KDTrainer) -> None:
        trial.train(*mixture(session, kept), steps, evaluate=False)

    before, kd = reward_score(session.student, session.reward), session.context.config.kd
    return score_after(session.trainer, kd, steps, session.reward, whole_mixture) - before


def explain_policy(config: DistillConfig, policy: TrainedPolicy, progress: Progress = SILENT) -> Inspection:
    """Explain what a policy keeps on a pair of domains.

    Args:
        config: The pair.
        policy: The policy.
        progress: Shows how far it is.

    Returns:
        The explanation.
    """
    rng = np.random.default_rng([config.seed, 6])
    return inspect_policy(prepare_pair(config, progress).problem, policy, config.selector, rng)
