"""Selection policies on their own: trained on pairs of domains, compared with the rules, explained."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from l2a.config import DistillConfig
from l2a.data import Bools, Examples, Floats, encoding, normalised_hash
from l2a.kd import data as kd_data, trainer
from l2a.pipeline import methods, students
from l2a.pipeline.session import RunContext, TrainingSession, apart_from
from l2a.report.run_folder import versions
from l2a.selector import agents, algorithms, environment, reward
from l2a.selector.problem import RULES, SelectionProblem, candidate_features, keep_best
from l2a.selector.select import Inspection, apply_policy, inspect_policy, rank_correlation, select
from l2a.util import SILENT, Progress, UsageError, atomic_write_text, cache_root, files, fingerprint, to_json

ORACLES = ("near and clean", "greedy by labels")
SMALLEST_HEADROOM = 1.0  # points
RANDOM_CHOICES = 3


class PreparedPair(NamedTuple):
    """A pair of domains at the moment when candidates are to be selected.

    Attributes:
        session: The student, warmed up.
        drawn: The pool.
        problem: What a selector is given.
    """

    session: TrainingSession
    drawn: students.Drawn
    problem: SelectionProblem


class Verdict(NamedTuple):
    """What a selection is worth.

    Attributes:
        name: "policy", a rule, an oracle or another choice.
        kept: Candidates kept.
        real: Gain of the student's score on the reward texts after real updates, in nats.
        surrogate: Gain of the output layer alone, in nats, against keeping nothing; not a number if none was measured.
        accuracy: After these updates, on target labels that no run reads; not a number where there are none.
    """

    name: str
    kept: int
    real: float
    surrogate: float = np.nan
    accuracy: float = np.nan


class Evaluation(NamedTuple):
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
    configs: Sequence[DistillConfig], steps: int, speed: float, curve: Sequence[float]
) -> dict[str, Any]:
    """Say how a policy was trained, for its folder, in values that JSON can hold.

    There is one configuration a pair and seed, the speed is in steps a second, and the curve has mean gains in nats.
    """
    return {
        "pairs": list(dict.fromkeys(pair_name(config) for config in configs)),
        "seeds": sorted({config.seed for config in configs}), "shots": configs[0].shots,
        "dev_shots": configs[0].dev_shots, "keep_rate": configs[0].selector.keep_rate, "steps": steps,
        "steps_per_second": round(speed, 1), "reward_curve": list(curve), "versions": versions(),
    }  # fmt: skip


def prepare_pair(config: DistillConfig, progress: Progress = SILENT) -> PreparedPair:
    """Train the teacher (or take it from the cache), warm the student up and draw a pool."""
    session = students.warm_up(RunContext(config, progress))
    drawn = students.draw_candidates(session, np.random.default_rng([config.seed, 2, 0]))
    return PreparedPair(session, drawn, students.selection_problem(session, drawn))


def train_selector(
    configs: Sequence[DistillConfig], folder: Path, overwrite: bool = False, progress: Progress = SILENT,
    problems: Sequence[SelectionProblem] | None = None,
) -> algorithms.Training:  # fmt: skip
    """Train one policy on the surrogate environments of one pair or several, side by side, and save it.

    Args:
        configs: One a pair and seed; agent, training and seed are those of the first.
        folder: Gets the policy and how it was trained.
        overwrite: Replace a policy that is there.
        progress: Shows how far it is.
        problems: Those of the configurations, where they are prepared already (``reward.surrogate_only`` of a pair).

    Raises:
        UsageError: If the agent does not learn, or the folder is in use.
        RunError: If the training diverges.
    """
    config = configs[0].selector
    agents.check_agent(config.agent)
    if not (card := agents.load_agent(config.agent)).learns:
        fix = "which does not learn what other pools can use; give one like ppo"
        raise UsageError(f"selector.agent is {config.agent!r}, {fix}")
    settings = {str(number): asdict(one) | {"output_dir": None} for number, one in enumerate(configs)}
    with files.output_folder(folder, "policy", overwrite) as unfinished:
        progress = progress.keeping(files.Checkpoint(folder / files.CHECKPOINT, settings))
        problems = problems or [reward.surrogate_only(prepare_pair(one, progress).problem) for one in configs]
        # One set of columns for all: a pool that lacks an operator has zeros there.
        names = tuple(dict.fromkeys(name for problem in problems for name in candidate_features(problem).names))
        both = zip(problems, configs, strict=True)
        tasks = [environment.build_task(problem, one.selector, names) for problem, one in both]
        training = algorithms.train_agent(tasks, config.agent, card, config, configs[0].seed, progress=progress)
        facts = training_facts(configs, training.steps, training.steps_per_second, training.reward_curve)
        algorithms.save_policy(training.snapshots[-1], unfinished, facts)
    return training


def open_policy(name: str) -> algorithms.TrainedPolicy:
    """Read a saved policy, with the facts of its training, by its folder or by a card that names one.

    Raises:
        UsageError: If it is not a trained policy.
        RunError: If it cannot be read.
    """
    folder = agents.load_agent(name).policy
    if folder is None:
        raise UsageError(f"policy: {name!r} is a card without a trained policy; give a folder that holds policy.json")
    return algorithms.load_policy(Path(folder))


def evaluate_policy(
    config: DistillConfig, policy: algorithms.TrainedPolicy, updates: int | None = None, progress: Progress = SILENT
) -> Evaluation:
    """Compare a policy with every rule at the same keep rate and the same updates, on the reward texts.

    Args:
        config: The pair; the policy is not trained on it.
        policy: The policy.
        updates: Real updates of the student for each selection; None for those of a round.
        progress: Shows how far it is.
    """
    pair, steps = prepare_pair(config, progress), updates or config.kd.round_steps
    surrogate, before = reward.surrogate_of(pair.problem), _score(pair)
    kept = {"policy": apply_policy(pair.problem, policy, config.selector, np.random.default_rng([config.seed, 6])).kept}
    for name in RULES:
        if name != "oracle":  # it reads labels that the others do not
            agent, rng = replace(config.selector, agent=name), np.random.default_rng([config.seed, 6])
            kept[name] = select(pair.problem, agent, rng).kept
    real = [_score(pair) - before for _ in _after_each(pair, list(kept.values()), steps, "real updates")]
    first = [reward.surrogate_reward(surrogate, mask) for mask in kept.values()]
    verdicts = tuple(map(Verdict, kept, [int(mask.sum()) for mask in kept.values()], real, first))
    return Evaluation(verdicts, steps, rank_correlation(first, real))


def _score(pair: PreparedPair) -> float:
    return reward.reward_score(pair.session.student, pair.session.reward)


def _after_each(pair: PreparedPair, masks: Sequence[Bools | None], updates: int, stage: str) -> Iterator[None]:
    """Distil on each selection in turn; in between, the student is as that one left it."""
    with pair.session.context.progress.stage(stage, len(masks)) as advance:
        for mask in masks:
            with students.after_updates(pair.session, pair.drawn, mask, updates):
                yield
            advance(1)


def measure_headroom(config: DistillConfig, progress: Progress = SILENT) -> dict[str, Any]:
    """Distil a whole round on what oracles choose from a pair's first pool, and on random choices.

    The oracles read labels that no run reads (``spare_labels``), and so do the judges, others of them. "Near and clean"
    is the rule "oracle" (``near_and_clean``); "greedy by labels" keeps those of which more would help the labels most,
    by the surrogate judged on them. The better of the two is taken by what the judges say, which flatters it a little.
    The result goes to the cache, where a run on the same data, pool and budget finds it (``known_headroom``).

    Returns:
        "points", by which the better oracle's accuracy exceeds that of a random choice, with their standard error
        ("noise"); "verdicts", by selection its facts, the mean of several for "random"; candidates in the "pool";
        target "labels" that the oracles read, and labels "judged_on".

    Raises:
        UsageError: If the target has too few labels beside those of the run.
    """
    pair, rng = prepare_pair(config, progress), np.random.default_rng([config.seed, 9])
    context, pool = pair.session.context, pair.drawn.pool
    (seen, others), drawn = students.spare_labels(context), set(map(normalised_hash, pool.inputs))
    judges = others.take(apart_from(drawn, others.inputs))
    by_chance = rng.random((RANDOM_CHOICES, len(pool)), np.float32)
    scores = [students.near_and_clean(context, pair.drawn), _greedy_by_labels(pair, seen), *by_chance]
    share, before = config.selector.keep_rate, _score(pair)
    masks = [*(keep_best(one, share, pair.problem.classes) for one in scores), np.ones(len(pool), bool), None]
    names, judged = [*ORACLES, *["random"] * RANDOM_CHOICES, "all", "none"], dict[str, list[tuple[float, Any]]]()
    for name, _ in zip(names, _after_each(pair, masks, config.kd.round_steps, "rounds"), strict=True):
        said = methods.student_logits(context, pair.session.student, judges.inputs).argmax(axis=1)
        judged.setdefault(name, []).append((_score(pair), said == judges.labels))
    right = {name: np.mean([one for _, one in several], axis=0) for name, several in judged.items()}
    gains = {name: float(np.mean([score for score, _ in several])) - before for name, several in judged.items()}
    kept, best = {"all": len(pool), "none": 0}, max((right[name] - right["random"] for name in ORACLES), key=np.mean)
    verdicts = [
        Verdict(name, kept.get(name, round(share * len(pool))), gains[name], accuracy=float(correct.mean()))._asdict()
        for name, correct in right.items()
    ]
    facts: dict[str, Any] = {
        "points": 100 * float(best.mean()), "noise": 100 * trainer.standard_error(best), "judged_on": len(judges),
        "verdicts": verdicts, "pool": len(pool), "labels": len(seen),
    }  # fmt: skip
    atomic_write_text(_headroom_file(context), to_json(facts, indent=1) + "\n")
    return facts


def _greedy_by_labels(pair: PreparedPair, seen: Examples) -> Floats:
    """Say what more of each candidate adds to the likelihood of labels that no method reads, float32 (N,)."""
    session, context = pair.session, pair.session.context
    outputs = students.as_outputs(seen.labels, len(seen.label_names), context.teacher.hidden_size)
    encoded = encoding.encode(session.student.tokenizer, seen.inputs, context.config.max_length)
    problem = students.selection_problem(session, pair.drawn, kd_data.DistillationSet(encoded, outputs, seen.labels))
    return reward.marginal_gains(reward.surrogate_of(problem))


def _headroom_file(context: RunContext) -> Path:
    """Where the headroom of a pair, its pool and its budget is kept; the seed and the agent play no part in it."""
    config, files = context.config, tuple(sorted(context.data.files.items()))
    unread = {"seed", "selector", "output_dir", "overwrite", "compare", "report", "data_root", "source", "target"}
    decisive = {name: value for name, value in asdict(config).items() if name not in unread | {"unlabelled"}}
    return cache_root() / "headroom" / f"{fingerprint(2, files, config.selector.keep_rate, decisive)}.json"


def known_headroom(context: RunContext) -> dict[str, Any]:
    """Look up what ``measure_headroom`` found for a pair, a pool and a budget, whatever the seed; {} if nothing."""
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads(_headroom_file(context).read_text("utf-8")))
    return {}


def headroom_note(found: Mapping[str, Any]) -> str:
    """Say in words what a headroom means, from the facts of ``measure_headroom``."""
    points, noise = found["points"], found["noise"]
    gain = f"a perfect choice brings {points:+.1f} points (standard error {noise:.1f}) over a random one"
    if points < SMALLEST_HEADROOM:
        return f"{gain}: under {SMALLEST_HEADROOM:g} point, so no selector can win here; use --selector all or random"
    return f"{gain}: that is the most that a selector can bring here"


def explain_policy(config: DistillConfig, policy: algorithms.TrainedPolicy, progress: Progress = SILENT) -> Inspection:
    """Explain what a policy keeps on a pair of domains."""
    rng = np.random.default_rng([config.seed, 6])
    return inspect_policy(prepare_pair(config, progress).problem, policy, config.selector, rng)
