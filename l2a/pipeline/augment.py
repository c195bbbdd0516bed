"""Loads what an operator reads of models when it runs on a file, apart from any distillation."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from l2a.config import EMBEDDING_OPERATORS, TEXT_OPERATORS, GeneratorConfig, resolve_degree
from l2a.data.domains import read_unlabelled
from l2a.data.examples import TextInput
from l2a.data.readers import SUFFIXES, read_table, texts_of
from l2a.generator.operators import TokenRewriting, TokenSpace, build_operator
from l2a.generator.tokens import (
    FlatTexts,
    Ints,
    NeighbourTable,
    TokenChanges,
    build_neighbour_table,
    token_kinds,
    vocabulary,
)
from l2a.generator.words import MaskedCandidates, MaskedLanguageModel, Rewrite, TextOperator
from l2a.kd.inference import embedding_gradients
from l2a.student.student import load_checkpoint
from l2a.teacher.labelling import cached_labeller
from l2a.teacher.load import EMBEDDED, load_encoder, load_fine_tuned, load_masked_language_model, open_checkpoint
from l2a.util.cache import fingerprint
from l2a.util.cards import did_you_mean
from l2a.util.errors import UsageError, os_errors_as_run_error
from l2a.util.files import atomic_write_bytes, to_json
from l2a.util.progress import SILENT, Progress
from l2a.util.training import best_device


def masked_language_model(model: str, max_length: int, progress: Progress = SILENT) -> MaskedCandidates | None:
    """Load a masked language model for TinyBERT's recipe.

    Args:
        model: "minilm-l6", a folder, or a Hub id.
        max_length: Longest sequence in tokens.
        progress: Shows the download.

    Returns:
        Its candidates; None when its weights have no masked-LM head.

    Raises:
        RunError: If the weights cannot be had.
        UsageError: If the folder is not a model with a tokenizer, or its vocabulary is not WordPiece.
    """
    loaded = load_masked_language_model(model, progress)
    return MaskedLanguageModel(*loaded, max_length) if loaded else None


def token_space(
    operator: str, teacher: str, student: str | None, max_length: int, progress: Progress = SILENT
) -> TokenSpace:
    """Load tokens, word embeddings and, where needed, neighbours and gradients.

    Args:
        operator: "augpro_mix", "augpro_fgsm" or "knn".
        teacher: An encoder; for augpro_fgsm a classifier.
        student: For augpro_fgsm, a classifier with the teacher's labels.
        max_length: Tokens read of a text.
        progress: Shows downloads and the search for neighbours.

    Returns:
        The space: the student's for augpro_fgsm, else the teacher's.

    Raises:
        RunError: If weights cannot be had.
        UsageError: If a model does not suit the operator.
    """
    if operator == "augpro_fgsm":
        return _gradient_space(teacher, student, max_length, progress)
    encoder = load_encoder(teacher, ("text",), 0, progress)
    embeddings = encoder.word_embeddings()
    table = None if operator == "knn" else _without_neighbours(encoder.tokenizer)
    return _space(encoder.tokenizer, embeddings, table, max_length, progress)


def _space(
    tokenizer: Any, embeddings: torch.Tensor, table: NeighbourTable | None, max_length: int, progress: Progress
) -> TokenSpace:
    tokens = vocabulary(tokenizer)
    embeddings = embeddings.cpu()[: len(tokens)]
    if table is None:
        table = build_neighbour_table(embeddings, tokens, GeneratorConfig().neighbours, progress)
    return TokenSpace(tokenizer, table, embeddings, None, max_length)


def _without_neighbours(tokenizer: Any) -> NeighbourTable:
    """A table that only says which tokens may change: the search for neighbours takes seconds."""
    word_start, allowed = token_kinds(vocabulary(tokenizer))
    none = torch.zeros(len(allowed), 0)
    return NeighbourTable(none.to(torch.int32), none, word_start, allowed)


def _gradient_space(teacher: str, student: str | None, max_length: int, progress: Progress) -> TokenSpace:
    if student is None or teacher == EMBEDDED:
        raise UsageError(
            "--operator augpro_fgsm: it needs two classifiers with the same labels; name both, "
            "by --teacher and --student, or use knn"
        )
    names = open_checkpoint("--student", student, progress).label_names
    labeller = cached_labeller(load_fine_tuned(teacher, names, progress).to(best_device()), max_length, progress)
    model = load_checkpoint(student, names)
    model.model.to(best_device()).eval()
    space = _space(model.tokenizer, model.word_embeddings(), None, max_length, progress)
    return TokenSpace(
        space.tokenizer, space.neighbours, space.word_embeddings,
        lambda inputs: embedding_gradients(model, labeller, inputs, max_length), max_length,
    )  # fmt: skip


Bytes = NDArray[np.uint8]


class LineFormat:
    """Writes the rows of one job; keeps what its lines have in common."""

    def __init__(self, operator: str, degree: float, seed: int) -> None:
        """Fix what all lines say.

        Args:
            operator: Name of the operator.
            degree: Share of tokens that it was to change.
            seed: Of the job.
        """
        self._middle = f', "operator": {to_json(operator)}, "degree": {to_json(degree)}, "changed_share": '
        self._end = f', "seed": {seed}}}\n'
        self._origins: dict[int, bytes] = {}
        self._shares: dict[float, bytes] = {}
        self._heads: _Heads | None = None

    def of_rewrites(self, origins: Sequence[int], made: Sequence[Rewrite]) -> bytes:
        """Write texts.

        Args:
            origins: The text that each was made from, B numbers.
            made: B new texts.

        Returns:
            B lines in UTF-8.
        """
        heads = [_head(rewrite.text).encode() for rewrite in made]
        return self._lines(heads, origins, [rewrite.changed_share for rewrite in made])

    def of_changes(self, origins: Sequence[int], changes: TokenChanges, surfaces: Sequence[str]) -> bytes:
        """Write texts of which some tokens change, without making each text by itself.

        Args:
            origins: The text that each was made from, B numbers.
            changes: Of B texts.
            surfaces: What each token writes into a text, by id.

        Returns:
            B lines in UTF-8.
        """
        if self._heads is None or self._heads.texts is not changes.texts:
            self._heads = _prepare_heads(changes.texts, surfaces)
        return self._lines(_changed_heads(self._heads, changes), origins, changes.shares.tolist())

    def _lines(self, heads: Sequence[bytes], origins: Sequence[int], shares: Sequence[float]) -> bytes:
        for origin in set(origins).difference(self._origins):
            self._origins[origin] = f', "origin": {origin}{self._middle}'.encode()
        for share in set(shares).difference(self._shares):
            self._shares[share] = (to_json(round(share, 6)) + self._end).encode()
        tails = map(self._origins.__getitem__, origins), map(self._shares.__getitem__, shares)
        return b"".join(chain.from_iterable(zip(heads, *tails, strict=True)))


@dataclass(frozen=True, eq=False)
class _Heads:
    """The starts of all lines, with their texts as they are: what changes is cut out and pasted in.

    Attributes:
        texts: The N texts.
        content: uint8, the N starts of lines, then the surfaces of the V tokens.
        starts: int64 (N + 1,), of the starts of lines in ``content``.
        spans: int64 (T, 2), of the tokens of the texts in ``content``.
        surfaces: int64 (V + 1,), of the surfaces in ``content``.
    """

    texts: FlatTexts
    content: Bytes
    starts: Ints
    spans: Ints
    surfaces: Ints


def _head(text: TextInput) -> str:
    first, second = (*text, None)[:2]
    return to_json({"text": first, "text_pair": second})[:-1]


def _prepare_heads(texts: FlatTexts, surfaces: Sequence[str]) -> _Heads:
    heads = [_head(text).encode() for text in texts.inputs]
    words = [_escaped(surface).encode() for surface in surfaces]
    bounds = np.cumsum([0, *map(len, heads), *map(len, words)])
    spans = np.zeros((len(texts.ids), 2), np.int64)
    for row, text in enumerate(texts.inputs):
        tokens = slice(texts.starts[row], texts.starts[row + 1])
        start = int(bounds[row]) + len('{"text": "')
        for number, side in enumerate(text):
            mine = texts.segments[tokens] == number
            offsets = _byte_offsets(side)
            spans[tokens][mine] = start + (offsets[texts.spans[tokens][mine]])
            start += int(offsets[-1]) + len('", "text_pair": "')
    content = np.frombuffer(b"".join([*heads, *words]), np.uint8)
    return _Heads(texts, content, bounds[: len(heads) + 1], spans, bounds[len(heads) :])


def _escaped(text: str) -> str:
    return to_json(text)[1:-1]


def _byte_offsets(side: str) -> Ints:
    """Where each character of a text starts in its JSON, and where the last one ends."""
    if len(side) == len(_escaped(side).encode()):
        return np.arange(len(side) + 1)
    return np.cumsum([0, *(len(_escaped(character).encode()) for character in side)])


def _changed_heads(heads: _Heads, changes: TokenChanges) -> list[bytes]:
    """Cut and paste: before each change what stands since the one before, then the new token."""
    count, rows = len(changes.rows), changes.rows
    # Pieces of text b: kept, new, kept, new ..., kept; so change i of text b is piece 2 i + b + 1 in all.
    new = 2 * np.arange(len(changes.places)) + changes.owners + 1
    last = np.cumsum(2 * changes.counts + 1) - 1
    begins, ends = np.empty((2, len(new) * 2 + count), np.int64)
    begins[new], ends[new] = heads.surfaces[changes.tokens], heads.surfaces[changes.tokens + 1]
    begins[last - 2 * changes.counts] = heads.starts[rows]
    ends[last] = heads.starts[rows + 1]
    ends[new - 1], begins[new + 1] = heads.spans[changes.places].T
    lengths = ends - begins
    bounds = np.cumsum(lengths)
    index = np.repeat(begins - bounds + lengths, lengths)
    index += np.arange(len(index))
    content = heads.content[index].tobytes()
    stops = bounds[last].tolist()
    return [content[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]


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
    with os_errors_as_run_error(job.output), progress.stage("augment", total) as advance:
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
        path: A .txt file or any file that a domain may be.

    Returns:
        The texts, in order.

    Raises:
        UsageError: If the file is missing or something is wrong with it; names the line.
    """
    return texts_of(read_table(path, (".txt", *SUFFIXES)))


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
        lines, pyarrow.json.ReadOptions(block_size=PARSED_AT_ONCE), pyarrow.json.ParseOptions(explicit_schema=schema)
    )
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content
