"""Rows as they come from any reader, and what can be wrong with them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from l2a.errors import UsageError
from l2a.examples import Examples, TextInput

SplitName = Literal["train", "dev", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "dev", "test")


@dataclass(frozen=True)
class Problem:
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
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class Row:
    """One checked example.

    Attributes:
        text: One or two texts.
        label: Name of the class.
        split: The split that the data itself gives, or None.
    """

    text: TextInput
    label: str
    split: SplitName | None


def refuse(problems: Sequence[Problem], reference: str) -> None:
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


def to_examples(rows: Sequence[Row], label_names: tuple[str, ...]) -> Examples:
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
