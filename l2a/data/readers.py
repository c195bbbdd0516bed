"""Reads files and data in memory as records, one by one, and turns a table of them into checked rows."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import count, islice
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from l2a.config import Columns
from l2a.data.examples import TextInput
from l2a.util import UsageError, did_you_mean, logger, sha256_file

SplitName = Literal["train", "dev", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "dev", "test")
SPLIT_NAMES: dict[str, SplitName] = {
    "train": "train", "training": "train", "dev": "dev", "valid": "dev", "validation": "dev", "val": "dev",
    "test": "test", "testing": "test",
}  # fmt: skip
USUAL_COLUMNS = Columns()
DELIMITERS = {".csv": ",", ".tsv": "\t"}
ARROW = (".parquet", ".arrow", ".feather")
SUFFIXES = (*DELIMITERS, ".jsonl", ".json", *ARROW)
FORMATS = (".txt", *SUFFIXES)
PACKED: Mapping[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
# Usual names of columns, the first that a table has is read; names of classes come before their numbers.
USUAL_NAMES = {
    "text": ("text", "sentence", "sentence1", "premise", "question1", "review", "content", "tweet", "document"),
    "text_pair": ("text_pair", "sentence2", "hypothesis", "question2"),
    "label": ("label_text", "label_name", "label", "labels", "class", "category", "sentiment"),
    "split": ("split",),
}
SIDES = ("text", "text_pair")
NO_LABELS = ("", "nan", "<na>", "#n/a")
WINDOW = 2048  # records of a stream that are in memory at once
LONGEST_TEXT = 1_000_000  # characters; tokenisers cut long texts, but not texts that are no texts
HALF_PAIR = re.compile("[\ud800-\udfff]")
FLAG = "--{}-column"  # how the command line names a column; that of a side is --source-{}-column or --target-{}-column


class Record(NamedTuple):
    """A line or row: its number (0 for the whole file), its values by column, and what is wrong with it.

    A line that cannot be read is the value of the column "".
    """

    number: int
    values: Mapping[str, Any]
    problem: str = ""


class Row(NamedTuple):
    """One checked example; the label is empty where none is read, the split None where the data gives none."""

    text: TextInput
    label: str
    split: SplitName | None = None


class Table(NamedTuple):
    """Records before their columns are understood.

    Attributes:
        name: The file or data as the user named it.
        records: The rows, and what could not be read.
        unit: What their numbers count.
        digest: sha256 of the file; empty for data in memory.
    """

    name: str
    records: Sequence[Record]
    unit: Literal["line", "row"] = "line"
    digest: str = ""

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in order."""
        return list(dict.fromkeys(key for record in self.records if not record.problem for key in record.values))


def refuse(problems: Sequence[str], reference: object) -> None:
    """Stop with the first three problems of the data that a user named by a reference, if there are any."""
    if problems:
        more = f"; and {len(problems) - 3} more (see `l2a domains check {reference}`)" if len(problems) > 3 else ""
        raise UsageError("; ".join(problems[:3]) + more)


def name_and_format(path: Path) -> tuple[str, str]:
    """Take a file's name apart: ("x", ".csv") for x.csv, x.CSV and x.csv.gz."""
    inner = Path(path.stem if path.suffix.lower() in PACKED else path.name)
    return inner.stem, inner.suffix.lower()


def known_format(path: Path, allowed: Sequence[str], done: str = "read") -> str:
    """Give the format that a file's name says.

    Raises:
        UsageError: If it is not one of those that make sense here.
    """
    if (suffix := name_and_format(path)[1]) not in allowed:
        convert = f"pandas.read_excel({str(path)!r}).to_csv({str(path.with_suffix('.csv'))!r}, index=False)"
        fix = f'; convert it by python -c "import pandas; {convert}"' if suffix in (".xlsx", ".xls", ".ods") else ""
        raise UsageError(f"{path}: files that end in {suffix!r} are not {done} here; give {', '.join(allowed)}{fix}")
    return suffix


def read_table(path: Path, allowed: Sequence[str] = SUFFIXES) -> Table:
    """Read one whole data file of an allowed format into rows and problems; a bad line is a problem and raises nothing.

    Raises:
        UsageError: If the file cannot be read or its format is not known.
    """
    suffix = known_format(path, allowed)
    records = list(read_records(path, suffix))
    return Table(str(path), records, "row" if suffix in (".json", *ARROW) else "line", sha256_file(path))


