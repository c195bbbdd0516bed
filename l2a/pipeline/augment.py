"""``l2a augment``: runs one operator on a file of texts, apart from any distillation."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

import numpy as np

from l2a.config import Columns, GeneratorConfig, resolve_degree
from l2a.data.domains import load_domain
from l2a.data.examples import TextInput
from l2a.data.readers import FLAG, SUFFIXES, read_table, texts_of
from l2a.generator.operators import OPERATORS, TEXT_OPERATORS, build_operator, draw_changes
from l2a.generator.tokens import FROZEN, Ints, TokenSpace, TokenStore, build_neighbour_table, changed_shares, vocabulary
from l2a.generator.words import MaskedCandidates, MaskedLanguageModel
from l2a.kd.trainer import embedding_gradients
from l2a.student.student import load_checkpoint
from l2a.teacher import labelling, model
from l2a.util.errors import UsageError, did_you_mean
from l2a.util.files import atomic_file
from l2a.util.progress import SILENT, Progress
from l2a.util.training import best_device

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
        degree: Share of the tokens to change, "auto" to choose it by the number of texts; None: the operator's own.
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
            if (value := getattr(self, name)) < least:
                raise UsageError(f"--{name.replace('_', '-')} is {value}; give a whole number of at least {least}")
        if not (self.degree in (None, "auto") or 0 < float(self.degree or 0) <= 1):
            raise UsageError(f'--degree is {self.degree}; give "auto" or a share above 0 and at most 1')
        if self.operator == "source" and self.source is None:
            raise UsageError("--operator source copies texts of another domain; name it by --source")
        if self.output.suffix.lower() not in (".jsonl", ".parquet") or self.output.is_dir():
            raise UsageError(f"output {self.output} cannot be written; name a .jsonl or a .parquet file")
        for read in (self.input, Path(self.source or "").expanduser()):
            if self.output.exists() and read.is_file() and read.samefile(self.output):
                raise UsageError(f"output {self.output} is read by the same command; name another file as the output")
        if self.output.exists() and not self.overwrite:
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
    inputs = source = texts_of(read_table(job.input, (".txt", *SUFFIXES)), job.columns, FLAG)
    if job.source is not None:
        file = Path(job.source).expanduser()
        if file.is_file():
            table = read_table(file, (".txt", *SUFFIXES))
            source = texts_of(table, job.source_columns, "--source-{}-column")
        else:
            source = load_domain(job.source, progress=progress).train.inputs
    sides = {len(text) for text in inputs}
    if len(sides) > 1:
        raise UsageError(f"input {job.input}: single texts and pairs are mixed; give one kind in a file")
    if sides != {len(text) for text in source}:
        raise UsageError(
            f"--source {job.source}: single texts cannot be mixed with pairs; give a source like the input"
        )
    total, is_parquet = job.copies * len(inputs), job.output.suffix.lower() == ".parquet"
    with atomic_file(job.output) as output, TemporaryFile() as temporary:
        make = _line_maker(job, inputs, source, progress)
        with progress.stage("augment", total) as advance:
            for start in range(0, total, job.batch_size):
                # The number of the batch seeds it, so that it does not matter what ran before.
                rng = np.random.default_rng([job.seed, start // job.batch_size])
                rows = np.arange(start, min(start + job.batch_size, total)) % len(inputs)
                partners = rng.integers(0, len(source), size=len(rows))
                (temporary if is_parquet else output).write(make(rows, partners, rng))
                advance(len(rows))
        if is_parquet:
            import pyarrow.json
            import pyarrow.parquet

            temporary.seek(0)
            reading = pyarrow.json.ReadOptions(block_size=1 << 25)  # bytes, more than any line has
            parsing = pyarrow.json.ParseOptions(pyarrow.schema({"text": "string", "text_pair": "string"}))
            pyarrow.parquet.write_table(pyarrow.json.read_json(temporary, reading, parsing), output)
    return total


def _line_maker(
    job: AugmentJob, inputs: Sequence[TextInput], source: Sequence[TextInput], progress: Progress
) -> LineMaker:
    operator, degree = OPERATORS[job.operator], 0.0
    if operator.works_on != "copies":
        settings = operator.default_degree or GeneratorConfig().degree
        degree = float(resolve_degree(settings if job.degree is None else job.degree, len(inputs)))
    if operator.works_on == "tokens" and len(inputs) + len(source) <= TOKENIZED_AT_ONCE:
        space = _token_space(job, progress)
        with progress.stage("tokenize"):
            store = space.tokenize(inputs if source is inputs else [*inputs, *source])
        return _token_lines(job, degree, store, 0 if source is inputs else len(inputs))
    rewrite = build_operator(
        job.operator,
        lambda: _token_space(job, progress),
        lambda: masked_language_model(job.teacher, job.max_length, progress),
        progress,
    )

    def lines(rows: Ints, partners: Ints, rng: np.random.Generator) -> bytes:
        made = rewrite([inputs[i] for i in rows], [source[i] for i in partners], degree, rng)
        origins = partners if job.operator == "source" else rows
        return b"".join(
            ENCODE({"text": text[0], "text_pair": (*text, None)[1]})[:-1].encode()
            + _origin(row)
            + _end(job, degree, share)
            for (text, share), row in zip(made, origins.tolist(), strict=True)
        )

    return lines


def _origin(row: int) -> bytes:
    return f', "origin": {row}'.encode()


def _end(job: AugmentJob, degree: float, share: float) -> bytes:
    facts = {"operator": job.operator, "degree": degree, "changed_share": round(share, 6), "seed": job.seed}
    return f", {ENCODE(facts)[1:]}\n".encode()


def _token_lines(job: AugmentJob, degree: float, store: TokenStore, first_partner: int) -> LineMaker:
    """Write texts of which some tokens change, a batch at once, from the pieces that their lines are made of."""
    escape, end = cache(lambda text: ENCODE(text)[1:-1].encode()), cache(partial(_end, job, degree))
    surfaces = np.array([escape(surface) for surface in store.space.surfaces], object)
    pieces: list[bytes] = []
    lines, pieces_of = [0], np.zeros(len(store.ids), np.int64)
    for row, text in enumerate(store.inputs):
        mine = np.arange(store.starts[row], store.starts[row + 1])
        for number, side in enumerate(text):
            opened = mine[(store.segments[mine] == number) & (store.slots[mine] != FROZEN)]
            pieces.append(b', "text_pair": "' if number else b'{"text": "')
            pieces_of[opened] = len(pieces) + 1 + 2 * np.arange(len(opened))
            cuts = [0, *store.spans[opened].ravel().tolist(), len(side)]
            pieces += [escape(side[start:stop]) for start, stop in pairwise(cuts)]
            pieces.append(b'"')
        pieces += [b"" if len(text) > 1 else b', "text_pair": null', _origin(row), b""]  # the last one is the end
        lines.append(len(pieces))
    kept, bounds = np.array(pieces, object), np.array(lines)

    def write(rows: Ints, partners: Ints, rng: np.random.Generator) -> bytes:
        slots, new = draw_changes(OPERATORS[job.operator], store, rows, first_partner + partners, degree, rng)
        counts = bounds[rows + 1] - bounds[rows]
        moves = np.cumsum(counts) - bounds[rows + 1]  # from a line's place among all to that in the batch
        batch = kept[np.arange(counts.sum()) - np.repeat(moves, counts)]
        is_new = new != store.ids[slots.places]
        batch[pieces_of[slots.places[is_new]] + moves[slots.owners[is_new]]] = surfaces[new[is_new]]
        batch[np.cumsum(counts) - 1] = list(map(end, changed_shares(slots, new).tolist()))
        return b"".join(batch.tolist())

    return write


def _token_space(job: AugmentJob, progress: Progress) -> TokenSpace:
    """Load the tokens, word embeddings and, where needed, neighbours and gradients of the teacher or the student."""
    operator, length, gradient = OPERATORS[job.operator], job.max_length, None
    reader: Any
    if operator.needs_gradient:
        if job.student is None or job.teacher in model.PACKAGED:
            raise UsageError(
                f"--operator {job.operator} needs two classifiers with the same labels; name both, by --teacher and "
                "--student, or use knn"
            )
        names = model.Checkpoint("--student", job.student, progress).label_names
        teacher = model.load_fine_tuned(job.teacher, names, progress).to(best_device())
        reader = load_checkpoint(job.student, names)
        reader.model.to(best_device()).eval()
        labeller = labelling.cached_labeller(teacher, length, progress)
        gradient = partial(embedding_gradients, reader, labeller, max_length=length)
    else:
        reader = model.load_encoder(job.teacher, ("text",), 0, progress)
    tokens = vocabulary(reader.tokenizer)
    embeddings = reader.word_embeddings().cpu()[: len(tokens)]
    count = GeneratorConfig().neighbours if operator.reads_neighbours else 0  # the search takes seconds
    neighbours = build_neighbour_table(embeddings, tokens, count, progress)
    return TokenSpace(reader.tokenizer, neighbours, embeddings, gradient, length)


def masked_language_model(name: str, max_length: int, progress: Progress = SILENT) -> MaskedCandidates | None:
    """Load a masked language model for TinyBERT's recipe.

    Args:
        name: "minilm-l6", a folder, or a Hub id.
        max_length: Longest sequence in tokens.
        progress: Shows the download.

    Returns:
        Its candidates; None when its weights have no masked-LM head.

    Raises:
        RunError: If the weights cannot be had.
        UsageError: If the folder is not a model with a tokenizer, or its vocabulary is not WordPiece.
    """
    loaded = model.load_masked_language_model(name, progress)
    return MaskedLanguageModel(*loaded, max_length) if loaded else None
