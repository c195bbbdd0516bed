"""Finished cells on disk: one JSON line each, safe against kills, damage and a second runner."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from filelock import FileLock

from l2a.experiments.card import Place
from l2a.util.cards import PACKAGE
from l2a.util.files import atomic_write_text, fingerprint

RESULTS_FILE = "cells.jsonl"
LOCK_FOLDER = ".locks"
CHECKSUM, END = ', "checksum": "', '"}'
logger = logging.getLogger(__name__)


@cache
def code_fingerprint() -> str:
    """Hash the sources of the package, so that a result can say which code made it.

    Returns:
        32 hexadecimal digits, the same for the same files in any folder.
    """
    files = sorted(PACKAGE.rglob("*.py"))
    return fingerprint([[path.relative_to(PACKAGE).as_posix(), path.read_bytes()] for path in files])


@dataclass(frozen=True)
class CellResult:
    """What one cell gave, and everything needed to judge and repeat it.

    Attributes:
        pair: Name of the pair of domains.
        shots: Labelled target examples per class.
        seed: The run's seed.
        student: Student preset.
        variant: Name of the variant in the card.
        method: The method that it is a variant of.
        key: Fingerprint of the configuration and the data; another key means another result.
        preset: The budget.
        accuracy: Fraction on the target's test split.
        macro_f1: Fraction on the target's test split.
        test_examples: Size of that split.
        predictions: Fingerprint of the predicted labels, in the order of the test split.
        parameters: Parameters of the model.
        labels_used: Labelled target examples used, those of the reward and validation splits included.
        seconds: The method's own training and selection, shared teacher work aside.
        wall_seconds: The whole cell, with whatever teacher work it found missing in the cache.
        data: Files read, with their sha256.
        versions: Versions of the packages that decide numbers.
        machine: Cores, memory and device.
        diagnostics: What the method says about its own run.
        code: Fingerprint of the sources of the package that ran it; empty where none was noted.
    """

    pair: str
    shots: int
    seed: int
    student: str
    variant: str
    method: str
    key: str
    preset: str
    accuracy: float
    macro_f1: float
    test_examples: int
    predictions: str
    parameters: int
    labels_used: int
    seconds: float
    wall_seconds: float
    data: Mapping[str, str]
    versions: Mapping[str, str]
    machine: Mapping[str, str | int | float]
    diagnostics: Mapping[str, float | int | str]
    code: str = ""

    @property
    def place(self) -> Place:
        """The cell's place in the grid."""
        return Place(self.pair, self.shots, self.seed, self.student)


def to_line(result: CellResult) -> str:
    """Write a result as one line of JSON that carries its own checksum as its last field.

    Args:
        result: A finished cell.

    Returns:
        The line, without a line break.
    """
    body = json.dumps(asdict(result), ensure_ascii=False, default=float)[:-1]
    return f"{body}{CHECKSUM}{_checksum(body.encode())}{END}"


def from_line(line: bytes) -> CellResult:
    """Read one line, checking that it is what was written.

    Args:
        line: UTF-8 JSON, as made by ``to_line``.

    Returns:
        The finished cell.

    Raises:
        ValueError: If the line is damaged, or of another version of this file.
    """
    body, _, checksum = line.rpartition(CHECKSUM.encode())
    if checksum != f"{_checksum(body)}{END}".encode():
        raise ValueError("the checksum does not match")
    try:
        return CellResult(**json.loads(body + b"}"))
    except TypeError as error:
        raise ValueError(f"the fields do not match: {error}") from error


def _checksum(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:16]


def read_results(folder: Path) -> tuple[CellResult, ...]:
    """Read the finished cells of a card; damaged lines are reported and left out, so that their cells run again.

    Args:
        folder: The card's results folder, which may not exist yet.

    Returns:
        The finished cells, sorted by place and variant.
    """
    path = folder / RESULTS_FILE
    if not path.exists():
        return ()
    results = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            if line.strip():
                results.append(from_line(line))
        except ValueError as error:
            logger.warning("%s line %d is damaged (%s); its cell will run again", path, number, error)
    return tuple(sorted(results, key=_order))


def find_result(folder: Path, key: str) -> CellResult | None:
    """Find a finished cell by what decides it, in a card's results or in those of the cards beside it.

    Args:
        folder: The card's results folder.
        key: The cell's fingerprint.

    Returns:
        The cell, wherever it stands, or None.
    """
    beside = sorted(other for other in folder.parent.glob("*/") if other != folder)
    cells = (result for place in (folder, *beside) for result in read_results(place))
    return next((result for result in cells if result.key == key), None)


def save_result(folder: Path, result: CellResult) -> None:
    """Add a finished cell to the results file in one step; an older result of the same cell is replaced.

    Args:
        folder: The card's results folder; it is created.
        result: The finished cell.

    Raises:
        RunError: If the disk is full; the file keeps its old content.
    """
    with lock_for(folder, "results"):
        others = [known for known in read_results(folder) if _order(known) != _order(result)]
        lines = [to_line(known) for known in sorted([*others, result], key=_order)]
        atomic_write_text(folder / RESULTS_FILE, "\n".join(lines) + "\n")


def lock_for(folder: Path, name: str) -> FileLock:
    """Make a lock that all runners of one results folder share; it opens by itself when its holder dies.

    Args:
        folder: The card's results folder; it is created.
        name: What is locked: a group of cells, or "results" for the file.

    Returns:
        The lock, not yet taken.
    """
    locks = folder / LOCK_FOLDER
    locks.mkdir(parents=True, exist_ok=True)
    if not (locks / ".gitignore").exists():
        atomic_write_text(locks / ".gitignore", "*\n")
    return FileLock(locks / f"{name}.lock")


def _order(result: CellResult) -> tuple[Place, str]:
    return (result.place, result.variant)
