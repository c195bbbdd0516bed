"""A finished student as a scikit-learn classifier, from PyTorch or ONNX: for texts, files of them and labelled ones."""

import csv
import gzip
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import pyarrow.parquet
from scipy import optimize, special
from sklearn.base import BaseEstimator, ClassifierMixin

from l2a.config import Columns
from l2a.data import Doubles, Floats, Ints, TextInput, concatenate, domains, readers
from l2a.util import SILENT, Progress, UsageError, cluster, did_you_mean, files, sha256_file

if TYPE_CHECKING:
    from l2a.evaluation.metrics import ClassificationMetrics

TEMPERATURES = (0.05, 20.0)  # ends of what is searched: few labels that are all right would ask for a temperature of 0
# Texts are cut at some hundred tokens, so that characters beyond the longest cost nothing.
CHARACTERS_PER_BATCH, LONGEST = 8192, 2048
MODEL_FILES = (".json", ".model", ".onnx", ".safetensors", ".txt")  # of these types is what decides a student's answers
FIELDS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
ON_INPUT = (*readers.DELIMITERS, ".jsonl", ".txt")
WRITTEN = (*readers.DELIMITERS, ".jsonl", ".parquet")
ON_OUTPUT = {".txt": ".tsv", ".parquet": ".jsonl"}  # what standard output gets of these
Rows = Sequence[Mapping[str, Any]]
# Without the time of writing, so that the same rows give the same bytes.
PACKERS: Mapping[str, Any] = {**readers.PACKED, ".gz": lambda raw, mode: gzip.GzipFile("", mode, fileobj=raw, mtime=0)}
Pieces = Iterator[tuple[list[readers.Record], Any]]  # lines, with the texts among them or the answers to these


class Engine(NamedTuple):
    """An opened student.

    Attributes:
        folder: Where it is.
        model: Of transformers, or a session of onnxruntime.
        names: The C class names, in the order of the logits.
        temperature: What the folder's ``l2a.json`` says that logits are to be divided by, else 1.
        tokenizer: Pads, and cuts at what the model reads; of the ``tokenizers`` library.
        read: Those of ``FIELDS`` that the model reads.
        run: Gives one array, the float32 logits (B, C), for what the model reads, int64 (B, L).
    """

    folder: Path
    model: Any
    names: tuple[str, ...]
    temperature: float
    tokenizer: Any
    read: Sequence[str]
    run: Callable[[dict[str, Ints]], Sequence[Floats]]


def open_student(student: str | Path, threads: int | None = None) -> Engine:
    """Open a student: the model with its tokenizer.

    Args:
        student: A student folder, a run folder, an ONNX folder (its model.onnx is read) or an .onnx file in one.
        threads: Threads of ONNX; by default OMP_NUM_THREADS, which PyTorch follows as well, or all cores.

    Raises:
        UsageError: If there is no model or it cannot be read.
        ImportError: If onnxruntime, of the extra "export", is missing.
    """
    path = Path(student).expanduser()
    if not (path / "config.json").is_file() and (path / "student").is_dir():
        path = path / "student"
    file = path if path.suffix == ".onnx" else path / "model.onnx"
    folder = file.parent
    is_torch = file != path and any(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not (is_torch or file.is_file()):
        kinds = "give a student folder, a run folder or an exported ONNX folder"
        raise UsageError(f"student {str(student)!r}: there is no config.json with a model beside it; {kinds}")
    return _open_torch(folder) if is_torch else _open_onnx(file, threads)


def _open_torch(folder: Path) -> Engine:
    from transformers import AutoModelForSequenceClassification

    from l2a.teacher.model import Checkpoint, usable_positions
    from l2a.util.training import best_device

    checkpoint = Checkpoint("student", str(folder))
    model = checkpoint.load(AutoModelForSequenceClassification).to(best_device())
    fitted, tokenizer = checkpoint.tokenizer, checkpoint.tokenizer.backend_tokenizer
    tokenizer.enable_truncation(min(fitted.model_max_length, usable_positions(model) or fitted.model_max_length))
    tokenizer.enable_padding(pad_id=fitted.pad_token_id, pad_token=fitted.pad_token)
    read = [name for name in FIELDS if name in fitted.model_input_names]
    run = partial(run_torch, model)
    return Engine(folder, model, checkpoint.label_names, read_temperature(folder), tokenizer, read, run)


def run_torch(model: Any, batch: Mapping[str, Ints]) -> Sequence[Floats]:
    """Run a model of transformers as ``Engine.run`` says."""
    import torch

    with torch.inference_mode():
        given = {name: torch.from_numpy(values).to(model.device) for name, values in batch.items()}
        return [model(**given).logits.cpu().numpy()]


def _open_onnx(file: Path, threads: int | None) -> Engine:
    import onnxruntime
    from tokenizers import Tokenizer

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0")) if threads is None else threads
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        named = json.loads((file.parent / "config.json").read_text("utf-8"))["id2label"]
        names = tuple(str(named[key]) for key in sorted(named, key=int))
        tokenizer = Tokenizer.from_file(str(file.parent / "tokenizer.json"))
    except Exception as error:  # onnxruntime and tokenizers raise errors of many types
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"student {str(file)!r} cannot be read ({reason}); write it again by l2a export") from error
    read, run = [one.name for one in session.get_inputs()], partial(session.run, ["logits"])
    return Engine(file.parent, session, names, read_temperature(file.parent), tokenizer, read, run)


class Classifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A finished student, opened when it is first used; ``classes_`` are sorted, as scikit-learn wants them."""

    def __init__(self, student: str | Path, threads: int | None = None) -> None:
        """Remember a student; the arguments are those of ``open_student``."""
        self.student = student
        self.threads = threads

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Open a student folder, a run folder, an exported ONNX folder or an .onnx file.

        Raises:
            UsageError: If there is no student or it cannot be read.
        """
        classifier = cls(folder)
        classifier.engine  # noqa: B018
        return classifier

    @cached_property
    def engine(self) -> Engine:
        """The model."""
        return open_student(self.student, self.threads)

    @cached_property
    def classes_(self) -> np.typing.NDArray[Any]:
        """The C class names, sorted."""
        return np.array(sorted(self.engine.names))

    def fit(self, texts: Any = None, labels: Any = None) -> Self:
        """Return itself: it is trained already, and pipelines ask for this method."""
        return self

    def predict(self, texts: Iterable[Any]) -> np.typing.NDArray[Any]:
        """Classify texts, strings or pairs of them; gives one of ``classes_`` for each."""
        return np.asarray(self.classes_[self.predict_proba(texts).argmax(axis=1)])

    def predict_proba(self, texts: Iterable[Any]) -> Doubles:
        """Compute calibrated probabilities, float64 (N, C), in the order of ``classes_``."""
        logits = run(self.engine, as_inputs(texts)).astype(np.float64)
        logits = logits[:, [self.engine.names.index(str(name)) for name in self.classes_]]
        return np.asarray(special.softmax(logits / self.engine.temperature, axis=1))

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the path instead of the model, which ONNX does not let be pickled."""
        return {"student": Path(self.student).expanduser().resolve(), "threads": self.threads}

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit = not hasattr(self, "student")  # one that distils its student has to
        tags.input_tags.string, tags.input_tags.two_d_array = True, False
        return tags


def run(engine: Engine, inputs: Sequence[TextInput]) -> Floats:
    """Run a model on N texts, all single or all pairs; texts of similar length go together.

    Returns:
        float32 (N, C), in the order of the model's own class names.
    """
    logits = np.zeros((len(inputs), len(engine.names)), np.float32)
    for rows, batch in batches(engine, inputs):
        (logits[rows],) = engine.run(batch)
    return logits


def batches(engine: Engine, inputs: Sequence[TextInput]) -> Iterator[tuple[Ints, dict[str, Ints]]]:
    """Encode texts as a model reads them, those of similar length together; gives the places of each batch too."""
    lengths = np.array([min(LONGEST, sum(map(len, text))) for text in inputs], np.int64)
    order, start = np.argsort(-lengths, kind="stable"), 0
    while start < len(order):
        rows = order[start : start + CHARACTERS_PER_BATCH // max(16, int(lengths[order[start]]))]
        texts = [inputs[row] if len(inputs[row]) == 2 else inputs[row][0] for row in rows]
        encoded = engine.tokenizer.encode_batch_fast(texts)
        yield rows, {name: np.array([getattr(one, FIELDS[name]) for one in encoded]) for name in engine.read}
        start += len(rows)


def as_inputs(texts: Any) -> list[TextInput]:
    """Turn what scikit-learn passes around (lists, arrays, series, frames of one or two columns) into texts.

    Raises:
        UsageError: If an item is no text and no pair of texts, or there are both.
    """
    items = texts.to_numpy() if hasattr(texts, "to_numpy") else texts  # iterating over a frame gives its columns
    inputs = [tuple(item) if np.ndim(item) and len(item) else (item,) for item in items]
    wrong = next((item for item in inputs if len(item) > 2 or not all(isinstance(side, str) for side in item)), None)
    if isinstance(texts, str) or wrong is not None or len({len(item) for item in inputs}) > 1:
        found = f"{texts!r:.40}" if wrong is None else f"{wrong if len(wrong) > 1 else wrong[0]!r:.40}"
        raise UsageError(f"texts are {found}; give a list of strings, or a list of pairs of strings")
    return inputs


def fit_temperature(logits: np.typing.NDArray[np.floating[Any]], labels: Ints) -> float:
    """Fit the temperature that makes labels likeliest (Guo et al., 2017).

    Args:
        logits: float (N, C), of examples that the model was not trained on.
        labels: int64 (N,), their classes.

    Returns:
        The temperature, within ``TEMPERATURES``.
    """

    def loss(log_temperature: float) -> float:
        likelihoods = special.log_softmax(np.asarray(logits, np.float64) / np.exp(log_temperature), axis=1)
        return -float(likelihoods[np.arange(len(labels)), labels].mean())

    return float(np.exp(optimize.minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded").x))


def write_temperature(folder: Path, temperature: float) -> None:
    """Keep a temperature in a student folder's ``l2a.json``."""
    files.write_mark(folder, temperature=temperature)


