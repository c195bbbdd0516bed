"""The main job: teachers, candidates, selection, distillation, comparison and the output folder."""

import shlex
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from l2a.config import DistillConfig, as_yaml
from l2a.distributed import process_rank
from l2a.evaluation.latency import measure_latency
from l2a.evaluation.metrics import classification_metrics
from l2a.files import atomic_folder, atomic_write_text, discarded_folder, refuse_overwriting
from l2a.pipeline.context import RunContext
from l2a.pipeline.outputs import write_run
from l2a.pipeline.rows import ROWS, FittedRow, evaluate_row, student_row
from l2a.pipeline.students import TrainedStudent, train_l2a_student
from l2a.progress import RunProgress
from l2a.report.row import Row
from l2a.selector.agents import load_agent

NEEDS_EXTRA_TRAINING = frozenset(ROWS) - {"cross_domain_teacher", "l2a_student"}
NEEDS_UNLABELLED = frozenset({"plain_kd_unlabelled_student", "l2a_without_unlabelled_student"})
NEEDS_OPERATOR = frozenset({"augmented_kd_student"})
"""Trained only where ``generator.operator`` names what it augments by."""
ONLY_IN_EXPERIMENTS = frozenset({"augmented_fine_tuned_student", "cut_vector_sum_logreg"})
NEEDS_PRETRAINED_ENCODER = frozenset({"target_only_teacher", "frozen_teacher_logreg"})
"""Rows that would be unfair with a teacher that was fine-tuned elsewhere, perhaps on this very target."""


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
        f"the selector, {len(splits.choice)} to choose the model"
    )
    trained, fitted = _fit_rows(context)
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


def _fit_rows(context: RunContext) -> tuple[TrainedStudent, dict[str, FittedRow]]:
    fitted: dict[str, FittedRow] = {}
    for name, fit in ROWS.items():
        if name != "l2a_student" and name not in _left_out(context.config):
            fitted[name] = _timed(context, name, lambda fit=fit: fit(context))  # type: ignore[misc]
    trained: TrainedStudent = _timed(context, "l2a_student", lambda: train_l2a_student(context))
    fitted["l2a_student"] = student_row(trained, context.config.max_length)
    return trained, fitted


def _left_out(config: DistillConfig) -> frozenset[str]:
    if not config.compare:
        # What unlabelled text brings is always shown.
        return NEEDS_EXTRA_TRAINING - ({"l2a_without_unlabelled_student"} if config.unlabelled is not None else set())
    no_text = NEEDS_UNLABELLED if config.unlabelled is None else frozenset()
    no_operator = NEEDS_OPERATOR if config.generator.operator is None else frozenset()
    no_encoder = NEEDS_PRETRAINED_ENCODER if config.teacher.fine_tuned else frozenset()
    return ONLY_IN_EXPERIMENTS | no_text | no_operator | no_encoder


def _timed(context: RunContext, name: str, work: Callable[[], Any]) -> Any:
    started = time.monotonic()
    done = work()
    context.progress.event("fitted", row=name, row_seconds=round(time.monotonic() - started, 3))
    return done


def _evaluate(context: RunContext, name: str, fitted: FittedRow) -> Row:
    result = evaluate_row(context, name, fitted, 0.0)
    rng = np.random.default_rng([context.config.seed, 3])
    metrics = classification_metrics(result.labels, result.predictions, len(result.label_names), rng)
    few = context.data.target_labels.inputs[:64]
    return Row(name, metrics, fitted.parameters, measure_latency(fitted.predict, few))


def _command() -> str:
    return shlex.join(["l2a", *sys.argv[1:]]) if Path(sys.argv[0]).name in ("l2a", "__main__.py") else "l2a.distill"
