"""Augments a file of texts by one operator, batch by batch, so that an interrupted job goes on where it stopped."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from l2a.cache import fingerprint
from l2a.cards import did_you_mean
from l2a.domains.columns import texts_of_table
from l2a.domains.domain import USUAL_COLUMNS
from l2a.domains.rows import refuse
from l2a.domains.tables import SUFFIXES, read_table
from l2a.domains.unlabelled import read_text_file, read_unlabelled
from l2a.errors import UsageError
from l2a.examples import TextInput
from l2a.files import atomic_write_bytes, full_disk_as_run_error
from l2a.generator.build import build_operator
from l2a.generator.config import EMBEDDING_OPERATORS, TEXT_OPERATORS, GeneratorConfig, resolve_degree
from l2a.generator.rewrite import TextOperator
from l2a.generator.token_rewriting import TokenRewriting
from l2a.pipeline.augment_models import masked_language_model, token_space
from l2a.pipeline.augmented_lines import LineFormat
from l2a.progress import SILENT, Progress

OUTPUT_SUFFIXES = (".jsonl", ".parquet")
COPYING = ("source", "target_only")
RECIPES = {"eda": 0.1, "tinybert": 0.4}
"""The degrees that the papers of these operators state; all others take that of the generator's settings."""
LAYOUT = 1
"""Part of the key of unfinished work: raise it when the rows that a job writes change."""
PARSED_AT_ONCE = 1 << 25
TOKENIZED_AT_ONCE = 200_000
"""Texts of input and source that token operators keep tokenized (about 1 kB each); of more, a batch at a time."""


@dataclass(frozen=True)
class AugmentJob:
    """What to augment, and how.

    Attributes:
        input: A .txt file with one text a line, or a .csv, .tsv, .jsonl or .parquet file with a column of texts.
        output: A .jsonl or .parquet file.
        operator: One of ``TEXT_OPERATORS``.
        degree: Share of the tokens to change, "auto" to choose it by the number of texts, or None for the operator's
            own.
        copies: New texts made of each text.
        seed: Decides every random draw, together with ``batch_size``.
        source: File or domain whose texts are mixed in; None mixes the input's texts with one another.
        teacher: Model that gives word embeddings, masked words or labels.
        student: Classifier that augpro_fgsm turns against the teacher.
        batch_size: Texts in a step.
        max_length: Tokens read of a text.
        overwrite: Replace an existing output.
    """

    input: Path
    output: Path
    operator: str
    degree: Literal["auto"] | float | None = None
    copies: int = 1
    seed: int = 0
    source: str | None = None
    teacher: str = "minilm-l6"
    student: str | None = None
    batch_size: int = 256
    max_length: int = 128
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Check the request before anything is read."""
        if self.operator in EMBEDDING_OPERATORS:
            raise UsageError(
                f"--operator {self.operator}: it changes a student's inputs while it is trained and makes no texts; "
                "set generator.operator in a distillation instead"
            )
        if self.operator not in TEXT_OPERATORS:
            hint = did_you_mean(self.operator, TEXT_OPERATORS)
            raise UsageError(f"--operator {self.operator!r}: unknown{hint}; give one of {', '.join(TEXT_OPERATORS)}")
        for name, least in (("copies", 1), ("seed", 0), ("batch_size", 1), ("max_length", 8)):
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise UsageError(
                    f"--{option}: {getattr(self, name)} came; a whole number of at least {least} is needed"
                )
        if not (self.degree in (None, "auto") or 0 < float(self.degree or 0) <= 1):
            raise UsageError(f'--degree: {self.degree} came; "auto" or a share above 0 and at most 1 is needed')
        if self.output.suffix.lower() not in OUTPUT_SUFFIXES:
            raise UsageError(f"output {self.output}: {self.output.suffix!r} came; name a .jsonl or a .parquet file")
        if self.operator == "source" and self.source is None:
            raise UsageError("--operator source: it copies texts of another domain; name it by --source")
        if self.output.exists() and not self.overwrite:
            raise UsageError(f"output {self.output}: the file exists; add --overwrite to replace it")


def augment_file(job: AugmentJob, progress: Progress = SILENT) -> int:
    """Run a job, going on with an unfinished one of the same request.

    Args:
        job: The request.
        progress: Shows the texts done.

    Returns:
        Texts written.

    Raises:
        UsageError: If input, source or models do not suit the request.
        RunError: If a download fails or the disk is full; what was done is kept for the next run.
    """
    inputs = read_inputs(job.input)
    source = _read_source(job.source) if job.source is not None else inputs
    _refuse_unlike(inputs, source, job)
    degree = _degree(job, len(inputs))
    operator = build_operator(
        job.operator, lambda: token_space(job.operator, job.teacher, job.student, job.max_length, progress),
        lambda: masked_language_model(job.teacher, job.max_length, progress), progress,
    )  # fmt: skip
    make = _batch_maker(job, operator, degree, inputs, source, progress)
    total = job.copies * len(inputs)
    partial = _partial_file(job, degree, inputs, source)
    with full_disk_as_run_error(job.output), progress.stage("augment", total) as advance:
        partial.parent.mkdir(parents=True, exist_ok=True)
        done = _keep_whole_batches(partial, job.batch_size)
        advance(done)
        with partial.open("ab") as file:
            for start in range(done, total, job.batch_size):
                rows = np.arange(start, min(start + job.batch_size, total)) % len(inputs)
                file.write(make(rows, start // job.batch_size))
                file.flush()
                advance(len(rows))
        _publish(partial, job.output)
    return total


def read_inputs(path: Path) -> tuple[TextInput, ...]:
    """Read the texts of a file; labels are not needed and not read.

    Args:
        path: A .txt, .csv, .tsv, .jsonl or .parquet file.

    Returns:
        The texts, in order.

    Raises:
        UsageError: If the file is missing or something is wrong with it; names the line.
    """
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return read_text_file(path)
    if suffix not in SUFFIXES:
        raise UsageError(f"input {path}: {suffix!r} came; give a file that ends in .txt, {', '.join(SUFFIXES)}")
    try:
        texts, problems = texts_of_table(read_table(path), USUAL_COLUMNS)
    except OSError as error:
        raise UsageError(f"input {path}: not readable ({error.strerror}); check the path") from error
    refuse(problems, str(path))
    return tuple(texts)


def _read_source(reference: str) -> tuple[TextInput, ...]:
    path = Path(reference).expanduser()
    return read_inputs(path) if path.is_file() else read_unlabelled(reference)[0]


def _refuse_unlike(inputs: Sequence[TextInput], source: Sequence[TextInput], job: AugmentJob) -> None:
    sides = {len(text) for text in inputs}
    if len(sides) > 1:
        raise UsageError(f"input {job.input}: single texts and pairs are mixed; give one kind in a file")
    if sides != {len(text) for text in source}:
        raise UsageError(
            f"--source {job.source}: single texts cannot be mixed with pairs; give a source like the input"
        )


def _degree(job: AugmentJob, texts: int) -> float:
    if job.operator in COPYING:
        return 0.0
    if job.degree is not None:
        return resolve_degree(job.degree, texts)
    return RECIPES.get(job.operator) or resolve_degree(GeneratorConfig().degree, texts)


def _partial_file(job: AugmentJob, degree: float, inputs: Sequence[TextInput], source: Sequence[TextInput]) -> Path:
    request = {name: value for name, value in asdict(job).items() if name not in ("input", "output", "overwrite")}
    request |= {"degree": degree, "models": [_stamp(job.teacher), _stamp(job.student)]}
    key = fingerprint(LAYOUT, request, list(inputs), list(source) if job.source else None)
    return job.output.parent / f".{job.output.name}.{key}.partial"


def _stamp(model: str | None) -> list[list[Any]]:
    """Tell a model's folder from itself after a change; nothing for what is no folder."""
    folder = Path(model or "").expanduser()
    files = sorted(folder.iterdir()) if model and folder.is_dir() else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _keep_whole_batches(partial: Path, batch_size: int) -> int:
    """Cut off an unfinished line and an unfinished batch; give the number of texts that stay."""
    if not partial.exists():
        return 0
    ends = [0]
    with partial.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                ends.append(ends[-1] + len(line))
    done = (len(ends) - 1) // batch_size * batch_size
    os.truncate(partial, ends[done])
    return done


