"""Fills the output folder of a run."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from l2a.config import DistillConfig
from l2a.files import atomic_write_text
from l2a.jsontext import to_json
from l2a.pipeline.context import RunContext
from l2a.pipeline.policy_facts import training_facts
from l2a.pipeline.selectors import open_policy
from l2a.pipeline.students import Round, TrainedStudent
from l2a.progress import RunProgress
from l2a.report.augmentations import Augmentations, write_augmentations
from l2a.report.export import check_parity, export_student
from l2a.report.metrics_file import metrics_content
from l2a.report.model_card import model_card
from l2a.report.row import Row
from l2a.selector.saving import save_policy


def write_run(
    context: RunContext, folder: Path, trained: TrainedStudent, rows: tuple[Row, ...], command: str
) -> Mapping[str, Any]:
    """Write student, selector, candidates, metrics and model card.

    Args:
        context: The run.
        folder: Where to write; it takes its final name later.
        trained: The student and its rounds.
        rows: The comparison.
        command: The command line.

    Returns:
        The content of ``metrics.json``.

    Raises:
        RunError: If the exported student does not reproduce the trained one.
    """
    config, data, student = context.config, context.data, trained.student
    student.model.to("cpu")
    metrics = metrics_content(
        rows,
        student.parameters_count / context.teacher.parameters_count,
        data.splits.labels_used,
        context.progress.seconds_by_stage if isinstance(context.progress, RunProgress) else {},
        config.seed,
        command,
        {"rounds": [_round_facts(done) for done in trained.rounds], "files": data.files},
    )
    card = model_card(config.source, config.target, data.label_names, config.teacher.model, rows, metrics)
    export_student(student.model, student.tokenizer, folder / "student", card)
    probe = data.target_labels.inputs[:32]
    parity = check_parity(student.model, student.tokenizer, folder / "student", probe, config.max_length)
    metrics["export_logit_difference"] = parity
    atomic_write_text(folder / "README.md", card)
    write_augmentations(folder / "augmentations.parquet", [_augmentations(done) for done in trained.rounds])
    _write_selector(folder / "selector", config, trained)
    atomic_write_text(folder / "metrics.json", to_json(metrics, indent=1) + "\n")
    return metrics


def _augmentations(done: Round) -> Augmentations:
    pool, selection = done.pool, done.selection
    return Augmentations(
        pool.inputs,
        pool.origins,
        pool.operators,
        pool.degrees,
        pool.teacher.probabilities(),
        selection.scores,
        selection.kept,
    )


def _round_facts(done: Round) -> dict[str, Any]:
    return {"generator": dataclasses.asdict(done.chains), "selector": dict(done.selection.diagnostics)}


def _write_selector(folder: Path, config: DistillConfig, trained: TrainedStudent) -> None:
    last = trained.rounds[-1].selection
    facts: dict[str, Any] = {
        "agent": last.agent,
        "rounds": [dict(done.selection.diagnostics) for done in trained.rounds],
    }
    if last.policy is not None:
        # It replaces the folder, so it comes first.
        save_policy(last.policy, folder, _policy_facts(config, facts["rounds"]))
    atomic_write_text(folder / "selection.json", to_json(facts, indent=1) + "\n")


def _policy_facts(config: DistillConfig, rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    used = {"used_in_the_last_round": rounds[-1].get("chosen", "learned policy")}
    if "reward_curve" not in rounds[-1]:  # a policy that was trained elsewhere
        return {**open_policy(config.selector.agent)[1], **used}
    # Each round trains on where the one before it ended.
    curve = [value for known in rounds for value in known["reward_curve"]]
    steps = sum(known["training_steps"] for known in rounds)
    facts = training_facts([config], steps, rounds[-1]["steps_per_second"], curve)
    return {**facts, **used}
