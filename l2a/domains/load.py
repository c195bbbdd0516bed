"""Loading a domain from a card, a file, a folder of splits, a saved dataset or the Hub."""

import re
from dataclasses import replace
from pathlib import Path

from l2a.cards import did_you_mean, find_card, list_cards
from l2a.domains.card import load_card, read_rated_card
from l2a.domains.columns import SPLIT_NAMES, rows_of_table
from l2a.domains.domain import USUAL_COLUMNS, Columns, Domain
from l2a.domains.hub import is_saved_dataset, read_hub_dataset, read_saved_dataset
from l2a.domains.raw import RawDomain, all_problems, to_domain, with_splits
from l2a.domains.rows import Problem, SplitName, refuse
from l2a.domains.tables import SUFFIXES, read_table
from l2a.errors import UsageError
from l2a.files import sha256_file
from l2a.progress import SILENT, Progress

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")


def load_domain(
    reference: str, columns: Columns = USUAL_COLUMNS, data_root: Path | None = None, progress: Progress = SILENT
) -> Domain:
    """Load a domain.

    Args:
        reference: A card's name, a .csv, .tsv, .jsonl or .parquet file, a folder with train.*, dev.* and test.*, a
            folder written by ``datasets``, or a Hub id ``name[:config]``; looked for in this order.
        columns: The columns of a file, folder or Hub dataset; found by their usual names when None.
        data_root: Folder that relative paths start from first; then the working directory.
        progress: Shows downloads.

    Returns:
        The domain, all its labels checked, the test split held back.

    Raises:
        UsageError: If there is no such data or something is wrong with it; names the file and the line.
        RunError: If data cannot be fetched.
    """
    raw = read_raw(reference, columns, data_root, progress)
    refuse(all_problems(raw), reference)
    labels = load_card(reference).labels if reference in list_cards("domains") else None
    return to_domain(raw, labels)


def read_raw(reference: str, columns: Columns, data_root: Path | None, progress: Progress) -> RawDomain:
    """Read the rows behind a reference, with every problem that they have.

    Args:
        reference: As in ``load_domain``.
        columns: As in ``load_domain``.
        data_root: As in ``load_domain``.
        progress: Shows downloads.

    Returns:
        Rows with splits, and problems.

    Raises:
        UsageError: If there is no such data.
        RunError: If data cannot be fetched.
    """
    cards = list_cards("domains")
    if reference in cards:
        return with_splits(_read_card(reference, progress))
    path = find_path(reference, data_root)
    if path is not None:
        return with_splits(read_path(path, columns))
    hint = did_you_mean(reference, cards)
    looks_like_path = Path(reference).suffix.lower() in SUFFIXES or not HUB_ID.fullmatch(reference)
    if hint or looks_like_path:
        kinds = "a domain card, a file, a folder or a Hub id is needed; see `l2a domains list`"
        raise UsageError(f"domain {reference!r}: no such card or path{hint}; {kinds}")
    return with_splits(read_hub_dataset(reference, columns, progress))


def _read_card(name: str, progress: Progress) -> RawDomain:
    card = load_card(name)
    if card.data is None:
        raw = read_rated_card(card, progress)
    else:
        path = find_card("domains", name).parent / Path(card.data).expanduser()
        on_disk = path.exists()
        raw = read_path(path, card.columns) if on_disk else read_hub_dataset(card.data, card.columns, progress)
        raw = replace(raw, name=name)
    labels = {row.label for row in raw.rows}
    if labels and labels != set(card.labels):
        message = f"the card has the labels {sorted(card.labels)}, its data {sorted(labels)}; correct the card"
        raw = replace(raw, problems=(*raw.problems, Problem(name, None, message)))
    return raw


def find_path(reference: str, data_root: Path | None) -> Path | None:
    """Find a file or folder, under the data root first, then under the working directory.

    Args:
        reference: A path; ``~`` is expanded.
        data_root: Folder that relative paths start from first.

    Returns:
        The path that exists, or None.
    """
    path = Path(reference).expanduser()
    roots = [data_root, Path()] if data_root else [Path()]
    return next((root / path for root in roots if (root / path).exists()), None)


def read_path(path: Path, columns: Columns) -> RawDomain:
    """Read a file or a folder.

    Args:
        path: An existing path.
        columns: The columns that the user named.

    Returns:
        Rows, and problems.

    Raises:
        UsageError: If the path is neither a readable file nor a folder of splits.
    """
    if path.is_dir():
        return read_saved_dataset(path, columns) if is_saved_dataset(path) else _read_folder(path, columns)
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path}: the suffix {path.suffix!r} is not known; {', '.join(SUFFIXES)} are read")
    return _read_file(path, columns, None)


def _read_file(path: Path, columns: Columns, split: SplitName | None) -> RawDomain:
    try:
        table = read_table(path)
        digest = sha256_file(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    rows, problems = rows_of_table(table, columns)
    if split is not None:
        rows = [replace(row, split=split) for row in rows]
    return RawDomain(path.stem, tuple(rows), tuple(problems), {path.name: digest})


def _read_folder(folder: Path, columns: Columns) -> RawDomain:
    files = _split_files(folder)
    if "train" not in files:
        kinds = ", ".join(f"train{suffix}" for suffix in SUFFIXES)
        raise UsageError(f"{folder}: no training file; the folder needs one of {kinds} (and dev.*, test.*)")
    name = folder.resolve().name
    if len(files) == 1:  # nothing but train.* is one file, split like any other
        return replace(_read_file(files["train"], columns, None), name=name)
    parts = [_read_file(path, columns, split) for split, path in files.items()]
    rows = tuple(row for part in parts for row in part.rows)
    problems = tuple(problem for part in parts for problem in part.problems)
    sums = {file: digest for part in parts for file, digest in part.files.items()}
    return RawDomain(name, rows, problems, sums)


def _split_files(folder: Path) -> dict[SplitName, Path]:
    files: dict[SplitName, Path] = {}
    for path in sorted(folder.iterdir()):
        split = SPLIT_NAMES.get(path.stem.lower())
        if split is None or path.suffix.lower() not in SUFFIXES:
            continue
        if split in files:
            raise UsageError(f"{folder}: both {files[split].name} and {path.name} are {split} files; keep one")
        files[split] = path
    return files
