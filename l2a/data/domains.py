"""Loading a domain from a card, a file, a folder of splits, a saved dataset or the Hub."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np

from l2a.config import Columns
from l2a.data.domain_cards import load_card, read_rated_card
from l2a.data.examples import USUAL_COLUMNS, Domain, TextInput, normalised_hash
from l2a.data.hub import is_saved_dataset, read_hub_dataset, read_saved_dataset
from l2a.data.readers import (
    SPLIT_NAMES,
    SPLITS,
    SUFFIXES,
    DataProblem,
    LabelledRow,
    SplitName,
    read_table,
    refuse,
    rows_of_table,
)
from l2a.data.splits import RawDomain, all_problems, to_domain, with_splits
from l2a.util.cards import did_you_mean, find_card, list_cards
from l2a.util.errors import UsageError
from l2a.util.files import sha256_file
from l2a.util.progress import SILENT, Progress

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
        raw = replace(raw, problems=(*raw.problems, DataProblem(name, None, message)))
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


def read_unlabelled(
    reference: str, data_root: Path | None = None, progress: Progress = SILENT
) -> tuple[tuple[TextInput, ...], Mapping[str, str]]:
    """Read text whose labels, if it has any, are not used.

    Args:
        reference: A .txt file with one text a line (the sides of a pair separated by a tab), or a domain, of which the
            training texts are read.
        data_root: Folder that relative paths start from first.
        progress: Shows downloads.

    Returns:
        The texts in order, and the names of the files read with their sha256.

    Raises:
        UsageError: If there is no such text.
        RunError: If a domain cannot be fetched.
    """
    if not reference.endswith(".txt"):
        domain = load_domain(reference, USUAL_COLUMNS, data_root, progress)
        return domain.train.inputs, domain.files
    path = find_path(reference, data_root) or Path(reference)
    return read_text_file(path), {path.name: sha256_file(path)}


def read_text_file(path: Path) -> tuple[TextInput, ...]:
    """Read a plain text file that holds one text a line; a tab separates the sides of a pair.

    Args:
        path: A UTF-8 file.

    Returns:
        The lines that are not blank.

    Raises:
        UsageError: If the file is missing, is not UTF-8 or holds no text.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError as error:
        raise UsageError(f"text {path}: no such file; give a .txt file with one text a line, or a domain") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"text {path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    texts = tuple(_sides(line) for line in lines if line.strip())
    if not texts:
        raise UsageError(f"text {path}: the file holds no text; one text a line is needed")
    return texts


def _sides(line: str) -> TextInput:
    first, tab, second = line.strip().partition("\t")
    return (first.strip(), second.strip()) if tab and second.strip() else (line.strip(),)


@dataclass(frozen=True)
class SplitReport:
    """What one split holds.

    Attributes:
        split: train, dev or test.
        size: Number of examples.
        label_counts: Examples by class name.
        median_words: Median number of words; both texts of a pair count.
        longest_words: Words of the longest example.
        longest_characters: Characters of the longest example.
        duplicates: Examples whose text came before in the split, apart from case, width and spacing.
    """

    split: SplitName
    size: int
    label_counts: Mapping[str, int]
    median_words: int
    longest_words: int
    longest_characters: int
    duplicates: int


@dataclass(frozen=True)
class Overlap:
    """Texts that stand in two splits.

    Attributes:
        first: One split.
        second: The other.
        texts: Number of different texts that both have.
    """

    first: SplitName
    second: SplitName
    texts: int


@dataclass(frozen=True)
class DomainReport:
    """What a check found.

    Attributes:
        name: Name of the domain.
        is_pair: Whether inputs are pairs of texts.
        label_names: All class names, sorted.
        splits: The splits that have examples.
        overlaps: Pairs of splits that share texts.
        contradictions: Number of texts that carry different labels in different rows.
        problems: What makes the data unusable, in the order of the file.
    """

    name: str
    is_pair: bool
    label_names: tuple[str, ...]
    splits: tuple[SplitReport, ...]
    overlaps: tuple[Overlap, ...]
    contradictions: int
    problems: tuple[DataProblem, ...]


def check_domain(
    reference: str, columns: Columns = USUAL_COLUMNS, data_root: Path | None = None, progress: Progress = SILENT
) -> DomainReport:
    """Read a domain and describe it, good or bad.

    Args:
        reference: As in ``load_domain``.
        columns: As in ``load_domain``.
        data_root: As in ``load_domain``.
        progress: Shows downloads.

    Returns:
        The report; rows with problems are left out of its numbers.

    Raises:
        UsageError: If there is no such data.
        RunError: If data cannot be fetched.
    """
    raw = read_raw(reference, columns, data_root, progress)
    by_split = {split: [row for row in raw.rows if row.split == split] for split in SPLITS}
    hashes = {split: [normalised_hash(row.text) for row in rows] for split, rows in by_split.items()}
    return DomainReport(
        name=raw.name,
        is_pair=bool(raw.rows) and len(raw.rows[0].text) == 2,
        label_names=tuple(sorted({row.label for row in raw.rows})),
        splits=tuple(_split_report(split, rows, hashes[split]) for split, rows in by_split.items() if rows),
        overlaps=_overlaps(hashes),
        contradictions=_contradictions(raw.rows),
        problems=tuple(all_problems(raw)),
    )


def _split_report(split: SplitName, rows: Sequence[LabelledRow], hashes: Sequence[str]) -> SplitReport:
    words = [sum(len(part.split()) for part in row.text) for row in rows]
    return SplitReport(
        split=split,
        size=len(rows),
        label_counts=dict(sorted(Counter(row.label for row in rows).items())),
        median_words=int(np.median(words)),
        longest_words=max(words),
        longest_characters=max(sum(map(len, row.text)) for row in rows),
        duplicates=len(hashes) - len(set(hashes)),
    )


def _overlaps(hashes: Mapping[SplitName, Sequence[str]]) -> tuple[Overlap, ...]:
    shared = ((first, second, len({*hashes[first]} & {*hashes[second]})) for first, second in combinations(SPLITS, 2))
    return tuple(Overlap(first, second, texts) for first, second, texts in shared if texts)


def _contradictions(rows: Sequence[LabelledRow]) -> int:
    labels: dict[str, set[str]] = {}
    for row in rows:
        labels.setdefault(normalised_hash(row.text), set()).add(row.label)
    return sum(len(names) > 1 for names in labels.values())
