"""``l2a augment``: runs one operator on a file of texts, apart from any distillation."""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Literal

import numpy as np

from l2a.config import Columns, GeneratorConfig, resolve_degree
from l2a.data.domains import read_unlabelled
from l2a.data.examples import TextInput
from l2a.data.readers import FLAG, SUFFIXES, read_table, texts_of
from l2a.generator.operators import OPERATORS, TEXT_OPERATORS, build_operator, draw_changes
from l2a.generator.tokens import (
    FROZEN,
    Ints,
    Slots,
    TokenSpace,
    TokenStore,
    build_neighbour_table,
    changed_shares,
    vocabulary,
)
from l2a.generator.words import MaskedCandidates, MaskedLanguageModel
from l2a.kd.trainer import embedding_gradients
from l2a.student.student import load_checkpoint
from l2a.teacher.labelling import cached_labeller
from l2a.teacher.model import EMBEDDED, load_encoder, load_fine_tuned, load_masked_language_model, open_checkpoint
from l2a.util.errors import UsageError, did_you_mean
from l2a.util.files import atomic_file
from l2a.util.progress import SILENT, Progress
from l2a.util.training import best_device

OUTPUT_SUFFIXES = (".jsonl", ".parquet")
SOURCE_FLAG = "--source-{}-column"
PARSED_AT_ONCE = 1 << 25
TOKENIZED_AT_ONCE = 200_000
"""Texts of input and source that token operators keep tokenized (about 1 kB each); of more, a batch at a time."""
ENCODE = json.JSONEncoder(ensure_ascii=False).encode
LineMaker = Callable[[Ints, Ints, np.random.Generator], bytes]
"""From the numbers of input texts and of their partners to lines of JSON."""


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
        columns: Columns of the input's texts; that of labels is not read.
        source_columns: Likewise, of a file that ``source`` names.
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
    columns: Columns = field(default_factory=Columns)
    source_columns: Columns = field(default_factory=Columns)

    def __post_init__(self) -> None:
        """Check the request before anything is read."""
        if self.operator not in OPERATORS:
            known = ", ".join(f"{name} ({OPERATORS[name].help})" for name in TEXT_OPERATORS)
            raise UsageError(f"--operator is {self.operator!r}{did_you_mean(self.operator, OPERATORS)}; give {known}")
        if self.operator not in TEXT_OPERATORS:
            raise UsageError(
                f"--operator {self.operator} changes a student's inputs while it is trained and makes no texts; "
                "set generator.operator in a distillation instead"
            )
        for name, least in (("copies", 1), ("seed", 0), ("batch_size", 1), ("max_length", 8)):
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise UsageError(f"--{option} is {getattr(self, name)}; give a whole number of at least {least}")
        if not (self.degree in (None, "auto") or 0 < float(self.degree or 0) <= 1):
            raise UsageError(f'--degree is {self.degree}; give "auto" or a share above 0 and at most 1')
        if self.operator == "source" and self.source is None:
            raise UsageError("--operator source copies texts of another domain; name it by --source")
        self._check_output()

    def _check_output(self) -> None:
        if self.output.suffix.lower() not in OUTPUT_SUFFIXES or self.output.is_dir():
            raise UsageError(f"output {self.output} cannot be written; name a .jsonl or a .parquet file")
        if not self.output.exists():
            return
        for read in (self.input, Path(self.source or "").expanduser()):
            if read.is_file() and read.samefile(self.output):
                raise UsageError(f"output {self.output} is read by the same command; name another file as the output")
        if not self.overwrite:
            raise UsageError(f"output {self.output} exists; add --overwrite to replace it")


