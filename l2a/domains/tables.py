"""Reading .csv, .tsv, .jsonl and .parquet files into records that know their line."""

import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from l2a.domains.rows import Problem, Record, Table

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


def _byte_problems(data: bytes, file: str) -> list[Problem]:
    if not data.strip():
        return [Problem(file, None, "the file is empty; a header and labelled rows are needed")]
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return [Problem(file, 1, "the file is UTF-16; save it as UTF-8")]
    found: list[Problem] = []
    for line, content in enumerate(data.split(b"\n"), start=1):
        if b"\0" in content:
            found.append(Problem(file, line, "NUL bytes, which no text holds; remove them"))
        try:
            content.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = f"byte 0x{content[error.start]:02x} at column {error.start + 1}"
            found.append(Problem(file, line, f"not UTF-8 ({byte}); save the file as UTF-8"))
    return found


def _parse_jsonl(text: str, file: str) -> Table:
    records: list[Record] = []
    problems: list[Problem] = []
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        value, message = _parse_object(content)
        if message:
            problems.append(Problem(file, line, message))
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
    problems: list[Problem] = []
    line = 1
    with _long_fields():
        try:
            for fields in reader:
                if fields and not columns:
                    columns = [field.strip() for field in fields]
                elif fields:
                    _add_record(fields, columns, Problem(file, line, ""), records, problems)
                line = reader.line_num + 1
        except csv.Error as error:
            problems.append(Problem(file, line, f"{STRAY_QUOTE} ({error}); quote the whole field"))
    problems += _header_problems(columns, file)
    return Table(file, tuple(columns), tuple(records), tuple(problems))


def _add_record(
    fields: list[str], columns: list[str], place: Problem, records: list[Record], problems: list[Problem]
) -> None:
    assert place.line is not None
    if len(fields) != len(columns):
        message = f"{len(fields)} fields, the header has {len(columns)}; quote texts that hold the separator"
        problems.append(Problem(place.file, place.line, message))
    else:
        records.append(Record(place.line, dict(zip(columns, fields, strict=True))))


def _header_problems(columns: list[str], file: str) -> list[Problem]:
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        return [
            Problem(file, 1, f"the header names {', '.join(map(repr, twice))} twice; each column needs its own name")
        ]
    return []


def _read_parquet(path: Path, file: str) -> Table:
    import pyarrow
    import pyarrow.parquet

    if path.stat().st_size == 0:
        return Table(file, (), (), (Problem(file, None, "the file is empty; labelled rows are needed"),))
    try:
        content = pyarrow.parquet.ParquetFile(path).read()
        values = content.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        return Table(file, (), (), (Problem(file, None, f"not a readable Parquet file ({error}); write it again"),))
    records = tuple(Record(number, value) for number, value in enumerate(values, start=1))
    return Table(file, tuple(content.column_names), records)