def read_temperature(folder: Path) -> float:
    """Read the temperature that a student folder keeps; 1 where it keeps none.

    Raises:
        UsageError: If it is no positive number.
    """
    file = folder / files.MARK
    if not file.is_file():
        return 1.0
    with suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):
        if 0 < (temperature := float(json.loads(file.read_text("utf-8"))["temperature"])) < np.inf:
            return temperature
    raise UsageError(f"{file}: temperature is no positive number; write one, or remove the file")


class Counts(NamedTuple):
    """Lines in all, broken ones among them, and those for which the classifier abstained."""

    lines: int
    broken: int
    abstained: int


def predict_file(
    classifier: Classifier, source: Path | None, output: Path | None = None, columns: Columns = readers.USUAL_COLUMNS,
    threshold: float = 0.0, source_format: str = ".txt", progress: Progress = SILENT, client: Any = None,
) -> Counts:  # fmt: skip
    """Classify a file: every line, in order and with its columns, gets a label, its confidence and all probabilities.

    From a file to a file, a killed run goes on with the lines that it had classified when it is run again.

    Args:
        classifier: A student.
        source: The file; None for standard input.
        output: The file to write, of the format that its name says; None for standard output.
        columns: Columns of the texts; found by their usual names when None.
        threshold: Labels of a lower probability stay empty.
        source_format: Of standard input.
        progress: Shows how far it is, and names broken lines, which are kept without a label.
        client: Of Dask, whose workers classify; each opens the student by its path. None for this process.

    Raises:
        UsageError: If the input cannot be read or has no column of texts, or a format is not known; or if a killed run
            with another student, input or setting left its state beside the output.
        RunError: If the output cannot be written.
    """
    name, classes = str(source or "standard input"), classifier.classes_.tolist()
    allowed = (*ON_INPUT, ".parquet") if source else ON_INPUT
    suffix = readers.known_format(source or Path(f"standard input{source_format}"), allowed)
    written = readers.known_format(output, WRITTEN, "written") if output else ON_OUTPUT.get(suffix, suffix)
    lines = broken = abstained = 0
    with progress.stage(f"lines of {name}") as advance:
        windows = readers.windows(readers.read_records(source, suffix, named=False))
        first = next(windows, [])
        kept, sides = _columns(name, first, columns)
        added = ["label", "confidence", *(f"p_{name}" for name in classes)]
        while taken := set(added) & set(kept):
            added = [f"predicted_{name}" if name in taken else name for name in added]
        is_typed = suffix == ".parquet"
        schema = pyarrow.parquet.read_schema(source) if is_typed else pyarrow.schema(dict.fromkeys(kept, "string"))
        for new in added:
            schema = schema.append(pyarrow.field(new, "string" if new == added[0] else "double"))
        keeping: Any = nullcontext()
        if source and source.is_file() and output and hasattr(classifier, "student"):
            models = sorted(path for path in classifier.engine.folder.iterdir() if path.suffix in MODEL_FILES)
            hashes = {f"sha256 of {path}": sha256_file(path) for path in (*models, source)}
            options = {"student": str(classifier.student), **vars(columns), "threshold": threshold}
            keeping = files.growing(output, options | hashes)
        with keeping as made, open_writer(output, written, schema) as write:
            checked = ([_checked(record, sides) for record in window] for window in chain([first], windows))
            pieces = ((records, _inputs(records, sides)) for records in checked)
            answers = cluster.spread(client, Classifier.predict_proba, classifier, pieces)
            for records, probabilities in _continued(made, len(classes), pieces, answers) if made else answers:
                found, rows = iter(probabilities.round(6).tolist()), []
                for number, values, problem in records:
                    shares = [] if problem else next(found)
                    best = max(shares, default=0.0)
                    label = classes[shares.index(best)] if shares and best >= threshold else None
                    new_values = [label, best, *shares] if shares else [None] * len(added)
                    rows.append({**values, **dict(zip(added, new_values, strict=True))})
                    abstained += bool(shares) and label is None
                    if problem:
                        progress.say(f"warning: {name}, line {number}: {problem}")
                write(rows)
                lines, broken = lines + len(records), broken + len(records) - len(probabilities)
                advance(len(records))
    return Counts(lines, broken, abstained)


