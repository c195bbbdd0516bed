"""Rows as they come from any reader, and what can be wrong with them."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from l2a.config import Columns
from l2a.data.examples import Examples, TextInput
from l2a.util.cards import did_you_mean
from l2a.util.errors import UsageError

SplitName = Literal["train", "dev", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "dev", "test")


@dataclass(frozen=True)
class DataProblem:
    """One thing that is wrong with a file.

    Attributes:
        file: The file as the user named it.
        line: Line number from 1 (row number in binary formats), or None when the whole file is meant.
        message: What came, what is allowed and the fix.
    """

    file: str
    line: int | None
    message: str

    def __str__(self) -> str:
        """Write the problem as one line that starts with the place."""
        place = self.file if self.line is None else f"{self.file}, line {self.line}"
        return f"{place}: {self.message}"


@dataclass(frozen=True)
class Record:
    """One row of a file before its columns are understood.

    Attributes:
        line: Line number in the file, from 1.
        values: Column name to value as the format gives it.
    """

    line: int
    values: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """The content of one file.

    Attributes:
        file: The file as the user named it.
        columns: Column names in order.
        records: The rows that could be read.
        problems: What could not be read.
    """

    file: str
    columns: tuple[str, ...]
    records: tuple[Record, ...]
    problems: tuple[DataProblem, ...] = ()


@dataclass(frozen=True)
class LabelledRow:
    """One checked example.

    Attributes:
        text: One or two texts.
        label: Name of the class.
        split: The split that the data itself gives, or None.
    """

    text: TextInput
    label: str
    split: SplitName | None


def refuse(problems: Sequence[DataProblem], reference: str) -> None:
    """Stop when anything is wrong with the data.

    Args:
        problems: What was found.
        reference: How the user named the domain.

    Raises:
        UsageError: If there are problems; it shows the first three.
    """
    if not problems:
        return
    shown = "; ".join(map(str, problems[:3]))
    more = f"; and {len(problems) - 3} more (see `l2a domains check {reference}`)" if len(problems) > 3 else ""
    raise UsageError(shown + more)


def to_examples(rows: Sequence[LabelledRow], label_names: tuple[str, ...]) -> Examples:
    """Turn rows into examples.

    Args:
        rows: Checked rows.
        label_names: The class names; each row's label is one of them.

    Returns:
        Examples in the order of the rows.
    """
    index = {name: i for i, name in enumerate(label_names)}
    labels = np.array([index[row.label] for row in rows], dtype=np.int64)
    return Examples(tuple(row.text for row in rows), labels, label_names)


SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
FIELD_LIMIT = 16_000_000  # characters of one csv field; longer ones are refused with their line
STRAY_QUOTE = "a stray quote or an endless field"


def read_table(path: Path, name: str | None = None) -> Table:
    """Read one data file.

    Args:
        path: A file whose suffix is one of ``SUFFIXES``.
        name: How problems name the file; its path by default.

    Returns:
        Records and problems; nothing is raised for bad content.

    Raises:
        OSError: If the file cannot be opened.
    """
    shown = name or str(path)
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path, shown)
    return parse_text(path.read_bytes(), path.suffix.lower(), shown)


def parse_text(data: bytes, suffix: str, file: str) -> Table:
    """Parse the bytes of a .csv, .tsv or .jsonl file.

    Args:
        data: The whole content.
        suffix: The file's suffix in lower case.
        file: How problems name the file.

    Returns:
        Records and problems.
    """
    problems = _byte_problems(data, file)
    if problems:
        return Table(file, (), (), tuple(problems))
    text = data.decode("utf-8-sig")
    if suffix == ".jsonl":
        return _parse_jsonl(text, file)
    if suffix == ".csv":
        return _parse_delimited(text, file, ",", quoted=True)
    # Tab-separated files come both with and without quotes: a stray quote fails the strict reading.
    table = _parse_delimited(text, file, "\t", quoted=True)
    stray_quote = any(problem.message.startswith(STRAY_QUOTE) for problem in table.problems)
    return _parse_delimited(text, file, "\t", quoted=False) if stray_quote else table


def _byte_problems(data: bytes, file: str) -> list[DataProblem]:
    if not data.strip():
        return [DataProblem(file, None, "the file is empty; a header and labelled rows are needed")]
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return [DataProblem(file, 1, "the file is UTF-16; save it as UTF-8")]
    found: list[DataProblem] = []
    for line, content in enumerate(data.split(b"\n"), start=1):
        if b"\0" in content:
            found.append(DataProblem(file, line, "NUL bytes, which no text holds; remove them"))
        try:
            content.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = f"byte 0x{content[error.start]:02x} at column {error.start + 1}"
            found.append(DataProblem(file, line, f"not UTF-8 ({byte}); save the file as UTF-8"))
    return found


def _parse_jsonl(text: str, file: str) -> Table:
    records: list[Record] = []
    problems: list[DataProblem] = []
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        value, message = _parse_object(content)
        if message:
            problems.append(DataProblem(file, line, message))
        else:
            records.append(Record(line, value))
    columns = dict.fromkeys(key for record in records for key in record.values)
    return Table(file, tuple(columns), tuple(records), tuple(problems))


def _parse_object(content: str) -> tuple[dict[str, Any], str]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        return {}, f"not JSON ({error}); write one JSON object a line"
    if not isinstance(value, dict):
        return {}, f"a JSON {type(value).__name__} instead of an object; write one object with its columns a line"
    return value, ""


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lift the csv module's process-wide limit of 131072 characters a field for a moment."""
    before = csv.field_size_limit(FIELD_LIMIT)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parse_delimited(text: str, file: str, delimiter: str, quoted: bool) -> Table:
    lines = io.StringIO(text, newline="")
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=quoted)
    columns: list[str] = []
    records: list[Record] = []
    problems: list[DataProblem] = []
    line = 1
    with _long_fields():
        try:
            for fields in reader:
                if fields and not columns:
                    columns = [field.strip() for field in fields]
                elif fields:
                    _add_record(fields, columns, DataProblem(file, line, ""), records, problems)
                line = reader.line_num + 1
        except csv.Error as error:
            problems.append(DataProblem(file, line, f"{STRAY_QUOTE} ({error}); quote the whole field"))
    problems += _header_problems(columns, file)
    return Table(file, tuple(columns), tuple(records), tuple(problems))


