"""``l2a augment``: runs one operator on a file of texts, apart from any distillation."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from l2a.config import Columns, GeneratorConfig, resolve_degree
from l2a.data import Ints, TextInput, domains, readers
from l2a.generator.operators import OPERATORS, TEXT_OPERATORS, Operator, build_operator, draw_changes, masked_words
from l2a.generator.tokens import FROZEN, TokenSpace, TokenStore, build_neighbour_table, changed_shares, vocabulary
from l2a.kd.trainer import embedding_gradients
from l2a.student.student import load_checkpoint
from l2a.teacher import labelling, model
from l2a.util import SILENT, Progress, UsageError, did_you_mean, files, training

TOKENIZED_AT_ONCE = 200_000  # texts of input and source that are kept tokenized (about 1 kB each); of more, a batch
MARK = "\ud800"  # half of a surrogate pair, which no text that was read holds
ENCODE = json.JSONEncoder(ensure_ascii=False).encode
Texts = Sequence[TextInput]
# From the numbers of input texts and of their partners to lines of JSON.
LineMaker = Callable[[Ints, Ints, np.random.Generator], bytes]


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
    batch_size: int = 1024
    max_length: int = 128
    overwrite: bool = False
    columns: Columns = readers.USUAL_COLUMNS
    source_columns: Columns = readers.USUAL_COLUMNS

    def __post_init__(self) -> None:
        """Check the request before anything is read."""
        if self.operator not in TEXT_OPERATORS:
            known = ", ".join(f"{name} ({OPERATORS[name].help})" for name in TEXT_OPERATORS)
            reason = ", which changes a student's inputs while it is trained and makes no texts"
            reason = reason if self.operator in OPERATORS else did_you_mean(self.operator, TEXT_OPERATORS)
            raise UsageError(f"--operator is {self.operator!r}{reason}; give {known}")
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
    """Run a job and count the texts written; the output appears whole, at the end.

    A killed job goes on when it is run again.

    Raises:
        UsageError: If input, source or models do not suit the request.
        RunError: If a download fails or the output cannot be written.
    """
    formats = (".txt", *readers.SUFFIXES)
    inputs = source = readers.texts_of(readers.read_table(job.input, formats), job.columns)
    if job.source is not None and (path := Path(job.source).expanduser()).is_file():
        source = readers.texts_of(readers.read_table(path, formats), job.source_columns, "--source-{}-column")
    elif job.source is not None:
        source = domains.load_domain(job.source, progress=progress, flag=domains.OF_A_CARD).train.inputs
    kinds, source_kinds = ({len(text) for text in texts} for texts in (inputs, source))
    if len(kinds) > 1:
        raise UsageError(f"input {job.input}: single texts and pairs are mixed; give one kind in a file")
    if kinds != source_kinds:
        raise UsageError(f"--source {job.source}: its texts are not single or paired like the input's; give such texts")
    total, is_parquet = job.copies * len(inputs), job.output.suffix.lower() == ".parquet"
    request = {name: str(value) for name, value in vars(job).items() if name != "overwrite"}
    sides = (inputs, ()) if source is inputs else (inputs, source)
    request["texts"] = files.fingerprint(*([list(text) for text in side] for side in sides))
    models = (Path(name).expanduser() for name in (job.teacher, job.student) if name)
    request |= {str(file): files.sha256_file(file) for model in models for file in sorted(model.glob("*.[js]*"))}
    with files.growing(job.output, request) as made:
        make = _line_maker(job, inputs, source, progress)
        with progress.stage("augment", total) as advance:
            advance(first := sum(1 for _ in made.file))
            for start in range(first, total, job.batch_size):
                # The number of the batch seeds it, so that it does not matter what ran before.
                rng = np.random.default_rng([job.seed, start // job.batch_size])
                rows = np.arange(start, min(start + job.batch_size, total)) % len(inputs)
                made.append(make(rows, rng.integers(0, len(source), size=len(rows)), rng))
                advance(len(rows))
        if is_parquet:
            from pyarrow import json as arrow_json, parquet, schema

            made.file.seek(0)
            reading = arrow_json.ReadOptions(block_size=1 << 25)  # bytes, more than any line has
            parsing = arrow_json.ParseOptions(schema({"text": "string", "text_pair": "string"}))
            with files.atomic_file(job.output) as output:
                parquet.write_table(arrow_json.read_json(made.file, reading, parsing), output)
        made.flush()
        if not is_parquet:
            Path(made.file.name).replace(job.output)
    return total


def _line_maker(job: AugmentJob, inputs: Texts, source: Texts, progress: Progress) -> LineMaker:
    operator, degree = OPERATORS[job.operator], 0.0
    if operator.works_on != "copies":
        degree = resolve_degree(job.degree or operator.default_degree or GeneratorConfig().degree, len(inputs))

    @cache
    def end(share: float) -> bytes:
        facts = {"operator": job.operator, "degree": degree, "changed_share": round(share, 6), "seed": job.seed}
        return f", {ENCODE(facts)[1:]}\n".encode()

    if operator.works_on == "tokens" and len(inputs) + len(source) <= TOKENIZED_AT_ONCE:
        space = _token_space(job, progress)
        with progress.stage("tokenize"):
            store = space.tokenize(inputs if source is inputs else [*inputs, *source])
        return _token_lines(operator, store, 0 if source is inputs else len(inputs), degree, end)
    masked = partial(masked_words, job.teacher, job.max_length, progress)
    rewrite = build_operator(job.operator, partial(_token_space, job, progress), masked, progress)

    def lines(rows: Ints, partners: Ints, rng: np.random.Generator) -> bytes:
        made = rewrite([inputs[i] for i in rows], [source[i] for i in partners], degree, rng)
        texts = zip(made, (partners if job.operator == "source" else rows).tolist(), strict=True)
        return b"".join(_beginning(text, origin).encode() + end(share) for (text, share), origin in texts)

    return lines


def _beginning(sides: Sequence[str], origin: int) -> str:
    return ENCODE({"text": sides[0], "text_pair": (*sides, None)[1], "origin": origin})[:-1]


def _token_lines(
    operator: Operator, store: TokenStore, first_partner: int, degree: float, end: Callable[[float], bytes]
) -> LineMaker:
    """Write texts of which some tokens change, a batch at once, from the pieces that their lines are made of."""
    as_bytes = cache(str.encode)
    surfaces, pieces = np.array([*map(as_bytes, store.space.surfaces)], object), list[bytes]()
    ends, piece_of = [0], np.zeros(len(store.ids), np.int64)
    for row, text in enumerate(store.inputs):
        mine = np.arange(store.starts[row], store.starts[row + 1])
        opened, marked = mine[store.slots[mine] != FROZEN], []
        for number, side in enumerate(text):
            cuts = store.spans[opened[store.segments[opened] == number]].ravel().tolist()
            marked.append(MARK.join(side[start:stop] for start, stop in pairwise([0, *cuts, len(side)])))
        piece_of[opened] = len(pieces) + 1 + 2 * np.arange(len(opened))
        pieces += [*map(as_bytes, _beginning(marked, row).split(MARK)), b""]  # the last one is the end
        ends.append(len(pieces))
    kept, bounds = np.array(pieces, object), np.array(ends)

    def lines(rows: Ints, partners: Ints, rng: np.random.Generator) -> bytes:
        slots, new = draw_changes(operator, store, rows, first_partner + partners, degree, rng)
        counts = bounds[rows + 1] - bounds[rows]
        moves = np.cumsum(counts) - bounds[rows + 1]  # from a line's place among all to that in the batch
        batch = kept[np.arange(counts.sum()) - np.repeat(moves, counts)]
        is_new = new != store.ids[slots.places]
        batch[piece_of[slots.places[is_new]] + moves[slots.owners[is_new]]] = surfaces[new[is_new]]
        batch[np.cumsum(counts) - 1] = list(map(end, changed_shares(slots, new).tolist()))
        return b"".join(batch.tolist())

    return lines


def _token_space(job: AugmentJob, progress: Progress) -> TokenSpace:
    """Load the tokens, word embeddings and, where needed, neighbours and gradients of the teacher or the student."""
    operator, gradient = OPERATORS[job.operator], None
    reader: Any
    if operator.needs_gradient:
        if job.student is None or job.teacher in model.PACKAGED:
            fix = "name both, by --teacher and --student, or use knn"
            raise UsageError(f"--operator {job.operator} needs two classifiers with the same labels; {fix}")
        names = model.Checkpoint("--student", job.student, progress).label_names
        teacher = model.load_fine_tuned(job.teacher, names, progress).to(training.best_device())
        reader = load_checkpoint(job.student, names)
        reader.model.to(training.best_device())
        labeller = labelling.cached_labeller(teacher, job.max_length, progress)
        gradient = partial(embedding_gradients, reader, labeller, max_length=job.max_length)
    else:
        reader = model.load_encoder(job.teacher, ("text",), 0, progress)
    tokens = vocabulary(reader.tokenizer)
    embeddings = reader.word_embeddings().cpu()[: len(tokens)]
    count = GeneratorConfig().neighbours if operator.reads_neighbours else 0  # the search takes seconds
    neighbours = build_neighbour_table(embeddings, tokens, count, progress)
    return TokenSpace(reader.tokenizer, neighbours, embeddings, gradient, job.max_length)
