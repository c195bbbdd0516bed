"""Cells of a grid: their configurations, their order and the keys that decide whether a result still holds."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from l2a.cache import fingerprint
from l2a.config import DistillConfig, as_mapping
from l2a.domains.domain import Columns
from l2a.domains.load import load_domain
from l2a.domains.unlabelled import read_unlabelled
from l2a.experiments.card import ExperimentCard, Pair, method_config
from l2a.experiments.results import Place
from l2a.progress import SILENT, Progress
from l2a.selector.agents import agent_files, load_agent

RESULTS_VERSION = 1
"""Raise it when a change of the code, rather than of a field, changes what cells give: then all run again."""

NEVER_DECIDES = ("output_dir", "overwrite", "compare", "data_root")
READ_BY_ONE_OPERATOR = ("operator", "copies")
"""Fields of the generator that only the row of one operator without a selector reads."""
READ_BY_THE_CHAIN = ("density", "tau", "beta", "max_degree", "operators", "mix_variant", "chains", "burn_in")
"""Fields of the generator that a row of one named operator never reads."""
ROWS_OF_ONE_OPERATOR = ("augmented_kd_student", "augmented_fine_tuned_student")
AUGMENTATION = ("generator", "selector")
STUDENT = ("student", "kd")

READ_UNLABELLED = ("l2a_student", "plain_kd_unlabelled_student")

DataFiles = Mapping[str, str]


@dataclass(frozen=True)
class Cell:
    """One run of one method.

    Attributes:
        place: Its place in the grid.
        method: The method's name in the card.
        row: The row to run.
        config: The whole configuration.
        preset: The budget that the configuration started from.
    """

    place: Place
    method: str
    row: str
    config: DistillConfig
    preset: str


Group = tuple[Cell, ...]
"""The cells of one pair, number of shots and seed: they share their teachers and run one after another."""


def expand(card: ExperimentCard, data_root: Path | None) -> tuple[Group, ...]:
    """List the cells of a card, grouped and in the order in which they should run.

    A group's cells run in the card's order, so that what they share through the cache is filled in one order whatever
    runs beside them. Groups that share a source stand apart, so that the first few train different source teachers
    side by side and those that follow find them in the cache, instead of waiting for one another.

    Args:
        card: The card.
        data_root: Folder that relative data paths start from.

    Returns:
        All groups.
    """
    by_source: dict[str, list[Group]] = {}
    for seed, shots, pair in itertools.product(card.seeds, card.shots, card.pairs):
        by_source.setdefault(pair.source, []).append(_group(card, pair, shots, seed, data_root))
    rounds = itertools.zip_longest(*by_source.values())
    return tuple(group for one_round in rounds for group in one_round if group is not None)


def data_files(groups: Iterable[Group], progress: Progress = SILENT) -> dict[str, DataFiles]:
    """Read every domain of a grid once and note the sha256 of its files; test labels stay held back.

    Args:
        groups: Groups of one card.
        progress: Told about the reading.

    Returns:
        The files of source and target, by name of the pair.

    Raises:
        UsageError: If a domain cannot be read.
        RunError: If a shipped domain cannot be fetched.
    """
    known: dict[tuple[str, Columns], DataFiles] = {}
    found: dict[str, DataFiles] = {}
    with progress.stage("read domains"):
        for cell in (group[0] for group in groups):
            config = cell.config
            sides = ((config.source, config.source_columns), (config.target, config.target_columns))
            for side in sides:
                if side not in known:
                    known[side] = _files_of(*side, config.data_folder, progress)
            found[cell.place.pair] = {**known[sides[0]], **known[sides[1]]}
    return found


def refuse_missing_agents(groups: Iterable[Group]) -> None:
    """Look up every selector before anything runs: a missing policy should not cost the hours before its cell.

    Args:
        groups: The cells.

    Raises:
        UsageError: If an agent's card or policy is missing or wrong.
    """
    for agent in {cell.config.selector.agent for group in groups for cell in group if cell.row.startswith("l2a")}:
        load_agent(agent)


def cell_key(cell: Cell, data: DataFiles) -> str:
    """Fingerprint everything that decides a cell's result.

    A row keeps its key when only settings change that it never reads. The selector's card, and its policy where it
    has one, count by their content.

    Args:
        cell: The cell.
        data: Names and sha256 of its data files.

    Returns:
        32 hexadecimal digits.
    """
    ignored = {*NEVER_DECIDES, *_unread_sections(cell.row)}
    decisive: dict[str, Any] = {key: value for key, value in as_mapping(cell.config).items() if key not in ignored}
    if decisive["source_size"] is None:
        del decisive["source_size"]  # results from before there was this field hold
    if "generator" in decisive:
        unread = _unread_by_generator(cell)
        decisive["generator"] = {key: value for key, value in decisive["generator"].items() if key not in unread}
    parts = [RESULTS_VERSION, cell.row, decisive, dict(cell_files(cell, data))]
    if "selector" in decisive:
        decisive["selector"].pop("tensorboard")  # it only shows a training
        parts.append(agent_files(cell.config.selector.agent))
    return fingerprint(*parts)


def cell_files(cell: Cell, data: DataFiles) -> DataFiles:
    """Name the files that a cell reads.

    Args:
        cell: The cell.
        data: Files of its source and target, those of its unlabelled text perhaps among them.

    Returns:
        Names and sha256, those of its unlabelled text included.
    """
    config = cell.config
    if config.unlabelled is None or cell.row not in READ_UNLABELLED:
        return data
    if any(name == config.unlabelled or name.startswith(f"{config.unlabelled}/") for name in data):
        return data  # as a finished cell notes them: a report needs no files
    return {**data, **_unlabelled_files(config.unlabelled, config.data_folder)}


@cache
def _unlabelled_files(reference: str, data_folder: Path | None) -> DataFiles:
    return _named_after(reference, read_unlabelled(reference, data_folder)[1])


def _unread_sections(row: str) -> tuple[str, ...]:
    if not row.endswith("_student"):
        return (*AUGMENTATION, *STUDENT, "unlabelled")
    if row in ROWS_OF_ONE_OPERATOR:
        return ("selector",)
    unread = () if row.startswith("l2a") else AUGMENTATION
    return unread if row in READ_UNLABELLED else (*unread, "unlabelled")


def _unread_by_generator(cell: Cell) -> tuple[str, ...]:
    if cell.row not in ROWS_OF_ONE_OPERATOR:
        return READ_BY_ONE_OPERATOR
    return READ_BY_THE_CHAIN if cell.config.generator.operator is not None else ()


def _group(card: ExperimentCard, pair: Pair, shots: int, seed: int, data_root: Path | None) -> Group:
    cells = []
    for student, method in itertools.product(card.students, card.methods):
        config = replace(
            method_config(card, student, method, pair.name),
            source=pair.source,
            target=pair.target,
            source_columns=pair.source_columns,
            target_columns=pair.target_columns,
            unlabelled=pair.unlabelled if card.methods[method].unlabelled else None,
            shots=shots,
            seed=seed,
            data_root=str(data_root.resolve()) if data_root else None,
        )
        place = Place(pair.name, shots, seed, student)
        cells.append(Cell(place, method, card.methods[method].row, config, card.preset))
    return tuple(cells)


def _files_of(reference: str, columns: Columns, data_folder: Path | None, progress: Progress) -> DataFiles:
    return _named_after(reference, load_domain(reference, columns, data_folder, progress).files)


def _named_after(reference: str, files: DataFiles) -> DataFiles:
    """Name files by the card's reference, since both domains may be folders that hold a train.csv."""
    return {reference if reference.endswith(name) else f"{reference}/{name}": files[name] for name in files}
