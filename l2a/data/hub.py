"""Data in the format of the datasets library: saved folders and datasets of the Hugging Face Hub."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2a.config import Columns
from l2a.data.readers import (
    SPLIT_NAMES,
    DataProblem,
    LabelledRow,
    Record,
    SplitName,
    Table,
    find_columns,
    rows_of_table,
)
from l2a.data.splits import RawDomain
from l2a.util.cache import fingerprint
from l2a.util.errors import RunError, UsageError
from l2a.util.progress import Progress

if TYPE_CHECKING:
    from datasets import Dataset


SAVED_MARKS = ("dataset_dict.json", "dataset_info.json")
logger = logging.getLogger(__name__)


def is_saved_dataset(folder: Path) -> bool:
    """Tell whether a folder was written by ``save_to_disk`` of the datasets library.

    Args:
        folder: Any folder.

    Returns:
        True if it was.
    """
    return any((folder / mark).is_file() for mark in SAVED_MARKS)


def read_saved_dataset(folder: Path, columns: Columns) -> RawDomain:
    """Read a folder written by ``save_to_disk``.

    Args:
        folder: The folder.
        columns: The columns that the user named.

    Returns:
        Its rows.

    Raises:
        UsageError: If the folder is damaged.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        content = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{folder}: not a readable saved dataset ({_first_line(error)}); save it again") from error
    return _raw_domain(folder.name, content, columns)


def read_hub_dataset(reference: str, columns: Columns, progress: Progress) -> RawDomain:
    """Read a dataset of the Hub; HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE are honoured.

    Args:
        reference: ``name`` or ``name:config``.
        columns: The columns that the user named.
        progress: Shows that a download is going on.

    Returns:
        Its rows.

    Raises:
        UsageError: If there is no such dataset or config.
        RunError: If the Hub cannot be reached and the dataset is not cached.
    """
    import datasets

    name, _, config = reference.partition(":")
    datasets.disable_progress_bars()
    try:
        with progress.stage(f"fetch {reference}", total=1), _quiet_retries():
            content = datasets.load_dataset(name, config or None)
    except (datasets.exceptions.DatasetNotFoundError, ValueError) as error:
        raise UsageError(
            f"{reference}: no domain card, no file, and no dataset of the Hub ({_first_line(error)}); "
            "see `l2a domains list`, check the path, or write name:config"
        ) from error
    except (OSError, RuntimeError) as error:
        raise RunError(
            f"{reference}: the Hugging Face Hub cannot give this dataset and it is not cached "
            f"({_first_line(error)}); connect once, or give a file"
        ) from error
    return _raw_domain(reference, content, columns)


@contextmanager
def _quiet_retries() -> Iterator[None]:
    """Without a network the Hub's client logs every retry; the error that follows says it once."""
    client = logging.getLogger("huggingface_hub")
    before = client.level
    client.setLevel(logging.ERROR)
    try:
        yield
    finally:
        client.setLevel(before)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _raw_domain(name: str, content: Any, columns: Columns) -> RawDomain:
    """One dataset has no splits of its own (but may have a split column); a dictionary names them."""
    if not isinstance(content, dict):
        return _merge(name, [(None, _table(content, name))], columns)
    if list(content) == ["train"]:
        return _merge(name, [(None, _table(content["train"], f"{name} train"))], columns)
    tables: list[tuple[SplitName | None, Table]] = []
    for split, dataset in content.items():
        if split not in SPLIT_NAMES:
            logger.warning("%s: the split %r is left out; train, dev (or validation) and test are read", name, split)
            continue
        tables.append((SPLIT_NAMES[split], _table(dataset, f"{name} {split}")))
    return _merge(name, tables, columns)


def _merge(name: str, tables: list[tuple[SplitName | None, Table]], columns: Columns) -> RawDomain:
    rows: list[LabelledRow] = []
    problems: list[DataProblem] = []
    files: dict[str, str] = {}
    for split, table in tables:
        if split is not None and _is_unlabelled(table, columns):
            logger.warning("%s has no labels and is left out", table.file)
            continue
        found, wrong = rows_of_table(table, columns)
        rows += [LabelledRow(row.text, row.label, split or row.split) for row in found]
        problems += wrong
        files[table.file] = fingerprint([[*row.text, row.label] for row in found])
    return RawDomain(name, tuple(rows), tuple(problems), files)


def _table(dataset: "Dataset", file: str) -> Table:
    """A dataset as a table; integer classes become their names, and -1, which means unlabelled, becomes None."""
    from datasets import ClassLabel

    classes = {name: feature for name, feature in dataset.features.items() if isinstance(feature, ClassLabel)}
    records = []
    for number, values in enumerate(dataset.to_list(), start=1):
        for name, feature in classes.items():
            value = values[name]
            values[name] = feature.int2str(value) if value is not None and value >= 0 else None
        records.append(Record(number, values))
    return Table(file, tuple(dataset.column_names), tuple(records))


def _is_unlabelled(table: Table, columns: Columns) -> bool:
    found, _ = find_columns(table, columns)
    return found is not None and all(record.values.get(found.label) is None for record in table.records)
