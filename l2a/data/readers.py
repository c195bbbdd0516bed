"""Reads files and data in memory: every format gives a table, and checking the table gives rows."""

import bz2
import csv
import gzip
import hashlib
import io
import json
import logging
import lzma
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from l2a.config import Columns
from l2a.data.examples import TextInput
from l2a.util.errors import UsageError, did_you_mean

SplitName = Literal["train", "dev", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "dev", "test")
SPLIT_NAMES: dict[str, SplitName] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("dev", "valid", "validation", "val"), "dev"),
    **dict.fromkeys(("test", "testing"), "test"),
}
USUAL_COLUMNS = Columns()
ARROW = (".parquet", ".arrow", ".feather")
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", *ARROW)
UNPACK = {".gz": gzip.decompress, ".xz": lzma.decompress, ".bz2": bz2.decompress}
SPREADSHEETS = (".xlsx", ".xls", ".ods")
USUAL_NAMES = {
    "text": ("text", "sentence", "sentence1", "premise", "question1", "review", "content", "tweet", "document"),
    "text_pair": ("text_pair", "sentence2", "hypothesis", "question2"),
    "label": ("label_text", "label_name", "label", "labels", "class", "category", "sentiment"),
    "split": ("split",),
}
"""Usual names of columns, the first that a table has is read; names of classes come before their numbers."""

NO_LABELS = ("", "nan", "<na>", "#n/a")
LONGEST_TEXT = 1_000_000  # characters; tokenisers cut long texts, but not texts that are no texts
FIELD_LIMIT = 16_000_000  # characters of one csv field; longer ones are refused with their line
HALF_PAIR = re.compile("[\ud800-\udfff]")
STRAY_QUOTE = "a stray quote or an endless field"
FLAG = "--{}-column"
"""How the command line names a column; a side's flags are ``--source-{}-column`` and ``--target-{}-column``."""

Item = tuple[int, Mapping[str, Any] | str]
"""The number of a line or row (0 for the whole), and its values by column or what is wrong with it."""

logger = logging.getLogger(__name__)


class Row(NamedTuple):
    """One checked example; the label is empty where none is read, the split None where the data gives none."""

    text: TextInput
    label: str
    split: SplitName | None = None


@dataclass(frozen=True)
class Table:
    """Rows before their columns are understood.

    Attributes:
        name: The file or data as the user named it.
        items: The rows, and what could not be read.
        unit: What their numbers count.
        digest: sha256 of the file; empty for data in memory.
    """

    name: str
    items: Sequence[Item]
    unit: Literal["line", "row"] = "line"
    digest: str = ""

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in order."""
        return list(dict.fromkeys(key for _, values in self.items if not isinstance(values, str) for key in values))

    @property
    def has_labels(self) -> bool:
        """Whether a column has the usual name of labels."""
        return any(column.lower() in USUAL_NAMES["label"] for column in self.columns)


def refuse(problems: Sequence[str], reference: object) -> None:
    """Stop with the first three problems of the data that a user named by a reference, if there are any."""
    if problems:
        more = f"; and {len(problems) - 3} more (see `l2a domains check {reference}`)" if len(problems) > 3 else ""
        raise UsageError("; ".join(problems[:3]) + more)


def name_and_format(path: Path) -> tuple[str, str]:
    """Take a file's name apart: ("x", ".csv") for x.csv, x.CSV and x.csv.gz."""
    inner = Path(path.stem if path.suffix.lower() in UNPACK else path.name)
    return inner.stem, inner.suffix.lower()


def read_table(path: Path, allowed: Sequence[str] = SUFFIXES) -> Table:
    """Read one data file; .gz, .xz and .bz2 files are unpacked.

    Args:
        path: The file.
        allowed: The formats that make sense here.

    Returns:
        Rows and problems; nothing is raised for bad content.

    Raises:
        UsageError: If the file cannot be read or its format is not known.
    """
    suffix = name_and_format(path)[1]
    if suffix not in allowed:
        convert = f"pandas.read_excel({str(path)!r}).to_csv({str(path.with_suffix('.csv'))!r}, index=False)"
        fix = f'; convert it by python -c "import pandas; {convert}"' if suffix in SPREADSHEETS else ""
        raise UsageError(f"{path}: files that end in {suffix!r} are not read here; give {', '.join(allowed)}{fix}")
    try:
        content = path.read_bytes()
        data = UNPACK.get(path.suffix.lower(), bytes)(content)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path}: cannot be read ({reason}); check the path, its permissions and content") from error
    unit: Literal["line", "row"] = "row" if suffix in (".json", *ARROW) else "line"
    return Table(str(path), parse(data, suffix), unit, hashlib.sha256(content).hexdigest())


