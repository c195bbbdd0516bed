"""Finding the columns of a table and turning its records into checked rows."""

from dataclasses import dataclass, replace
from typing import Any

from l2a.cards import did_you_mean
from l2a.domains.domain import Columns
from l2a.domains.rows import Problem, Record, Row, SplitName, Table
from l2a.examples import TextInput

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


def rows_of_table(table: Table, columns: Columns) -> tuple[list[Row], list[Problem]]:
    """Check a table and turn it into rows.

    Args:
        table: What a reader gave.
        columns: The columns that the user named.

    Returns:
        The good rows, and everything that is wrong with the table.
    """
    problems = list(table.problems)
    if not table.columns:
        return [], problems or [Problem(table.file, None, "no rows; a header and labelled rows are needed")]
    found, missing = find_columns(table, columns)
    if found is None:
        return [], problems + missing
    if not table.records and not problems:
        problems.append(Problem(table.file, None, "a header but no rows; labelled rows are needed"))
    rows: list[Row] = []
    for record in table.records:
        row, message = _check_record(record, found)
        if row is None:
            problems.append(Problem(table.file, record.line, message))
        else:
            rows.append(row)
    return rows, sorted(problems, key=lambda problem: problem.line or 0)


def texts_of_table(table: Table, columns: Columns) -> tuple[list[TextInput], list[Problem]]:
    """Check the texts of a table, which needs no labels.

    Args:
        table: What a reader gave.
        columns: The columns that the user named; that of the label is not read.

    Returns:
        The good texts, and everything that is wrong with the table.
    """
    problems = list(table.problems)
    if not table.columns:
        return [], problems or [Problem(table.file, None, "no rows; a header and rows with text are needed")]
    # Any column will do as that of the label, which is not read.
    found, missing = find_columns(table, replace(columns, label=table.columns[0]))
    if found is None:
        return [], problems + missing
    texts: list[TextInput] = []
    for record in table.records:
        text, message = _check_texts(record, found)
        if message:
            problems.append(Problem(table.file, record.line, message))
        texts.append(text)
    if not texts and not problems:
        problems.append(Problem(table.file, None, "a header but no rows; rows with text are needed"))
    return texts, sorted(problems, key=lambda problem: problem.line or 0)


def find_columns(table: Table, columns: Columns) -> tuple[FoundColumns | None, list[Problem]]:
    """Choose the columns of a table: those that the user named, else the first usual name that it has.

    Args:
        table: What a reader gave.
        columns: The columns that the user named.

    Returns:
        The columns, or None with one problem for each column that is missing.
    """
    problems: list[Problem] = []

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


def _missing(table: Table, role: str, option: str, named: str | None, usual: tuple[str, ...]) -> Problem:
    looked_for = repr(named) if named else f"({', '.join(usual)})"
    hint = did_you_mean(named or usual[0], table.columns)
    has = ", ".join(map(repr, table.columns))
    return Problem(table.file, None, f"no {role} column {looked_for}{hint}; the file has {has}; name one by {option}")


def _check_texts(record: Record, columns: FoundColumns) -> tuple[TextInput, str]:
    names = (columns.text,) if columns.text_pair is None else (columns.text, columns.text_pair)
    texts = [record.values.get(name) for name in names]
    for name, text in zip(names, texts, strict=True):
        message = _text_problem(name, text)
        if message:
            return (), message
    return tuple(map(str, texts)), ""


def _check_record(record: Record, columns: FoundColumns) -> tuple[Row | None, str]:
    texts, message = _check_texts(record, columns)
    if message:
        return None, message
    label, message = _label_name(columns.label, record.values.get(columns.label))
    split, split_message = _split_name(record, columns.split)
    if message or split_message:
        return None, message or split_message
    return Row(texts, label, split), ""


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
