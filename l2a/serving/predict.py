"""Files of texts, classified line by line in flat memory, and a student measured on labelled texts."""

import csv
import io
import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix

from l2a.config import Columns
from l2a.data import domains, readers
from l2a.data.examples import TextInput, concatenate
from l2a.evaluation.metrics import ClassificationMetrics, classification_metrics
from l2a.report.page import class_scores
from l2a.serving.classifier import Classifier
from l2a.util.cluster import spread
from l2a.util.errors import UsageError, did_you_mean
from l2a.util.files import atomic_file
from l2a.util.progress import SILENT, Progress

ON_INPUT = (*readers.DELIMITERS, ".jsonl", ".txt")
WRITTEN = (*readers.DELIMITERS, ".jsonl", ".parquet")
ON_OUTPUT = {".txt": ".tsv", ".parquet": ".jsonl"}  # what standard output gets of these
Rows = Sequence[Mapping[str, Any]]


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
        UsageError: If the input cannot be read or has no column of texts, or a format is not known.
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
        with open_writer(output, written, schema) as write:
            checked = ([_checked(record, sides) for record in window] for window in chain([first], windows))
            pieces = ((records, _inputs(records, sides)) for records in checked)
            for records, probabilities in spread(client, Classifier.predict_proba, classifier, pieces):
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


def _columns(name: str, window: Sequence[readers.Record], columns: Columns) -> tuple[list[str], list[str]]:
    """The columns of the first lines, and those of the texts among them."""
    table = readers.Table(name, window)
    found, missing = readers.find_columns(table, columns, readers.FLAG, labelled=False)
    if missing:
        reasons = missing if table.columns else [record.problem for record in window[:1]] or ["it is empty"]
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

    pack = readers.PACKED.get(path.suffix.lower()) if path else None
    with (
        atomic_file(path) if path else nullcontext(sys.stdout.buffer) as raw,
        pack(raw, "wb") if pack else nullcontext(raw) as stream,
    ):
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

    metrics: ClassificationMetrics
    classes: tuple[str, ...]
    confusion: NDArray[np.int64]
    scores: NDArray[np.float64]
    errors: tuple[Mapping[str, Any], ...]


def evaluate(classifier: Classifier, inputs: Sequence[TextInput], labels: Sequence[str]) -> Evaluation:
    """Measure a student on N labelled texts.

    Raises:
        UsageError: If it does not know one of the labels.
    """
    classes = classifier.classes_.tolist()
    if unknown := sorted(set(labels) - set(classes)):
        hint = did_you_mean(unknown[0], classes)
        raise UsageError(f"the label {unknown[0]!r} is not a class of the student{hint}; it knows {', '.join(classes)}")
    probabilities, true = classifier.predict_proba(inputs), np.array([classes.index(label) for label in labels])
    predicted, confidence, known = probabilities.argmax(axis=1), probabilities.max(axis=1), range(len(classes))
    wrong = sorted(np.flatnonzero(predicted != true), key=lambda i: -confidence[i])
    errors = [
        {**dict(zip(readers.SIDES, inputs[i], strict=False)), "label": labels[i],
         "predicted": classes[predicted[i]], "confidence": round(float(confidence[i]), 6)}
        for i in map(int, wrong)
    ]  # fmt: skip
    metrics = classification_metrics(true, predicted, len(classes), np.random.default_rng(0))
    confusion = confusion_matrix(true, predicted, labels=known)
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
    path = Path(reference).expanduser()
    if not path.is_file():
        domain = domains.load_domain(reference, columns)
        examples = domain.test.reveal() if domain.test.size else concatenate(domain.train, domain.dev)
        return list(examples.inputs), [domain.label_names[label] for label in examples.labels]
    table = readers.read_table(path, readers.FORMATS)
    if not needed and "label" not in readers.find_columns(table, columns, readers.FLAG, labelled=True)[0]:
        return list(readers.texts_of(table)), []
    rows, problems = readers.check_table(table, columns)
    readers.refuse(problems, reference)
    if run and table.digest in _files_of(run / "metrics.json"):
        rows = [row._replace(split=row.split or domains.hashed_split(domains.text_key(row.text))) for row in rows]
    rows = [row for row in rows if row.split == "test"] or rows
    return [row.text for row in rows], [row.label for row in rows]


def _files_of(metrics: Path) -> Collection[str]:
    """The sha256 of the files that a run read, none where there is no run."""
    try:
        return list(json.loads(metrics.read_text("utf-8"))["files"].values()) if metrics.is_file() else ()
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"{metrics}: it is damaged ({error}); run l2a distill again, or move the student") from error
