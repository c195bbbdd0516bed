"""The main job: everything that can be refused is refused first, then methods are trained and the folder is filled."""

import dataclasses
import shlex
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2a.config import DistillConfig, as_yaml, override, settle
from l2a.pipeline.data import load_run_data
from l2a.selector.agents import check_agent, load_agent
from l2a.util.errors import RunError
from l2a.util.files import CHECKPOINT, FAILED_LOG, Checkpoint, output_folder
from l2a.util.progress import Progress, process_rank

if TYPE_CHECKING:  # this imports torch, which bad data should not wait for
    from l2a.report.run_folder import MethodReport


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
    config: DistillConfig | None = None, *, target: Any = None, source: Any = None, unlabelled: Any = None,
    verbosity: int = -1, **settings: Any,
) -> DistillResult:  # fmt: skip
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
    names: dict[str, Any] = {**named, **{side: f"{side} in memory" for side in in_memory}}
    names |= {"unlabelled": (names["unlabelled"],)} if "unlabelled" in names else {}
    config = settle(override(config or DistillConfig(), {**names, **settings}))
    check_agent(config.selector.agent)
    path = Path(config.output_dir).expanduser().resolve()
    output = output_folder(path, "run", config.overwrite)
    # Of several processes only the first one's folder is kept, and only it speaks.
    with tempfile.TemporaryDirectory() if process_rank() else output as place:
        folder = Path(place)
        with Progress(folder / "log.jsonl", -1 if process_rank() else verbosity) as progress:
            try:
                if process_rank() == 0:
                    settings = dataclasses.asdict(config) | {"output_dir": None, "overwrite": None}
                    progress = progress.keeping(Checkpoint(path / CHECKPOINT, settings))
                return _run(config, in_memory, folder, progress)
            except RunError as error:
                raise RunError(f"{error}; the log is {Path(config.output_dir) / FAILED_LOG}") from error


def _run(config: DistillConfig, in_memory: Mapping[str, Any], folder: Path, progress: Progress) -> DistillResult:
    progress.event("start", command=_command(), config=as_yaml(config))
    with progress.stage("read the domains"):
        data = load_run_data(config, progress, in_memory)
    splits, tested = data.splits, data.target.test.size
    ignored = f"{splits.labels_ignored:,} more are ignored" if splits.labels_ignored else "none is ignored"
    progress.say(
        f"{splits.labels_used:,} target labels are used: {len(splits.train):,} to train, {len(splits.reward):,} to "
        f"judge the teacher, {len(splits.validation):,} to choose the model; {ignored}, {tested:,} others test it"
    )
    from l2a.pipeline.methods import compare_methods, warn_of_student, write_run
    from l2a.pipeline.policies import headroom_note, known_headroom
    from l2a.pipeline.session import RunContext

    context = RunContext(config, progress, data)
    with progress.stage("check the models"):
        context.check_models()
    headroom = known_headroom(context) if load_agent(config.selector.agent).rule is None else {}
    if headroom:
        progress.say(f"note: {headroom_note(headroom)} (l2a selector headroom)")
    students, rows, results = compare_methods(context)
    best = next(iter(students))
    for name, trained in students.items():
        best = name if trained.score.beats(students[best].score) else best
    count, teacher_count = students[best].student.parameters_count, context.teacher.parameters_count
    progress.say(
        f"the student has {count:,} parameters, {count / teacher_count:.1%} of the teacher's {teacher_count:,}"
    )
    if len(students) > 1:
        scores = ", ".join(f"{name} {trained.score}" for name, trained in students.items() if name != best)
        progress.say(f"{best} is saved: it follows the teacher best, {students[best].score} ({scores})")
    warn_of_student(context, students[best], results[best])
    # Of several processes the first one writes; transformers saves no model in the others.
    seconds = {name: round(value, 3) for name, value in progress.seconds_by_stage.items()}
    facts = {"student": best, "seconds_by_stage": seconds, "command": _command(), "headroom": headroom or None}
    metrics = {} if process_rank() else write_run(context, facts, folder, students, rows, results)
    return DistillResult(Path(config.output_dir).expanduser(), best, rows, metrics)


def _command() -> str:
    return shlex.join(["l2a", *sys.argv[1:]]) if Path(sys.argv[0]).name in ("l2a", "__main__.py") else "l2a.distill"
