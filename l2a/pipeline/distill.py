"""The main job: everything that can be refused is refused first, then methods are trained and the folder is filled."""

import os
import shlex
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from l2a.config import DistillConfig, as_yaml, override, settle
from l2a.pipeline.data import RunData, load_run_data
from l2a.selector.agents import load_agent
from l2a.util.errors import RunError
from l2a.util.files import FAILED_LOG, atomic_write_text, discarded_folder, output_folder, to_json
from l2a.util.progress import RunProgress

if TYPE_CHECKING:  # these import torch, which bad data should not wait for
    from l2a.pipeline.methods import FittedMethod
    from l2a.pipeline.session import RunContext
    from l2a.pipeline.students import Round, TrainedStudent
    from l2a.report import MethodReport


@dataclass(frozen=True)
class DistillResult:
    """What a run gave.

    Attributes:
        output_dir: Folder with the student, the selector and the evidence.
        student: Name of the method whose student was saved: the best on the validation split.
        rows: The comparison on the test split.
        metrics: The content of ``metrics.json``.
    """

    output_dir: Path
    student: str
    rows: tuple["MethodReport", ...]
    metrics: Mapping[str, Any]


def distill(
    config: DistillConfig | None = None,
    *,
    target: Any = None,
    source: Any = None,
    unlabelled: Any = None,
    verbosity: int = -1,
    **settings: Any,
) -> DistillResult:
    """Run the whole job and write the output folder in one step at the end.

    Args:
        config: The run; None for the defaults.
        target: The target domain in place of ``config.target``: a name or a path, or in memory a list of
            (text, label) or ((first, second), label), a pandas frame or an object of ``datasets``.
        source: The source domain, likewise.
        unlabelled: Text without labels: a name or a path, or in memory a list of texts or pairs, a frame or a dataset.
        verbosity: -1 shows nothing, 0 progress bars on a terminal and what is decided, 1 also every event.
        **settings: Fields of ``DistillConfig`` to change, such as ``shots=16`` or ``kd={"rounds": 1}``.

    Returns:
        The rows of the comparison and everything measured.

    Raises:
        UsageError: If the request or the data are wrong, or a finished run would be overwritten.
        RunError: If the run fails; the output folder is as it was then, but for the log.
    """
    given = {"target": target, "source": source, "unlabelled": unlabelled}
    named = {side: str(data) for side, data in given.items() if isinstance(data, str | Path)}
    in_memory = {side: data for side, data in given.items() if data is not None and side not in named}
    names = {side: f"{side} in memory" for side in in_memory}
    config = settle(override(config or DistillConfig(), {**named, **names, **settings}))
    load_agent(config.selector.agent)
    with _output_folder(config) as folder:
        progress = RunProgress(folder / "log.jsonl", -1 if _rank() else verbosity)  # of several processes one speaks
        try:
            return _run(config, in_memory, folder, progress)
        except RunError as error:
            raise RunError(f"{error}; the log is {Path(config.output_dir) / FAILED_LOG}") from error
        finally:
            progress.close()


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _output_folder(config: DistillConfig) -> AbstractContextManager[Path]:
    """Give the folder to fill; of several processes only the first one's is kept."""
    if _rank():
        return discarded_folder()
    return output_folder(Path(config.output_dir).expanduser().resolve(), "run", config.overwrite)


def _run(config: DistillConfig, in_memory: Mapping[str, Any], folder: Path, progress: RunProgress) -> DistillResult:
    progress.event("start", command=_command(), config=as_yaml(config))
    with progress.stage("read the domains"):
        data = load_run_data(config, progress, in_memory)
    progress.say(_labels_sentence(data))
    from l2a.pipeline.session import RunContext

    context = RunContext(config, progress, data)
    with progress.stage("check the models"):
        context.check_models()
    fitted = _fit_methods(context)
    students = {name: method.trained for name, method in fitted.items() if method.trained is not None}
    scores = {name: trained.validation_log_likelihood for name, trained in students.items()}
    best = max(scores, key=lambda name: scores[name])
    count, teacher_count = students[best].student.parameters_count, context.teacher.parameters_count
    progress.say(
        f"the student has {count:,} parameters, {count / teacher_count:.1%} of the teacher's {teacher_count:,}"
    )
    if len(scores) > 1:
        others = ", ".join(f"{name} {score:.3f}" for name, score in scores.items() if name != best)
        progress.say(
            f"{best} is saved: its log-likelihood on the validation split is the best, {scores[best]:.3f} ({others})"
        )
    with progress.stage("evaluate", len(fitted)) as advance:
        rows = []
        for name, method in fitted.items():
            rows.append(_evaluate(context, name, method))
            advance(1)
    # Of several processes the first one writes; transformers saves no model in the others.
    metrics = {} if _rank() else write_run(context, progress, folder, best, students, tuple(rows))
    return DistillResult(Path(config.output_dir).expanduser(), best, tuple(rows), metrics)


