"""Fills the output folder of a run."""

import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from l2a.config import DistillConfig, as_yaml
from l2a.evaluation.metrics import Row, classification_metrics, measure_latency
from l2a.pipeline.methods import FittedMethod, compared_methods, evaluate_method
from l2a.pipeline.policies import open_policy, training_facts
from l2a.pipeline.session import RunContext
from l2a.pipeline.students import Round, TrainedStudent
from l2a.report.export import Augmentations, check_parity, export_student, write_augmentations
from l2a.report.run_files import metrics_content, model_card
from l2a.selector.agents import load_agent
from l2a.selector.saving import save_policy
from l2a.util.files import atomic_folder, atomic_write_text, discarded_folder, refuse_overwriting, to_json
from l2a.util.progress import RunProgress
from l2a.util.training import process_rank


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
    card = model_card(str(config.source), config.target, data.label_names, config.teacher.model, rows, metrics)
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


@dataclass(frozen=True)
class DistillResult:
    """What a run gave.

    Attributes:
        output_dir: Folder with the student, the selector and the evidence.
        rows: The comparison on the test split, the student last.
        metrics: The content of ``metrics.json``.
    """

    output_dir: Path
    rows: tuple[Row, ...]
    metrics: Mapping[str, Any]


def distill(config: DistillConfig, verbosity: int = -1, announce: Callable[[str], None] | None = None) -> DistillResult:
    """Run the whole job and write the output folder in one step at the end.

    Args:
        config: The run.
        verbosity: -1 shows nothing, 0 progress bars on a terminal, 1 also every event.
        announce: Gets sentences for the user, such as how many labels are used.

    Returns:
        The rows of the comparison and everything measured.

    Raises:
        UsageError: If the request or the data are wrong, or a finished run would be overwritten.
        RunError: If the run fails; no half-written output is left.
    """
    output_dir = Path(config.output_dir).expanduser()
    refuse_overwriting(output_dir, "metrics.json", "a finished run", config.overwrite)
    load_agent(config.selector.agent)  # a misspelt name should not cost the minutes before the selection
    with _output_folder(output_dir) as folder:
        progress = RunProgress(folder / "log.jsonl", verbosity)
        try:
            rows, metrics = _run(RunContext(config, progress), folder, announce or (lambda sentence: None))
        finally:
            progress.close()
    return DistillResult(output_dir, rows, metrics)


def _output_folder(output_dir: Path) -> AbstractContextManager[Path]:
    """Give the folder to fill; of several processes only the first one's is kept."""
    if process_rank() == 0:
        return atomic_folder(output_dir.resolve())
    return discarded_folder()


def _run(
    context: RunContext, folder: Path, announce: Callable[[str], None]
) -> tuple[tuple[Row, ...], Mapping[str, Any]]:
    config, progress = context.config, context.progress
    progress.event("start", command=_command(), config=as_yaml(config))
    splits = context.data.splits
    announce(
        f"{splits.labels_used} target labels are used: {len(splits.train)} to train, {len(splits.reward)} to reward "
        f"the selector, {len(splits.validation)} to choose the model"
    )
    fitted = _fit_methods(context)
    trained = fitted["l2a_student"].trained
    assert trained is not None
    share = trained.student.parameters_count / context.teacher.parameters_count
    announce(
        f"the student has {trained.student.parameters_count:,} parameters, {share:.1%} of the teacher's "
        f"{context.teacher.parameters_count:,}"
    )
    with progress.stage("evaluate"):
        rows = tuple(_evaluate(context, name, row) for name, row in fitted.items())
    if process_rank() != 0:
        return rows, {}
    metrics = write_run(context, folder, trained, rows, _command())
    atomic_write_text(folder / "config.yaml", as_yaml(config))
    return rows, metrics


def _fit_methods(context: RunContext) -> dict[str, FittedMethod]:
    methods = compared_methods(context.config)
    return {method.name: _timed(context, method.name, partial(method.fit, context)) for method in methods}


def _timed(context: RunContext, name: str, work: Callable[[], Any]) -> Any:
    started = time.monotonic()
    done = work()
    context.progress.event("fitted", row=name, row_seconds=round(time.monotonic() - started, 3))
    return done


def _evaluate(context: RunContext, name: str, fitted: FittedMethod) -> Row:
    result = evaluate_method(context, name, fitted, 0.0)
    rng = np.random.default_rng([context.config.seed, 3])
    metrics = classification_metrics(result.labels, result.predictions, len(result.label_names), rng)
    few = context.data.target_labels.inputs[:64]
    return Row(name, metrics, fitted.parameters, measure_latency(fitted.predict, few))


def _command() -> str:
    return shlex.join(["l2a", *sys.argv[1:]]) if Path(sys.argv[0]).name in ("l2a", "__main__.py") else "l2a.distill"