def texts_of(table: Table, columns: Columns = USUAL_COLUMNS, flag: str = FLAG) -> tuple[TextInput, ...]:
    """Check and return the texts of a table without reading its labels; the arguments are those of ``check_table``.

    Raises:
        UsageError: If something is wrong with the texts.
    """
    rows, problems = check_table(table, columns, flag, labelled=False)
    refuse(problems, table.name)
    return tuple(tuple(map(str.strip, row.text)) for row in rows)


def windows(records: Iterator[Record]) -> Iterator[list[Record]]:
    """Cut a stream into lists of up to ``WINDOW`` records."""
    while window := list(islice(records, WINDOW)):
        yield window


def read_records(source: Path | None, suffix: str, named: bool = True) -> Iterator[Record]:
    """Read a file as a stream; only .json, .arrow and .feather files are in memory as a whole.

    Args:
        source: The file, packed where its name ends so; None for standard input.
        suffix: Its format, one of ``FORMATS``.
        named: Whether numbers of classes become names where the file has these.

    Yields:
        Lines or rows; none for an empty file.

    Raises:
        UsageError: If the file cannot be read.
    """
    try:
        opened = PACKED.get(source.suffix.lower(), open)(source, "rb") if source else nullcontext(sys.stdin.buffer)
        with opened as stream:
            if suffix in ARROW:
                yield from _arrow(stream, suffix, named)
                return
            # What is not UTF-8 becomes halves of surrogate pairs. Lines end at \n, \r and \r\n alone.
            newline, parse = ("", _delimited) if suffix in DELIMITERS else (None, _lines)
            yield from parse(io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline=newline), suffix)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{source}: cannot be read ({reason}); check the path, its permissions and content") from error


def _lines(text: IO[str], suffix: str) -> Iterator[Record]:
    """JSON objects, or texts; a tab in the first text says that all are pairs."""
    if suffix == ".json":
        content = text.read()
        whole = None if _byte_problem(content) else _json(content)
        if isinstance(whole, list):
            yield from (_json_record(number, value) for number, value in enumerate(whole, 1))
            return
        text = io.StringIO(content)
    is_pair = None
    for number, line in ((place, line.rstrip("\n")) for place, line in enumerate(text, 1) if line.strip()):
        first, _, second = line.partition("\t")
        is_pair = bool(second.strip()) if is_pair is None else is_pair
        if problem := _byte_problem(line):
            yield Record(number, {"": line}, problem)
        elif suffix == ".txt":
            yield Record(number, {"text": first, "text_pair": second} if is_pair else {"text": line})
        else:
            yield _json_record(number, _json(line), line)


def _byte_problem(line: str) -> str:
    if line.startswith(("\udcff\udcfe", "\udcfe\udcff")):
        return "the file is UTF-16; save it as UTF-8"
    if "\0" in line:
        return "NUL bytes, which no text contains; remove them"
    if half := HALF_PAIR.search(line):
        byte = f"byte 0x{ord(half[0]) - 0xDC00:02x} at column {len(line[: half.start()].encode()) + 1}"
        return f"not UTF-8 ({byte}); save the file as UTF-8"
    return ""