def _labels_sentence(data: RunData) -> str:
    splits, tested = data.splits, data.target.test.size
    ignored = f"{splits.labels_ignored:,} more are ignored" if splits.labels_ignored else "none is ignored"
    return (
        f"{splits.labels_used:,} target labels are used: {len(splits.train):,} to train, {len(splits.reward):,} to "
        f"reward the selector, {len(splits.validation):,} to choose the model; {ignored}, {tested:,} others test it"
    )


def _fit_methods(context: "RunContext") -> dict[str, "FittedMethod"]:
    from l2a.pipeline.methods import compared_methods

    methods, fitted = compared_methods(context.config), {}
    for number, method in enumerate(methods, 1):
        context.progress.say(f"[{number}/{len(methods)}] {method.name}: {method.help}")
        started = time.monotonic()
        fitted[method.name] = method.fit(context)
        context.progress.event("fitted", row=method.name, row_seconds=round(time.monotonic() - started, 3))
    return fitted


def _evaluate(context: "RunContext", name: str, fitted: "FittedMethod") -> "MethodReport":
    from l2a.evaluation.metrics import classification_metrics, measure_latency
    from l2a.pipeline.methods import evaluate_method
    from l2a.report import MethodReport

    result = evaluate_method(context, name, fitted, 0.0)
    rng = np.random.default_rng([context.config.seed, 3])
    metrics = classification_metrics(result.labels, result.predictions, len(result.label_names), rng)
    few = context.data.target_labels.inputs[:64]
    return MethodReport(name, metrics, fitted.parameters, measure_latency(fitted.predict, few, fitted.module))


def write_run(
    context: "RunContext",
    progress: RunProgress,
    folder: Path,
    best: str,
    students: Mapping[str, "TrainedStudent"],
    rows: tuple["MethodReport", ...],
) -> dict[str, Any]:
    """Write student, selector, candidates, metrics and model card.

    Args:
        context: The run.
        progress: Knows how long each stage took.
        folder: Where to write; it takes its final name later.
        best: The student to save.
        students: All students by the name of their method, "l2a_student" among them.
        rows: The comparison.

    Returns:
        The content of ``metrics.json``.

    Raises:
        RunError: If the exported student does not reproduce the trained one.
    """
    from l2a.report import check_parity, export_student, metrics_content, model_card, write_augmentations

    config, data, student, rounds = context.config, context.data, students[best].student, students["l2a_student"].rounds
    student.model.to("cpu")
    facts = {
        "student": best,
        "validation_log_likelihood": {name: trained.validation_log_likelihood for name, trained in students.items()},
        "parameter_share": student.parameters_count / context.teacher.parameters_count,
        "labels_used": data.splits.labels_used,
        "labels_ignored": data.splits.labels_ignored,
        "seconds_by_stage": {name: round(value, 3) for name, value in progress.seconds_by_stage.items()},
        "seed": config.seed,
        "command": _command(),
        "rounds": [{"generator": asdict(done.chains), "selector": dict(done.selection.diagnostics)} for done in rounds],
        "files": data.files,
    }
    metrics = metrics_content(rows, facts)
    card, own_card = (
        model_card(config, data.label_names, data.target.is_pair, rows, metrics, place) for place in ("student", ".")
    )
    export_student(student.model, student.tokenizer, folder / "student", own_card, config.max_length)
    probe = data.target_labels.inputs[:32]
    parity = check_parity(student.model, student.tokenizer, folder / "student", probe, config.max_length)
    metrics["export_logit_difference"] = parity
    atomic_write_text(folder / "README.md", card)
    write_augmentations(folder / "augmentations.parquet", [(done.pool, done.selection) for done in rounds])
    _write_selector(folder / "selector", config, rounds)
    atomic_write_text(folder / "metrics.json", to_json(metrics, indent=1) + "\n")
    atomic_write_text(folder / "config.yaml", as_yaml(config))
    return metrics


def _write_selector(folder: Path, config: DistillConfig, rounds: tuple["Round", ...]) -> None:
    from l2a.selector.network import save_policy

    last, diagnostics = rounds[-1].selection, [dict(done.selection.diagnostics) for done in rounds]
    if last.policy is not None:  # it replaces the folder, so it comes first
        save_policy(last.policy, folder, _policy_facts(config, diagnostics))
    facts = {"agent": last.agent, "rounds": diagnostics}
    atomic_write_text(folder / "selection.json", to_json(facts, indent=1) + "\n")


def _policy_facts(config: DistillConfig, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    from l2a.pipeline.policies import open_policy, training_facts

    used = {"used_in_the_last_round": rounds[-1].get("chosen", "learned policy")}
    if "reward_curve" not in rounds[-1]:  # a policy that was trained elsewhere
        return {**open_policy(config.selector.agent)[1], **used}
    # Each round trains on where the one before it ended.
    curve = [value for known in rounds for value in known["reward_curve"]]
    steps = sum(known["training_steps"] for known in rounds)
    return {**training_facts([config], steps, rounds[-1]["steps_per_second"], curve), **used}


def _command() -> str:
    return shlex.join(["l2a", *sys.argv[1:]]) if Path(sys.argv[0]).name in ("l2a", "__main__.py") else "l2a.distill"
