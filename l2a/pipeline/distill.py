"""The main job and its data: everything that can be refused is refused first, bad data before torch is loaded."""

import logging
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from l2a.config import DistillConfig, as_yaml, override, settle
from l2a.data import examples
from l2a.data.bank import HELD_OUT, read_bank
from l2a.data.domains import as_domain, load_domain
from l2a.data.examples import Domain, Examples, TargetSplits, TextInput, held_out_words, normalised_hash
from l2a.selector.agents import check_agent
from l2a.util.cluster import open_client
from l2a.util.errors import RunError, UsageError
from l2a.util.files import CHECKPOINT, FAILED_LOG, Checkpoint, output_folder
from l2a.util.progress import SILENT, Progress, process_rank

if TYPE_CHECKING:  # this imports torch, which bad data should not wait for
    from l2a.report.run_folder import MethodReport

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunData:
    """What a run may read.

    Attributes:
        source: Labelled source examples, free of every held-out target text.
        target: The target domain; its test split is opened by the final evaluation alone.
        splits: The few labelled target examples.
        unlabelled: Texts without labels, free of every held-out target text.
        forbidden: Normalised hashes of the target's test, reward and validation texts: none may be trained on.
        files: Names of the files read, with their sha256.
    """

    source: Examples
    target: Domain
    splits: TargetSplits
    unlabelled: Sequence[TextInput]
    forbidden: frozenset[str]
    files: dict[str, str]

    @property
    def label_names(self) -> tuple[str, ...]:
        """The C class names."""
        return self.target.label_names

    @property
    def held_out_labels(self) -> Examples:
        """Labelled target examples that no student and no teacher is trained on: those of reward and validation."""
        return examples.concatenate(self.splits.reward, self.splits.validation)

    @property
    def target_labels(self) -> Examples:
        """All labelled target examples, for methods that need no splits."""
        return examples.concatenate(self.splits.train, self.splits.reward, self.splits.validation)


def load_run_data(
    config: DistillConfig, progress: Progress = SILENT, in_memory: Mapping[str, Any] = MappingProxyType({})
) -> RunData:
    """Read both domains and draw the few labels.

    Args:
        config: Names the domains, the shots and the seed.
        progress: Shows downloads.
        in_memory: Data by side, "source", "target" or "unlabelled", in place of what the configuration names.

    Returns:
        The data.

    Raises:
        UsageError: If a domain cannot be read or the two do not fit together.
        RunError: If a domain cannot be fetched.
    """
    config = settle(config)
    source, target = (_domain(side, config, in_memory, progress) for side in ("source", "target"))
    source, target = examples.align_labels(source, target)
    splits = examples.few_shot_splits(target, config.shots, config.dev_shots, np.random.default_rng([config.seed, 1]))
    held_out = (*splits.reward.inputs, *splits.validation.inputs)
    forbidden = target.test.hashes | {normalised_hash(text) for text in held_out}
    _refuse_same_texts(source, target)
    words = target.test.words | held_out_words(held_out)
    tested = examples.seen_in(source.train.inputs, forbidden, words)
    if tested.any():
        logger.warning(
            "source: %d of its %d texts are %s and are left out; look where they come from",
            tested.sum(), len(tested), HELD_OUT,
        )  # fmt: skip
    allowed = np.flatnonzero(~tested)
    if config.source_size is not None and config.source_size < len(allowed):
        chosen = np.random.default_rng([config.seed, 6]).choice(len(allowed), config.source_size, replace=False)
        allowed = allowed[np.sort(chosen)]
    learned = source.train.take(allowed)
    examples.warn_of_absent_classes("source", learned)
    sides = [("source", source.files), ("target", target.files)]
    unlabelled: Sequence[TextInput] = ()
    if references := [in_memory["unlabelled"]] if "unlabelled" in in_memory else config.unlabelled:
        bank = read_bank(references, target.is_pair, frozenset(forbidden), config.data_folder, progress, words)
        if HELD_OUT in bank.summary:
            logger.warning(bank.summary)
        else:
            progress.say(bank.summary)
        sides.append(("unlabelled", bank.files))
        unlabelled = bank
    files = {f"{side}: {name}": digest for side, files in sides for name, digest in files.items()}
    return RunData(learned, target, splits, unlabelled, frozenset(forbidden), files)


def _domain(side: str, config: DistillConfig, in_memory: Mapping[str, Any], progress: Progress) -> Domain:
    columns = getattr(config, f"{side}_columns")
    if side in in_memory:
        return as_domain(in_memory[side], side, columns)
    flag = f"--{side}-{{}}-column of l2a distill or {side}_columns in a --config file"
    return load_domain(getattr(config, side), columns, config.data_folder, progress, flag)


def _refuse_same_texts(source: Domain, target: Domain) -> None:
    known = {normalised_hash(text) for text in source.train.inputs}
    shared = sum(normalised_hash(text) in known for text in target.train.inputs)
    if shared > len(target.train) / 2:
        raise UsageError(
            f"source is {source.name!r}, which holds {shared} of the {len(target.train)} training texts of the target "
            "with their labels, so that the labels would not be few; give another source"
        )


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
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and (workers, address) != (None, None):
        raise UsageError("--workers, --address: a run in several processes labels in these; leave the options out")
    check_agent(config.selector.agent)
    path = Path(config.output_dir).expanduser().resolve()
    output = output_folder(path, "run", config.overwrite)
    # Of several processes only the first one's folder is kept, and only it speaks.
    with tempfile.TemporaryDirectory() if process_rank() else output as place:
        folder = Path(place)
        with Progress(folder / "log.jsonl", -1 if process_rank() else verbosity) as progress:
            try:
                if process_rank() == 0:
                    settings = asdict(config) | {"output_dir": None, "overwrite": None}
                    progress = progress.keeping(Checkpoint(path / CHECKPOINT, settings))
                with open_client(workers, address) as client:
                    return _run(config, in_memory, folder, progress, client)
            except RunError as error:
                raise RunError(f"{error}; the log is {Path(config.output_dir) / FAILED_LOG}") from error


def _run(
    config: DistillConfig, in_memory: Mapping[str, Any], folder: Path, progress: Progress, client: Any
) -> DistillResult:
    progress.event("start", command=command(), config=as_yaml(config))
    with progress.stage("read the domains"):
        data = load_run_data(config, progress, in_memory)
    splits, tested = data.splits, data.target.test.size
    ignored = f"{splits.labels_ignored:,} more are ignored" if splits.labels_ignored else "none is ignored"
    progress.say(
        f"{splits.labels_used:,} target labels are used: {len(splits.train):,} to train, {len(splits.reward):,} to "
        f"judge the teacher, {len(splits.validation):,} to choose the model; {ignored}, {tested:,} others test it"
    )
    from l2a.pipeline.run import train_and_write

    return train_and_write(config, progress, data, folder, client)


def command() -> str:
    """Say what started this run: the command line, or that it was a call."""
    return shlex.join(["l2a", *sys.argv[1:]]) if Path(sys.argv[0]).name in ("l2a", "__main__.py") else "l2a.distill"