def _add_record(
    fields: list[str], columns: list[str], place: DataProblem, records: list[Record], problems: list[DataProblem]
) -> None:
    assert place.line is not None
    if len(fields) != len(columns):
        message = f"{len(fields)} fields, the header has {len(columns)}; quote texts that hold the separator"
        problems.append(DataProblem(place.file, place.line, message))
    else:
        records.append(Record(place.line, dict(zip(columns, fields, strict=True))))


def _header_problems(columns: list[str], file: str) -> list[DataProblem]:
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        return [
            DataProblem(
                file, 1, f"the header names {', '.join(map(repr, twice))} twice; each column needs its own name"
            )
        ]
    return []


def _read_parquet(path: Path, file: str) -> Table:
    import pyarrow
    import pyarrow.parquet

    if path.stat().st_size == 0:
        return Table(file, (), (), (DataProblem(file, None, "the file is empty; labelled rows are needed"),))
    try:
        content = pyarrow.parquet.ParquetFile(path).read()
        values = content.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        return Table(file, (), (), (DataProblem(file, None, f"not a readable Parquet file ({error}); write it again"),))
    records = tuple(Record(number, value) for number, value in enumerate(values, start=1))
    return Table(file, tuple(content.column_names), records)


TEXT_NAMES = ("text", "sentence", "sentence1", "premise", "question1", "review", "content", "tweet", "document")
PAIR_NAMES = ("text_pair", "sentence2", "hypothesis", "question2")
LABEL_NAMES = ("label", "labels", "class", "category", "sentiment")
SPLIT_NAMES: dict[str, SplitName] = {
    "train": "train",
    "training": "train",
    "dev": "dev",
    "valid": "dev",
    "validation": "dev",
    "val": "dev",
    "test": "test",
    "testing": "test",
}
LONGEST_TEXT = 1_000_000  # characters; tokenisers cut long texts, but not texts that are no texts


@dataclass(frozen=True)
class FoundColumns:
    """The columns that a table is read by.

    Attributes:
        text: Column of the text.
        text_pair: Column of the second text, or None for single sentences.
        label: Column of the label.
        split: Column that names the split, or None.
    """

    text: str
    text_pair: str | None
    label: str
    split: str | None


def rows_of_table(table: Table, columns: Columns) -> tuple[list[LabelledRow], list[DataProblem]]:
    """Check a table and turn it into rows.

    Args:
        table: What a reader gave.
        columns: The columns that the user named.

    Returns:
        The good rows, and everything that is wrong with the table.
    """
    problems = list(table.problems)
    if not table.columns:
        return [], problems or [DataProblem(table.file, None, "no rows; a header and labelled rows are needed")]
    found, missing = find_columns(table, columns)
    if found is None:
        return [], problems + missing
    if not table.records and not problems:
        problems.append(DataProblem(table.file, None, "a header but no rows; labelled rows are needed"))
    rows: list[LabelledRow] = []
    for record in table.records:
        row, message = _check_record(record, found)
        if row is None:
            problems.append(DataProblem(table.file, record.line, message))
        else:
            rows.append(row)
    return rows, sorted(problems, key=lambda problem: problem.line or 0)