def augment_file(job: AugmentJob, progress: Progress = SILENT) -> int:
    """Run a job; the output appears whole, at the end.

    Args:
        job: The request.
        progress: Shows the texts done.

    Returns:
        Texts written.

    Raises:
        UsageError: If input, source or models do not suit the request.
        RunError: If a download fails or the output cannot be written.
    """
    inputs = source = _read(job.input, job.columns, FLAG)
    if job.source is not None:
        file = Path(job.source).expanduser()
        is_file = file.is_file()
        source = _read(file, job.source_columns, SOURCE_FLAG) if is_file else read_unlabelled(job.source)[0]
    _refuse_unlike(inputs, source, job)
    degree, total = _degree(job, len(inputs)), job.copies * len(inputs)
    with atomic_file(job.output) as output, TemporaryFile() as temporary:
        make = _line_maker(job, degree, inputs, source, progress)
        is_parquet = job.output.suffix.lower() == ".parquet"
        with progress.stage("augment", total) as advance:
            for start in range(0, total, job.batch_size):
                # The number of the batch seeds it, so that it does not matter what ran before.
                rng = np.random.default_rng([job.seed, start // job.batch_size])
                rows = np.arange(start, min(start + job.batch_size, total)) % len(inputs)
                partners = rng.integers(0, len(source), size=len(rows))
                (temporary if is_parquet else output).write(make(rows, partners, rng))
                advance(len(rows))
        if is_parquet:
            temporary.seek(0)
            _write_parquet(temporary, output)
    return total


def _read(path: Path, columns: Columns, flag: str) -> tuple[TextInput, ...]:
    return texts_of(read_table(path, (".txt", *SUFFIXES)), columns, flag)


def _refuse_unlike(inputs: Sequence[TextInput], source: Sequence[TextInput], job: AugmentJob) -> None:
    sides = {len(text) for text in inputs}
    if len(sides) > 1:
        raise UsageError(f"input {job.input}: single texts and pairs are mixed; give one kind in a file")
    if sides != {len(text) for text in source}:
        raise UsageError(
            f"--source {job.source}: single texts cannot be mixed with pairs; give a source like the input"
        )


def _degree(job: AugmentJob, texts: int) -> float:
    operator = OPERATORS[job.operator]
    if operator.works_on == "copies":
        return 0.0
    if job.degree is None and operator.default_degree is not None:
        return operator.default_degree
    return resolve_degree(GeneratorConfig().degree if job.degree is None else job.degree, texts)


def _line_maker(
    job: AugmentJob, degree: float, inputs: Sequence[TextInput], source: Sequence[TextInput], progress: Progress
) -> LineMaker:
    operator = OPERATORS[job.operator]
    if operator.works_on == "tokens" and len(inputs) + len(source) <= TOKENIZED_AT_ONCE:
        space = token_space(job, progress)
        with progress.stage("tokenize"):
            store = space.tokenize([*inputs, *(source if source is not inputs else ())])
        first, write = len(inputs) if source is not inputs else 0, TokenLines(store, job, degree)
        return lambda rows, partners, rng: write(*draw_changes(operator, store, rows, first + partners, degree, rng))
    rewrite = build_operator(
        job.operator,
        lambda: token_space(job, progress),
        lambda: masked_language_model(job.teacher, job.max_length, progress),
        progress,
    )

    def lines(rows: Ints, partners: Ints, rng: np.random.Generator) -> bytes:
        made = rewrite([inputs[i] for i in rows], [source[i] for i in partners], degree, rng)
        origins = partners if job.operator == "source" else rows
        return "".join(
            _head(text) + _middle(origin, job, degree) + _tail(share, job)
            for (text, share), origin in zip(made, origins.tolist(), strict=True)
        ).encode()

    return lines


def _head(text: TextInput) -> str:
    return f'{{"text": {ENCODE(text[0])}, "text_pair": {ENCODE(text[1]) if len(text) > 1 else "null"}'


def _middle(origin: int, job: AugmentJob, degree: float) -> str:
    return f', "origin": {origin}, "operator": "{job.operator}", "degree": {degree}, "changed_share": '


def _tail(share: float, job: AugmentJob) -> str:
    return f'{round(share, 6)}, "seed": {job.seed}}}\n'


class TokenLines:
    """Writes texts of which some tokens change, a whole batch at once: cuts the lines of the texts as they are."""

    def __init__(self, store: TokenStore, job: AugmentJob, degree: float) -> None:
        """Write the lines of all texts, as they are, and note where their open tokens stand.

        Args:
            store: The texts.
            job: What all lines say.
            degree: Likewise.
        """
        self._store, self._tail = store, cache(lambda share: _tail(share, job).encode())
        escape = cache(lambda text: ENCODE(text)[1:-1].encode())
        self._surfaces = [escape(surface) for surface in store.space.surfaces]
        pieces: list[bytes] = []
        lines, places = [0], np.zeros(len(store.ids), np.int64)
        for row, text in enumerate(store.inputs):
            mine = np.arange(store.starts[row], store.starts[row + 1])
            for number, side in enumerate(text):
                pieces.append(b', "text_pair": "' if number else b'{"text": "')
                opened = mine[(store.segments[mine] == number) & (store.slots[mine] != FROZEN)]
                places[opened] = len(pieces) + 1 + 2 * np.arange(len(opened))
                cuts = [0, *store.spans[opened].ravel().tolist(), len(side)]
                pieces += [escape(side[start:end]) for start, end in itertools.pairwise(cuts)]
                pieces.append(b'"')
            pieces.append(("" if number else ', "text_pair": null').encode() + _middle(row, job, degree).encode())
            lines.append(len(pieces))
        bounds = np.cumsum([0, *map(len, pieces)])
        self._content, self._lines = b"".join(pieces), bounds[lines]
        self._starts, self._ends = bounds[places], bounds[places + 1]

    def __call__(self, slots: Slots, tokens: Ints) -> bytes:
        """Write a batch.

        Args:
            slots: Places in B texts.
            tokens: int64 (K,), what comes into them.

        Returns:
            B lines.
        """
        is_new = tokens != self._store.ids[slots.places]
        owners, places, size = slots.owners[is_new], slots.places[is_new], len(slots.rows)
        # What is kept and what is new take turns: before each new token, and before the end of each line.
        token_turns = np.arange(len(owners)) + owners
        tail_turns = np.bincount(owners, minlength=size).cumsum() + np.arange(size)
        begins, ends = np.empty((2, len(owners) + size), np.int64)
        begins[[0, *tail_turns[:-1] + 1]], ends[tail_turns] = self._lines[slots.rows], self._lines[slots.rows + 1]
        begins[token_turns + 1], ends[token_turns] = self._ends[places], self._starts[places]
        new = np.empty(len(begins), dtype=object)
        new[token_turns] = [self._surfaces[token] for token in tokens[is_new].tolist()]
        new[tail_turns] = list(map(self._tail, changed_shares(slots, tokens).tolist()))
        kept = [self._content[begin:end] for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]
        return b"".join(itertools.chain.from_iterable(zip(kept, new.tolist(), strict=True)))


def token_space(job: AugmentJob, progress: Progress = SILENT) -> TokenSpace:
    """Load tokens, word embeddings and, where needed, neighbours and gradients.

    Args:
        job: The request.
        progress: Shows downloads and the search for neighbours.

    Returns:
        The student's space for an operator that needs gradients, else the teacher's.

    Raises:
        RunError: If weights cannot be had.
        UsageError: If a model does not suit the operator.
    """
    gradient = None
    if OPERATORS[job.operator].needs_gradient:
        if job.student is None or job.teacher == EMBEDDED:
            raise UsageError(
                f"--operator {job.operator} needs two classifiers with the same labels; name both, by --teacher and "
                "--student, or use knn"
            )
        names = open_checkpoint("--student", job.student, progress).label_names
        teacher = load_fine_tuned(job.teacher, names, progress).to(best_device())
        labeller = cached_labeller(teacher, job.max_length, progress)
        student = load_checkpoint(job.student, names)
        student.model.to(best_device()).eval()
        tokenizer, embeddings = student.tokenizer, student.word_embeddings()

        def gradient(texts: Sequence[TextInput]) -> Any:
            return embedding_gradients(student, labeller, texts, job.max_length)
    else:
        encoder = load_encoder(job.teacher, ("text",), 0, progress)
        tokenizer, embeddings = encoder.tokenizer, encoder.word_embeddings()
    tokens = vocabulary(tokenizer)
    count = GeneratorConfig().neighbours if OPERATORS[job.operator].reads_neighbours else 0  # the search takes seconds
    embeddings = embeddings.cpu()[: len(tokens)]
    return TokenSpace(
        tokenizer, build_neighbour_table(embeddings, tokens, count, progress), embeddings, gradient, job.max_length
    )


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


def _write_parquet(lines: IO[bytes], output: IO[bytes]) -> None:
    import pyarrow
    import pyarrow.json
    import pyarrow.parquet

    kinds = {"text": "string", "text_pair": "string", "origin": "int64", "operator": "string"}
    kinds |= {"degree": "float64", "changed_share": "float64", "seed": "int64"}
    schema = pyarrow.schema([(name, getattr(pyarrow, kind)()) for name, kind in kinds.items()])
    table = pyarrow.json.read_json(
        lines, pyarrow.json.ReadOptions(block_size=PARSED_AT_ONCE), pyarrow.json.ParseOptions(explicit_schema=schema)
    )
    pyarrow.parquet.write_table(table, output)