def texts_of(table: Table, columns: Columns = USUAL_COLUMNS, flag: str = FLAG) -> tuple[TextInput, ...]:
    """Check the texts of a table, whose labels, if it has any, are not read.

    Args:
        table: What a reader gave; a line of a .txt file is a text, or a pair where a tab separates two.
        columns: The columns that the user named.
        flag: How messages name the option for a column.

    Returns:
        The texts.

    Raises:
        UsageError: If something is wrong with them.
    """
    rows, problems = check_table(table, columns, flag, labelled=False)
    refuse(problems, table.name)
    is_plain = name_and_format(Path(table.name))[1] == ".txt"
    if not is_plain:
        return tuple(row.text for row in rows)
    sides = (row.text[0].partition("\t") for row in rows)
    return tuple((first.strip(), second.strip()) if second.strip() else (first.strip(),) for first, _, second in sides)


def parse(data: bytes, suffix: str) -> list[Item]:
    """Parse the whole content of a file, whose format is one of ``SUFFIXES`` or ".txt", into rows and problems."""
    if not data.strip():
        return [(0, "the file is empty; give it rows with text")]
    if suffix in ARROW:
        return _parse_arrow(data, suffix)
    if problems := _byte_problems(data):
        return problems
    text = data.decode("utf-8-sig")
    if suffix == ".csv":
        return _parse_delimited(text, ",", quoted=True)
    if suffix == ".tsv":  # comes both with and without quotes: a stray quote fails the strict reading
        items = _parse_delimited(text, "\t", quoted=True)
        stray_quote = any(str(values).startswith(STRAY_QUOTE) for _, values in items[-1:])
        return _parse_delimited(text, "\t", quoted=False) if stray_quote else items
    # Lines end at these three alone, unlike those of str.splitlines.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if suffix == ".txt":
        return [(number, {"text": line}) for number, line in numbered]
    whole = _json(text) if suffix == ".json" else None
    if isinstance(whole, list):
        return [(number, _json_object(value)) for number, value in enumerate(whole, start=1)]
    return [(number, _json_object(_json(line))) for number, line in numbered]