def _continued(made: files.Growing, classes: int, pieces: Pieces, answers: Pieces) -> Pieces:
    """Give the answers to the first pieces that a killed run left, then the others, which are kept."""
    left = made.size
    while made.file.tell() < left:
        records, inputs = next(pieces)
        yield records, np.frombuffer(made.file.read(8 * classes * len(inputs))).reshape(len(inputs), classes)
    for records, probabilities in answers:
        made.append(probabilities.tobytes())
        yield records, probabilities


def _columns(name: str, window: Sequence[readers.Record], columns: Columns) -> tuple[list[str], list[str]]:
    """The columns of the first lines, and those of the texts among them."""
    table = readers.Table(name, window)
    found, missing = readers.find_columns(table, columns, readers.FLAG, labelled=False)
    if missing:
        reasons = missing if table.columns else [record.problem for record in window[:1]] or ["it is empty; give rows"]
        raise UsageError(f"{name}: {'; '.join(reasons)}")
    return table.columns, [found[role] for role in readers.SIDES if role in found]


def _checked(record: readers.Record, sides: Sequence[str]) -> readers.Record:
    if record.problem:
        return record._replace(values={sides[0]: record.values[""]})
    try:
        for side in sides:
            readers.check_text(side, record.values.get(side))
    except UsageError as error:
        return record._replace(problem=str(error))
    return record


def _inputs(records: Sequence[readers.Record], sides: Sequence[str]) -> list[TextInput]:
    return [tuple(one.values[side] for side in sides) for one in records if not one.problem]


@contextmanager
def open_writer(path: Path | None, suffix: str, schema: Any) -> Iterator[Callable[[Rows], None]]:
    """Give a function that writes rows by column.

    Args:
        path: The file, packed where its name ends so, which appears when all is written; None for standard output.
        suffix: ".csv", ".tsv", ".jsonl" or ".parquet".
        schema: The columns; only ".parquet" keeps types, and only ".jsonl" columns that are not among them.
    """

    def cells(row: Mapping[str, Any]) -> dict[str, Any]:
        return {one.name: _cell(row.get(one.name)) if one.type == "string" else row.get(one.name) for one in schema}

    pack = PACKERS.get(path.suffix.lower()) if path else None
    opened = files.atomic_file(path) if path else nullcontext(sys.stdout.buffer)
    with opened as raw, pack(raw, "wb") if pack else nullcontext(raw) as stream:
        if suffix == ".parquet":
            with pyarrow.parquet.ParquetWriter(stream, schema) as writer:
                yield lambda rows: writer.write_table(pyarrow.Table.from_pylist([*map(cells, rows)], schema))
            return
        # What UTF-8 cannot hold, such as bytes of other encodings, is written as \udcff.
        text = io.TextIOWrapper(stream, "utf-8", "backslashreplace", newline="")
        if suffix == ".jsonl":
            yield lambda rows: text.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        else:
            table = csv.DictWriter(text, schema.names, delimiter=readers.DELIMITERS[suffix], lineterminator="\n")
            table.writeheader()
            yield lambda rows: table.writerows(map(cells, rows))
        text.flush()
        text.detach()


