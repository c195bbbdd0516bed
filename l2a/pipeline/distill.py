"""The main job: everything that can be refused is refused first, bad data before torch is loaded."""

import shlex
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2a.config import DistillConfig, as_yaml, override, settle
from l2a.pipeline.data import load_run_data
from l2a.selector.agents import check_agent
from l2a.util import Checkpoint, Progress, RunError, UsageError, cluster, files, process_count, process_rank

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
    verbosity: int = -1, workers: int | None = None, address: str | None = None, **settings: Any,
) -> DistillResult:  # fmt: skip
    """Run the whole job and write the output folder in one step at the end.

    Args:
        config: The run; None for the defaults.
        target: The target domain in place of ``config.target``: a name or a path, or in memory a list of
            (text, label) or ((first, second), label), a pandas frame or an object of ``datasets``.
        source: The source domain, likewise.
        unlabelled: Text without labels: a name or a path, or in memory a list of texts or pairs, a frame or a dataset.
        verbosity: -1 shows nothing, 0 progress bars on a terminal and what is decided, 1 also every event.
        workers: Processes of a Dask cluster to start on this machine, which label texts with the teacher.
        address: The scheduler of a Dask cluster that runs already, for the same.
        **settings: Fields of ``DistillConfig`` to change, such as ``shots=16`` or ``kd={"rounds": 1}``.

    Returns:
        The rows of the comparison and everything measured.

    Raises:
        UsageError: If the request or the data are wrong, or a finished run would be overwritten.
        RunError: If the run fails; the output folder is as it was then, but for the log.
    """
    given = {"target": target, "source": source, "unlabelled": unlabelled}
    names: dict[str, Any] = {side: str(data) for side, data in given.items() if isinstance(data, str | Path)}
    in_memory = {side: data for side, data in given.items() if data is not None and side not in names}
    names |= {side: f"{side} in memory" for side in in_memory}
    if "unlabelled" in names:
        names["unlabelled"] = (names["unlabelled"],)
    config = settle(override(config or DistillConfig(), {**names, **settings}))
    if process_count() > 1 and (workers, address) != (None, None):
        raise UsageError("--workers, --address: a run in several processes labels in these; leave the options out")
    check_agent(config.selector.agent)
    path = Path(config.output_dir).expanduser().resolve()
    output = files.output_folder(path, "run", config.overwrite)
    # Of several processes only the first one's folder is kept, and only it speaks.
    with tempfile.TemporaryDirectory() if process_rank() else output as place:
        folder = Path(place)
        with Progress(folder / "log.jsonl", -1 if process_rank() else verbosity) as progress:
            try:
                if process_rank() == 0:
                    settings = asdict(config) | {"output_dir": None, "overwrite": None}
                    progress = progress.keeping(Checkpoint(path / files.CHECKPOINT, settings))
                with cluster.open_client(workers, address) as client:
                    return _run(config, in_memory, folder, progress, client)
            except RunError as error:
                raise RunError(f"{error}; the log is {Path(config.output_dir) / files.FAILED_LOG}") from error


def _run(
    config: DistillConfig, in_memory: Mapping[str, Any], folder: Path, progress: Progress, client: Any
) -> DistillResult:
    is_called = Path(sys.argv[0]).name not in ("l2a", "__main__.py")
    command = "l2a.distill" if is_called else shlex.join(["l2a", *sys.argv[1:]])
    progress.event("start", command=command, config=as_yaml(config))
    data = load_run_data(config, progress, in_memory)
    splits, tested = data.splits, data.target.test.size
    ignored = f"{splits.labels_ignored:,} more are ignored" if splits.labels_ignored else "none is ignored"
    judges = f"{len(splits.reward):,} to judge the teacher, {len(splits.validation):,} to choose the model"
    used = f"{splits.labels_used:,} target labels are used: {len(splits.train):,} to train, {judges}"
    progress.say(f"{used}; {ignored}, {tested:,} others test it")
    from l2a.pipeline.run import train_and_write

    student, rows, metrics = train_and_write(config, progress, data, folder, client, command)
    return DistillResult(Path(config.output_dir).expanduser(), student, rows, metrics)