def _json(text: str) -> Any:
    """The value, or the error."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return error


def _json_object(value: Any) -> dict[str, Any] | str:
    if isinstance(value, dict):
        return value
    found = f"not JSON ({value})" if isinstance(value, Exception) else f"a JSON {type(value).__name__}, not an object"
    return f"{found}; write one object per line, or a list of objects as .json"


def _byte_problems(data: bytes) -> list[Item]:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return [(1, "the file is UTF-16; save it as UTF-8")]
    found: list[Item] = []
    for line, content in enumerate(data.split(b"\n"), start=1):
        if b"\0" in content:
            found.append((line, "NUL bytes, which no text contains; remove them"))
        try:
            content.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = f"byte 0x{content[error.start]:02x} at column {error.start + 1}"
            found.append((line, f"not UTF-8 ({byte}); save the file as UTF-8"))
    return found


def _parse_delimited(text: str, delimiter: str, quoted: bool) -> list[Item]:
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=quoted)
    columns: list[str] = []
    items: list[Item] = []
    line, limit = 1, csv.field_size_limit(FIELD_LIMIT)  # the limit is the process's: it is put back
    try:
        for fields in reader:
            if fields and not columns:
                columns = [field.strip() for field in fields]
                other = next((mark for mark in ";\t|," if len(columns) == 1 and mark in columns[0]), None)
                if other:  # a header of one column
                    fix = "use commas in .csv files, tabs in .tsv files"
                    return [(0, f"the columns are separated by {other!r}; {fix}")]
                twice = sorted({column for column in columns if columns.count(column) > 1})
                items += [(line, f"the header names {name!r} twice; give each column its own name") for name in twice]
            elif fields and len(fields) != len(columns):
                counts = f"{len(fields)} fields, the header has {len(columns)}"
                items.append((line, f"{counts}; quote texts that contain the separator"))
            elif fields:
                items.append((line, dict(zip(columns, fields, strict=True))))
            line = reader.line_num + 1
    except csv.Error as error:
        items.append((line, f"{STRAY_QUOTE} ({error}); quote the whole field"))
    finally:
        csv.field_size_limit(limit)
    return items


def _parse_arrow(data: bytes, suffix: str) -> list[Item]:
    import pyarrow
    import pyarrow.parquet

    try:
        if suffix == ".parquet":
            return _arrow_items(pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data)).read())
        # Feather files begin like this; the datasets library writes streams.
        opened = pyarrow.ipc.open_file if data.startswith(b"ARROW1") else pyarrow.ipc.open_stream
        return _arrow_items(opened(data).read_all())
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        kind = "Parquet" if suffix == ".parquet" else "Arrow"
        return [(0, f"not a readable {kind} file ({error}); write it again")]


def _arrow_items(content: Any) -> list[Item]:
    """The rows of an Arrow table: numbers of classes become names; -1, which means unlabelled, becomes None."""
    try:  # where the datasets library keeps the names
        features = json.loads(content.schema.metadata[b"huggingface"])["info"]["features"]
        names = {name: kind["names"] for name, kind in features.items() if kind.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError):
        names = {}
    items: list[Item] = []
    for number, values in enumerate(content.to_pylist(), start=1):
        for column, known in names.items():
            value = values.get(column)
            if value is not None and value >= len(known):
                items.append((number, f"the class {value} of {column!r} has no name; the data name {known}"))
            values[column] = None if value is None or not 0 <= value < len(known) else known[value]
        items.append((number, values))
    return items


def memory_table(data: Any, name: str) -> Table:
    """Read data in memory.

    Args:
        data: A ``datasets.Dataset``, a pandas frame, or a list of (text, label) or ((first, second), label), each with
            a split as a third item if wanted, or of mappings by column.
        name: How problems name the data.

    Returns:
        Rows and problems.

    Raises:
        UsageError: If the data is of no such type.
    """
    if hasattr(data, "with_format") and hasattr(data, "__len__"):
        return Table(name, _arrow_items(data.with_format("arrow")[:]), "row")
    if hasattr(data, "iterrows"):
        data = data.astype(object).where(data.notna(), None).rename(columns=str).to_dict("records")
    if not isinstance(data, list | tuple):
        kinds = "a list of (text, label), a pandas frame, a datasets.Dataset or a DatasetDict"
        raise UsageError(f"{name}: data of type {type(data).__name__} is not read; give {kinds}")
    return Table(name, [(number, _item(item)) for number, item in enumerate(data, start=1)], "row")


def _item(item: Any) -> Mapping[str, Any] | str:
    if isinstance(item, Mapping):
        return item
    try:
        text, label, *split = [item] if isinstance(item, str) else item
        first, *second = (text,) if isinstance(text, str) else text
        columns = ("text", "text_pair")[: 1 + len(second)] + ("label", "split")[: 1 + len(split)]
        return dict(zip(columns, (first, *second, label, *split), strict=True))
    except (TypeError, ValueError):
        return f"{item!r:.80} is not read; give (text, label) or ((first, second), label)"


def check_table(
    table: Table, columns: Columns, flag: str = FLAG, labelled: bool = True, optional: bool = False
) -> tuple[list[Row], list[str]]:
    """Check a table and turn it into rows.

    Args:
        table: What a reader gave.
        columns: The columns that the user named; the first usual name that the table has for the others.
        flag: How messages name the option for a column.
        labelled: Whether labels are read.
        optional: Leave the table out, with a warning, when its labels are all missing.

    Returns:
        The good rows, and everything that is wrong with the table, by line.
    """
    read = [(number, values) for number, values in table.items if not isinstance(values, str)]
    problems = [(number, values) for number, values in table.items if isinstance(values, str)]
    found, missing = find_columns(table, columns, flag, labelled) if read else ({}, [])
    if optional and "label" in found and all(values.get(found["label"]) is None for _, values in read):
        logger.warning("%s has no labels and is ignored", table.name)
        return [], []
    rows: list[Row] = []
    for number, values in read if not missing else ():
        try:
            rows.append(_row(values, found))
        except UsageError as error:
            problems.append((number, str(error)))
    if not table.items:
        problems.append((0, "no rows; give a header and rows with text"))
    problems = sorted([*((0, message) for message in missing), *problems], key=lambda problem: problem[0])
    return rows, [f"{table.name}{f', {table.unit} {line}' if line else ''}: {message}" for line, message in problems]


def find_columns(table: Table, columns: Columns, flag: str, labelled: bool) -> tuple[dict[str, str], list[str]]:
    """Find the columns of a table by what they hold ("text", "text_pair" ...), and say what is missing."""
    names = table.columns
    by_lower_case = {column.lower(): column for column in reversed(names)}
    found: dict[str, str] = {}
    missing: list[str] = []
    for role, usual in USUAL_NAMES.items():
        named = getattr(columns, role, None)
        column = next((by_lower_case[name] for name in usual if name in by_lower_case), None)
        if role == "label" and not labelled:
            continue
        if named:
            column = named if named in names else None
        elif role == "text_pair" and (columns.text or not _holds_anything(table, column)):
            continue
        if column is not None:
            found[role] = column
        elif named or role in ("text", "label"):
            hint, words = did_you_mean(named or usual[0], names), role.replace("_", "-")
            looked_for = repr(named) if named else f"({', '.join(usual)})"
            has = ", ".join(map(repr, names))
            missing.append(f"no {words} column {looked_for}{hint}; it has {has}; name one by {flag.format(words)}")
    return found, missing


def _holds_anything(table: Table, column: str | None) -> bool:
    """A second text that is empty in every row is no second text."""
    return any(not isinstance(values, str) and values.get(column or "") for _, values in table.items)


def _row(values: Mapping[str, Any], found: Mapping[str, str]) -> Row:
    sides = [found[role] for role in ("text", "text_pair") if role in found]
    texts = tuple(check_text(column, values.get(column)) for column in sides)
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
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    name = "" if value is None else str(value).strip()
    if name.lower() in NO_LABELS:
        shown = f" ({name!r} marks a missing one)" if name else ""
        raise UsageError(f"the column {column!r} has no label{shown}; remove the row or label it")
    if not isinstance(value, str | int | float):
        raise UsageError(f"the column {column!r} holds a value of type {type(value).__name__} instead of a class name")
    return name