def write_rows(rows: Rows, path: Path) -> None:
    """Write rows as a file of the format that its name says."""
    schema = pyarrow.Table.from_pylist(list(rows)).schema
    with open_writer(path, readers.known_format(path, WRITTEN, "written"), schema) as write:
        write(rows)


def _cell(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value and value.encode("utf-8", "backslashreplace").decode("utf-8")
    return json.dumps(value, ensure_ascii=False, default=str)


class Evaluation(NamedTuple):
    """A student on labelled texts.

    Attributes:
        metrics: Accuracy and macro-F1 with 95 % bootstrap intervals.
        classes: The C class names.
        confusion: int64 (C, C), counts by true and predicted class.
        scores: float64 (C, 3), precision, recall and F1 of each class.
        errors: Wrongly classified texts by column, the most confident first.
    """

    metrics: "ClassificationMetrics"
    classes: tuple[str, ...]
    confusion: Ints
    scores: Doubles
    errors: tuple[Mapping[str, Any], ...]


def evaluate(classifier: Classifier, inputs: Sequence[TextInput], labels: Sequence[str]) -> Evaluation:
    """Measure a student on N labelled texts.

    Raises:
        UsageError: If it does not know one of the labels.
    """
    from l2a.evaluation.metrics import classification_metrics  # which imports torch, as an exported student need not
    from l2a.report.page import class_scores

    classes = classifier.classes_.tolist()
    if unknown := sorted(set(labels) - set(classes)):
        hint = did_you_mean(unknown[0], classes)
        raise UsageError(f"the label {unknown[0]!r} is not a class of the student{hint}; it knows {', '.join(classes)}")
    probabilities, true = classifier.predict_proba(inputs), np.array([classes.index(label) for label in labels])
    predicted, confidence, errors = probabilities.argmax(axis=1), probabilities.max(axis=1), []
    for i in sorted(np.flatnonzero(predicted != true).tolist(), key=lambda i: -confidence[i]):
        answer = {"predicted": classes[predicted[i]], "confidence": round(float(confidence[i]), 6)}
        errors.append({**dict(zip(readers.SIDES, inputs[i], strict=False)), "label": labels[i], **answer})
    metrics = classification_metrics(true, predicted, len(classes), np.random.default_rng(0))
    confusion = np.bincount(true * len(classes) + predicted, minlength=len(classes) ** 2).reshape(-1, len(classes))
    scores = np.array([each[:3] for each in class_scores(confusion)])
    return Evaluation(metrics, tuple(classes), confusion, scores, tuple(errors))


def labelled_texts(
    reference: str, columns: Columns = readers.USUAL_COLUMNS, run: Path | None = None, needed: bool = True
) -> tuple[list[TextInput], list[str]]:
    """Read labelled texts: the test split where the data has one, else all of them.

    Args:
        reference: A file, or anything else that ``load_domain`` reads.
        columns: The columns of a file; found by their usual names when None.
        run: A run folder; of a file that it trained on only the part is read that it tested on.
        needed: Whether a file without labels is refused.

    Returns:
        Texts, and their labels or none.

    Raises:
        UsageError: If something is wrong with the data.
    """
    path, flag = Path(reference).expanduser(), readers.FLAG if needed else domains.OF_A_CARD
    if not path.is_file():
        domain = domains.load_domain(reference, columns, flag=flag)
        examples = domain.test.reveal() if domain.test.size else concatenate(domain.train, domain.dev)
        return list(examples.inputs), [domain.label_names[label] for label in examples.labels]
    table = readers.read_table(path, readers.FORMATS)
    if not needed and "label" not in readers.find_columns(table, columns, readers.FLAG, labelled=True)[0]:
        return list(readers.texts_of(table, flag=flag)), []
    rows, problems = readers.check_table(table, columns)
    readers.refuse(problems, reference)
    if run and table.digest in _files_of(run / "metrics.json"):
        rows = [row._replace(split=row.split or domains.hashed_split(domains.text_key(row.text))) for row in rows]
    rows = [row for row in rows if row.split == "test"] or rows
    return [row.text for row in rows], [row.label for row in rows]


def _files_of(metrics: Path) -> Sequence[str]:
    """The sha256 of the files that a run read, none where there is no run."""
    try:
        return list(json.loads(metrics.read_text("utf-8"))["files"].values()) if metrics.is_file() else ()
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"{metrics}: it is damaged ({error}); run l2a distill again, or move the student") from error