def _json(text: str) -> Any:
    """The value, or the error."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return error


def _json_record(number: int, value: Any, line: str = "") -> Record:
    if isinstance(value, dict):
        return Record(number, value)
    found = f"not JSON ({value})" if isinstance(value, Exception) else f"a JSON {type(value).__name__}, not an object"
    return Record(number, {"": line}, f"{found}; write one object per line, or a list of objects as .json")


def _delimited(text: IO[str], suffix: str) -> Iterator[Record]:
    """Rows; a stray quote breaks its own line only, as those that it swallowed are read again."""
    waiting, used, columns, number = deque[str](), list[str](), list[str](), 1

    def lines() -> Iterator[str]:
        while line := (waiting.popleft() if waiting else text.readline()):
            used.append(line)
            yield line

    while True:
        used.clear()
        fields, problem = _next_row(csv.reader(lines(), delimiter=DELIMITERS[suffix], strict=True))
        if not used:
            break
        if columns and fields and len(fields) != len(columns):
            problem = f"{len(fields)} fields, the header has {len(columns)}; quote texts that contain the separator"
        if problem:
            waiting.extendleft(reversed(used[1:]))
            del used[1:]
            plain = used[0].rstrip("\r\n").split("\t")  # .tsv files come with and without quotes
            fields, problem = (plain, "") if suffix == ".tsv" and len(plain) == len(columns) else (fields, problem)
        whole = "".join(used).rstrip("\r\n")
        problem = _byte_problem(whole) or problem
        if not columns and (fields or problem):
            columns = [field.strip() for field in fields]
            if problem := problem or _header_problem(columns):
                yield Record(number, {"": whole}, problem)
                return
        elif fields or problem:
            yield Record(number, {"": whole} if problem else dict(zip(columns, fields, strict=True)), problem)
        number += len(used)


def _next_row(rows: Iterator[list[str]]) -> tuple[list[str], str]:
    """The fields of a row, none at the end, and what is wrong with it."""
    limit = csv.field_size_limit(2 * LONGEST_TEXT)  # the limit is the process's: it is put back
    try:
        return next(rows, []), ""
    except csv.Error as error:
        return [], f"a stray quote or an endless field ({error}); quote the whole field"
    finally:
        csv.field_size_limit(limit)


def _header_problem(columns: Sequence[str]) -> str:
    if other := next((mark for mark in ";\t|," if len(columns) == 1 and mark in columns[0]), None):
        return f"the columns are separated by {other!r}; use commas in .csv files, tabs in .tsv files"
    twice = sorted({column for column in columns if columns.count(column) > 1})
    return f"the header names {twice[0]!r} twice; give each column its own name" if twice else ""


def _arrow(stream: IO[bytes], suffix: str, named: bool) -> Iterator[Record]:
    import pyarrow.parquet

    if not (start := stream.read(6)):
        return
    stream.seek(0)
    try:
        if suffix == ".parquet":
            batches = pyarrow.parquet.ParquetFile(stream).iter_batches(WINDOW)
        else:  # Feather files begin like this; the datasets library writes streams.
            opened = pyarrow.ipc.open_file if start == b"ARROW1" else pyarrow.ipc.open_stream
            batches = opened(stream).read_all().to_batches(WINDOW)
        yield from _arrow_records(batches, named)
    except Exception as error:  # for damaged bytes pyarrow also raises a SystemError
        kind = "Parquet" if suffix == ".parquet" else "Arrow"
        raise OSError(f"not a readable {kind} file: {' '.join(str(error).split())}") from error


def _arrow_records(batches: Iterable[Any], named: bool = True) -> Iterator[Record]:
    """Rows: where classes have names, their numbers become these, and -1, which means unlabelled, becomes None."""
    numbers = count(1)
    for batch in batches:
        names = _class_names(batch.schema) if named else {}
        for values in batch.to_pylist():
            problem = ""
            for column, known in names.items():
                value = values.get(column)
                if value is not None and value >= len(known):
                    problem = f"the class {value} of {column!r} has no name; the data name {known}"
                values[column] = known[value] if value is not None and 0 <= value < len(known) else None
            yield Record(next(numbers), values, problem)


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Names of classes by column, where the datasets library keeps them."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {name: kind["names"] for name, kind in features.items() if kind.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def memory_table(data: Any, name: str) -> Table:
    """Read data in memory as a whole; see ``memory_records``."""
    return Table(name, list(memory_records(data, name)), "row")


def memory_records(data: Any, name: str, labelled: bool = True) -> Iterator[Record]:
    """Read data in memory into rows and problems.

    Args:
        data: A ``datasets.Dataset``, a pandas frame, or a list of (text, label) or ((first, second), label), each with
            a split as a third item if wanted, or of mappings by column.
        name: How problems name the data.
        labelled: If not, a list holds texts and pairs of them instead, and datasets may be streams.

    Raises:
        UsageError: If the data is of no such type.
    """
    if hasattr(data, "with_format") and (hasattr(data, "__len__") or not labelled):
        return _arrow_records(data.with_format("arrow").iter(WINDOW))
    if hasattr(data, "iterrows"):
        data = data.astype(object).where(data.notna(), None).rename(columns=str).to_dict("records")
    if not isinstance(data, list | tuple):
        kinds = "a list of (text, label), a pandas frame, a datasets.Dataset or a DatasetDict"
        raise UsageError(f"{name}: data of type {type(data).__name__} is not read; give {kinds}")
    return (_item(number, item, labelled) for number, item in enumerate(data, 1))


def _item(number: int, item: Any, labelled: bool) -> Record:
    if isinstance(item, Mapping):
        return Record(number, item)
    if not labelled:
        sides = item if isinstance(item, list | tuple) and 1 <= len(item) <= 2 else (item,)
        return Record(number, dict(zip(SIDES, sides, strict=False)))
    try:
        text, label, *split = [item] if isinstance(item, str) else item
        sides = (text,) if isinstance(text, str) else text
        columns = (*SIDES[: len(sides)], *("label", "split")[: 1 + len(split)])
        return Record(number, dict(zip(columns, (*sides, label, *split), strict=True)))
    except (TypeError, ValueError):
        return Record(number, {}, f"{item!r:.80} is not read; give (text, label) or ((first, second), label)")


def check_table(
    table: Table, columns: Columns, flag: str = FLAG, labelled: bool = True, optional: bool = False
) -> tuple[list[Row], list[str]]:
    """Check a table and turn it into good rows and a list of everything that is wrong with it, by line.

    Args:
        table: What a reader gave.
        columns: The columns that the user named; the first usual name that the table has for the others.
        flag: How messages name the option for a column.
        labelled: Whether labels are read.
        optional: Leave the table out, with a warning, when its labels are all missing.
    """
    read = [record for record in table.records if not record.problem]
    found, missing = find_columns(table, columns, flag, labelled) if read else ({}, [])
    if optional and "label" in found and all(record.values.get(found["label"]) is None for record in read):
        logger.warning("%s has no labels and is ignored", table.name)
        return [], []
    rows: list[Row] = []
    problems = [f"{table.name}: {message}" for message in missing]
    for number, values, problem in table.records or (Record(0, {}, "no rows; give it rows with text"),):
        if not problem and not missing:
            try:
                rows.append(_row(values, found))
            except UsageError as error:
                problem = str(error)
        if problem:
            problems.append(f"{table.name}{f', {table.unit} {number}' if number else ''}: {problem}")
    return rows, problems


def find_columns(table: Table, columns: Columns, flag: str, labelled: bool) -> tuple[dict[str, str], list[str]]:
    """Find the columns of a table by what they hold ("text", "text_pair" ...), and say what is missing."""
    names = table.columns
    by_lower_case = {column.lower(): column for column in reversed(names)}
    found, missing = dict[str, str](), list[str]()
    for role, usual in ((role, usual) for role, usual in USUAL_NAMES.items() if labelled or role != "label"):
        named = getattr(columns, role, None)
        column = next((by_lower_case[name] for name in usual if name in by_lower_case), None)
        if named:
            column = named if named in names else None
        elif role == "text_pair" and (columns.text or not any(one.values.get(column or "") for one in table.records)):
            continue  # a second text that is empty in every row is no second text
        if column is not None:
            found[role] = column
        elif named or role in ("text", "label"):
            hint, words = did_you_mean(named or usual[0], names), role.replace("_", "-")
            looked_for = repr(named) if named else f"({', '.join(usual)})"
            has = ", ".join(map(repr, names))
            missing.append(f"no {words} column {looked_for}{hint}; it has {has}; name one by {flag.format(words)}")
    return found, missing


def _row(values: Mapping[str, Any], found: Mapping[str, str]) -> Row:
    texts = tuple(check_text(found[role], values.get(found[role])) for role in SIDES if role in found)
    label = _label(found["label"], values.get(found["label"])) if "label" in found else ""
    split = str(values.get(found.get("split", "")) or "").strip()
    if "split" in found and split.lower() not in SPLIT_NAMES:
        raise UsageError(f"the split {split!r} is not known{did_you_mean(split, SPLIT_NAMES)}; use train, dev or test")
    return Row(texts, label, SPLIT_NAMES.get(split.lower()))


def check_text(column: str, text: Any) -> str:
    """Return what a column holds if it is a text.

    Raises:
        UsageError: If it is none.
    """
    if text is None or (isinstance(text, str) and not text.strip()):
        wrong = "is empty; remove the row or fill it in"
    elif not isinstance(text, str):
        wrong = f"holds a value of type {type(text).__name__} instead of text; name the right column"
    elif len(text) > LONGEST_TEXT:
        wrong = f"holds {len(text)} characters, at most {LONGEST_TEXT} are allowed; shorten the text"
    elif "\0" in text:
        wrong = "holds NUL characters, which no text contains; remove them"
    elif HALF_PAIR.search(text):
        wrong = "holds half of a surrogate pair; write the character itself"
    else:
        return text
    raise UsageError(f"the column {column!r} {wrong}")


def _label(column: str, value: Any) -> str:
    """Labels become strings: 1 and 1.0 (an integer column with gaps) are both "1"."""
    value = value.item() if hasattr(value, "item") else value  # a number of numpy
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    name = "" if value is None else str(value).strip()
    if name.lower() in NO_LABELS:
        shown = f" ({name!r} marks a missing one)" if name else ""
        raise UsageError(f"the column {column!r} has no label{shown}; remove the row or label it")
    if not isinstance(value, str | int | float):
        raise UsageError(f"the column {column!r} holds a value of type {type(value).__name__} instead of a class name")
    return name