def texts_of_table(table: Table, columns: Columns) -> tuple[list[TextInput], list[DataProblem]]:
    """Check the texts of a table, which needs no labels.

    Args:
        table: What a reader gave.
        columns: The columns that the user named; that of the label is not read.

    Returns:
        The good texts, and everything that is wrong with the table.
    """
    problems = list(table.problems)
    if not table.columns:
        return [], problems or [DataProblem(table.file, None, "no rows; a header and rows with text are needed")]
    # Any column will do as that of the label, which is not read.
    found, missing = find_columns(table, replace(columns, label=table.columns[0]))
    if found is None:
        return [], problems + missing
    texts: list[TextInput] = []
    for record in table.records:
        text, message = _check_texts(record, found)
        if message:
            problems.append(DataProblem(table.file, record.line, message))
        texts.append(text)
    if not texts and not problems:
        problems.append(DataProblem(table.file, None, "a header but no rows; rows with text are needed"))
    return texts, sorted(problems, key=lambda problem: problem.line or 0)


def find_columns(table: Table, columns: Columns) -> tuple[FoundColumns | None, list[DataProblem]]:
    """Choose the columns of a table: those that the user named, else the first usual name that it has.

    Args:
        table: What a reader gave.
        columns: The columns that the user named.

    Returns:
        The columns, or None with one problem for each column that is missing.
    """
    problems: list[DataProblem] = []

    def find(role: str, option: str, named: str | None, usual: tuple[str, ...]) -> str:
        column = _named(table, named) if named else _usual(table, usual)
        if column is None:
            problems.append(_missing(table, role, option, named, usual))
        return column or ""

    text = find("text", "--text-column", columns.text, TEXT_NAMES)
    label = find("label", "--label-column", columns.label, LABEL_NAMES)
    if columns.text_pair:
        text_pair: str | None = find("second text", "--text-pair-column", columns.text_pair, PAIR_NAMES)
    else:
        text_pair = None if columns.text else _pair_column(table)
    if problems:
        return None, problems
    return FoundColumns(text, text_pair, label, _usual(table, ("split",))), []


def _named(table: Table, name: str) -> str | None:
    return name if name in table.columns else None


def _usual(table: Table, usual: tuple[str, ...]) -> str | None:
    by_lower_case = {column.lower(): column for column in reversed(table.columns)}
    return next((by_lower_case[name] for name in usual if name in by_lower_case), None)


def _pair_column(table: Table) -> str | None:
    """A second text that is empty in every row is no second text."""
    column = _usual(table, PAIR_NAMES)
    return column if column and any(record.values.get(column) for record in table.records) else None


def _missing(table: Table, role: str, option: str, named: str | None, usual: tuple[str, ...]) -> DataProblem:
    looked_for = repr(named) if named else f"({', '.join(usual)})"
    hint = did_you_mean(named or usual[0], table.columns)
    has = ", ".join(map(repr, table.columns))
    return DataProblem(
        table.file, None, f"no {role} column {looked_for}{hint}; the file has {has}; name one by {option}"
    )


def _check_texts(record: Record, columns: FoundColumns) -> tuple[TextInput, str]:
    names = (columns.text,) if columns.text_pair is None else (columns.text, columns.text_pair)
    texts = [record.values.get(name) for name in names]
    for name, text in zip(names, texts, strict=True):
        message = _text_problem(name, text)
        if message:
            return (), message
    return tuple(map(str, texts)), ""


def _check_record(record: Record, columns: FoundColumns) -> tuple[LabelledRow | None, str]:
    texts, message = _check_texts(record, columns)
    if message:
        return None, message
    label, message = _label_name(columns.label, record.values.get(columns.label))
    split, split_message = _split_name(record, columns.split)
    if message or split_message:
        return None, message or split_message
    return LabelledRow(texts, label, split), ""


def _text_problem(column: str, text: Any) -> str:
    if text is None or (isinstance(text, str) and not text.strip()):
        return f"the column {column!r} is empty; remove the row or fill it in"
    if not isinstance(text, str):
        return (
            f"the column {column!r} holds a value of type {type(text).__name__}, text is needed; name the right column"
        )
    if len(text) > LONGEST_TEXT:
        return f"the column {column!r} holds {len(text)} characters, at most {LONGEST_TEXT} are allowed; split it"
    if "\0" in text:
        return f"the column {column!r} holds NUL characters, which no text holds; remove them"
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"the column {column!r} holds half of a surrogate pair; write the character itself"
    return ""


def _label_name(column: str, value: Any) -> tuple[str, str]:
    """Labels become strings: 1 and 1.0 (an integer column with gaps) are both "1"."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    is_missing = value is None or value != value or not str(value).strip()
    if is_missing:
        return "", f"the column {column!r} has no label; remove the row or label it"
    if not isinstance(value, str | int | float):
        return "", f"the column {column!r} holds a value of type {type(value).__name__}, one class name is needed"
    return str(value).strip(), ""


def _split_name(record: Record, column: str | None) -> tuple[SplitName | None, str]:
    if column is None:
        return None, ""
    value = str(record.values.get(column) or "").strip()
    if value.lower() not in SPLIT_NAMES:
        return None, f"the split {value!r} is not known{did_you_mean(value, SPLIT_NAMES)}; use train, dev or test"
    return SPLIT_NAMES[value.lower()], ""
