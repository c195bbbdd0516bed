"""Looking a domain over before it is used: sizes, balance, lengths, copies, and everything that is wrong."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from l2a.domains.domain import USUAL_COLUMNS, Columns
from l2a.domains.load import read_raw
from l2a.domains.raw import all_problems
from l2a.domains.rows import SPLITS, Problem, Row, SplitName
from l2a.examples import normalised_hash
from l2a.progress import SILENT, Progress


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
    problems: tuple[Problem, ...]


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


def _split_report(split: SplitName, rows: Sequence[Row], hashes: Sequence[str]) -> SplitReport:
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


def _contradictions(rows: Sequence[Row]) -> int:
    labels: dict[str, set[str]] = {}
    for row in rows:
        labels.setdefault(normalised_hash(row.text), set()).add(row.label)
    return sum(len(names) > 1 for names in labels.values())
