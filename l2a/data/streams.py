"""Files of texts as streams: however long they are, so many lines are in memory at once."""

import bz2
import csv
import gzip
import io
import lzma
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from l2a.data import readers
from l2a.util.errors import UsageError

WINDOW = 2048
"""Lines in memory at once."""

DELIMITERS = {".csv": ",", ".tsv": "\t"}
PACKED: Mapping[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}


class Record(NamedTuple):
    """A line: number, values by column, and what is wrong; a line that cannot be read is the value of the column ""."""

    number: int
    values: Mapping[str, Any]
    problem: str = ""


def read_windows(source: Path | None, suffix: str) -> Iterator[list[Record]]:
    """Read a file as a stream, so many lines at once.

    Args:
        source: The file, packed where its name ends so; None for standard input.
        suffix: The format: ".txt", ".csv", ".tsv", ".jsonl" or ".parquet".

    Yields:
        Up to ``WINDOW`` lines.

    Raises:
        UsageError: If the file cannot be read, or the header of a table is wrong.
    """
    import pyarrow

    try:
        with source.open("rb") if source else nullcontext(sys.stdin.buffer) as raw:
            unpack = PACKED.get(source.suffix.lower()) if source else None
            records = _records(unpack(raw) if unpack else raw, suffix)
            while window := list(islice(records, WINDOW)):
                yield window
    except (OSError, EOFError, lzma.LZMAError, zlib.error, pyarrow.ArrowException) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{source}: cannot be read ({reason}); check the path, its permissions and content") from error


def _records(stream: Any, suffix: str) -> Iterator[Record]:
    if suffix == ".parquet":
        import pyarrow.parquet

        batches = pyarrow.parquet.ParquetFile(stream).iter_batches(WINDOW)
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        return (Record(number, values) for number, values in enumerate(rows, 1))
    if suffix in DELIMITERS:
        return _delimited(io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline=""), suffix)
    return _lines(stream, suffix)


def _lines(stream: IO[bytes], suffix: str) -> Iterator[Record]:
    """JSON objects, or texts; a tab in the first text says that all are pairs."""
    is_pair: bool | None = None
    for number, line in enumerate(stream, 1):
        for _, values in readers.parse(line, suffix) if line.strip() else ():
            if isinstance(values, str):
                yield Record(number, {"": line.decode("utf-8", "surrogateescape").strip("\r\n")}, values)
                continue
            if suffix == ".txt":
                first, _, second = values["text"].partition("\t")
                is_pair = bool(second.strip()) if is_pair is None else is_pair
                values = {"text": first, "text_pair": second} if is_pair else values
            yield Record(number, values)


def _delimited(text: IO[str], suffix: str) -> Iterator[Record]:
    """Rows; a stray quote breaks its own line only, as those that it swallowed are read again."""
    waiting, used, columns, number = deque[str](), list[str](), list[str](), 1

    def lines() -> Iterator[str]:
        while line := (waiting.popleft() if waiting else text.readline()):
            used.append(line)
            yield line

    rows = csv.reader(lines(), delimiter=DELIMITERS[suffix], strict=True)
    while True:
        used.clear()
        fields, problem = list[str](), ""
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            problem = f"{readers.STRAY_QUOTE} ({error}); quote the whole field"
        if not columns and (wrong := readers.parse("".join(used).encode("utf-8", "surrogateescape") or b" ", suffix)):
            raise UsageError(f"line {number}: {wrong[0][1]}")
        if not columns:
            columns = [field.strip() for field in fields]
        elif fields or problem:
            if not problem and len(fields) != len(columns):
                problem = f"{len(fields)} fields, the header has {len(columns)}; quote texts that contain the separator"
            if problem:
                waiting.extendleft(reversed(used[1:]))
                del used[1:]
                rows = csv.reader(lines(), delimiter=DELIMITERS[suffix], strict=True)
                plain = used[0].rstrip("\r\n").split("\t")  # .tsv files come with and without quotes
                fields, problem = (plain, "") if suffix == ".tsv" and len(plain) == len(columns) else (fields, problem)
            whole = "".join(used).rstrip("\r\n")
            if readers.HALF_PAIR.search(whole):
                problem = "not UTF-8; save the file as UTF-8"
            yield Record(number, {"": whole} if problem else dict(zip(columns, fields, strict=True)), problem)
        number += len(used)