def _batch_maker(
    job: AugmentJob,
    operator: TextOperator,
    degree: float,
    inputs: Sequence[TextInput],
    source: Sequence[TextInput],
    progress: Progress,
) -> Callable[[NDArray[np.int64], int], bytes]:
    """Give the function from the rows and the number of a batch to its lines.

    The number seeds a batch, so that it does not matter what ran before.
    """
    lines = LineFormat(job.operator, degree, job.seed)
    if isinstance(operator, TokenRewriting) and len(inputs) + len(source) <= TOKENIZED_AT_ONCE:
        with progress.stage("tokenize"):
            texts = operator.tokenize([*inputs, *source])
        bases, others = texts.numbers(inputs), texts.numbers(source)

        def change(rows: NDArray[np.int64], batch: int) -> bytes:
            rng, partners = _draw_partners(job.seed, batch, len(source), len(rows))
            changes = operator.changes(texts, bases[rows], others[partners], degree, rng)
            return lines.of_changes(rows.tolist(), changes, operator.surfaces)

        return change

    def rewrite(rows: NDArray[np.int64], batch: int) -> bytes:
        rng, partners = _draw_partners(job.seed, batch, len(source), len(rows))
        made = operator([inputs[i] for i in rows], [source[i] for i in partners], degree, rng)
        return lines.of_rewrites((partners if job.operator == "source" else rows).tolist(), made)

    return rewrite


def _draw_partners(seed: int, batch: int, count: int, size: int) -> tuple[np.random.Generator, NDArray[np.int64]]:
    rng = np.random.default_rng([seed, batch])
    return rng, rng.integers(0, count, size=size)


def _publish(partial: Path, output: Path) -> None:
    if output.suffix.lower() == ".jsonl":
        os.replace(partial, output)
    else:
        atomic_write_bytes(output, _as_parquet(partial))
    for leftover in output.parent.glob(f".{output.name}.*.partial"):
        leftover.unlink()


def _as_parquet(lines: Path) -> bytes:
    import pyarrow
    import pyarrow.json
    import pyarrow.parquet

    kinds = {"text": "string", "text_pair": "string", "origin": "int64", "operator": "string"}
    kinds |= {"degree": "float64", "changed_share": "float64", "seed": "int64"}
    schema = pyarrow.schema([(name, getattr(pyarrow, kind)()) for name, kind in kinds.items()])
    table = pyarrow.json.read_json(
        lines,
        pyarrow.json.ReadOptions(block_size=PARSED_AT_ONCE),
        pyarrow.json.ParseOptions(explicit_schema=schema),
    )
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content
