"""Experiment cards: a grid of pairs, shots, seeds, students and methods, checked before anything runs."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from l2a.config import Columns, DistillConfig, as_mapping, load_config, override
from l2a.data.domains import load_domain, read_unlabelled
from l2a.experiments.results import Place
from l2a.selector.agents import agent_files, load_agent
from l2a.util.cache import fingerprint
from l2a.util.cards import build, find_card, load_yaml
from l2a.util.errors import UsageError
from l2a.util.progress import SILENT, Progress

CARDS = "configs/experiments"
RowName = Literal[
    "target_only_teacher",
    "cross_domain_teacher",
    "tfidf_logreg",
    "frozen_teacher_logreg",
    "vector_sum_logreg",
    "cut_vector_sum_logreg",
    "plain_kd_student",
    "plain_kd_unlabelled_student",
    "l2a_without_unlabelled_student",
    "augmented_kd_student",
    "augmented_fine_tuned_student",
    "l2a_student",
]
ROWS: tuple[str, ...] = get_args(RowName)
SET_BY_THE_GRID = (
    "source",
    "target",
    "source_columns",
    "target_columns",
    "unlabelled",
    "shots",
    "seed",
    "data_root",
    "output_dir",
    "overwrite",
    "compare",
)


@dataclass(frozen=True)
class Pair:
    """A source domain and the target domain that is short of labels.

    Attributes:
        name: Name in results.
        source: Domain card, or a file or folder relative to the data root.
        target: Domain card, or a file or folder relative to the data root.
        source_columns: Columns of the source; found by their usual names when not given.
        target_columns: Columns of the target, likewise.
        unlabelled: Text without labels for methods that use some: a .txt file relative to the data root, or a domain.
    """

    name: str
    source: str
    target: str
    source_columns: Columns = field(default_factory=Columns)
    target_columns: Columns = field(default_factory=Columns)
    unlabelled: str | None = None


@dataclass(frozen=True)
class Method:
    """One way to get a model.

    Attributes:
        row: Row of the final table of ``l2a distill`` that this method is.
        overrides: Fields of the configuration that differ from the preset, by dotted name; ``{pair}`` in a text stands
            for the pair's name.
        unlabelled: Whether the method gets the pair's text without labels.
    """

    row: RowName
    overrides: Mapping[str, Any] = field(default_factory=dict)
    unlabelled: bool = False


@dataclass(frozen=True)
class ExperimentCard:
    """A grid: every pair with every number of shots, seed, student and method.

    Attributes:
        description: What the grid is to show; it opens the report.
        preset: Card in ``configs/`` that gives every other field: the budget.
        pairs: Pairs of domains.
        methods: Methods by their name in results.
        shots: Labelled target examples per class.
        seeds: Seeds of the few labels and of every random draw.
        students: Student presets.
        same_methods_in: Another card with the same methods at another budget; the report then says whether both
            budgets rank the methods alike.
        name: The card's name; by default its file's.
    """

    description: str
    preset: str
    pairs: tuple[Pair, ...]
    methods: Mapping[str, Method]
    shots: tuple[int, ...] = (32,)
    seeds: tuple[int, ...] = (0, 1, 2)
    students: tuple[str, ...] = ("auto",)
    same_methods_in: str | None = None
    name: str = ""


def load_experiment(reference: str) -> ExperimentCard:
    """Read a card and check it whole, overrides included.

    Args:
        reference: Name of a card in ``configs/experiments``, or a path that ends in ``.yaml``.

    Returns:
        The card.

    Raises:
        UsageError: For unknown keys with "did you mean", wrong values, empty or repeated entries; all at once.
    """
    path = Path(reference) if reference.endswith(".yaml") else find_card(CARDS, reference)
    card = build(ExperimentCard, {"name": path.stem, **load_yaml(path)}, f"experiment card {path}")
    problems = _empty_or_repeated(card) or _wrong_overrides(card)
    if problems:
        raise UsageError(f"experiment card {path}: " + "; ".join(problems))
    return card


def method_config(card: ExperimentCard, student: str, method: str, pair: str) -> DistillConfig:
    """Build the configuration of a method, without its place in the grid.

    Args:
        card: The card.
        student: Student preset; a method's own overrides come after it.
        method: The method's name.
        pair: The pair's name, for overrides that hold it.

    Returns:
        The preset with the student and the method's overrides.

    Raises:
        UsageError: For unknown fields and wrong values.
    """
    given = card.methods[method].overrides
    named = {key: value.replace("{pair}", pair) if isinstance(value, str) else value for key, value in given.items()}
    return override(load_config(card.preset), {"student.preset": student, **named})


def _empty_or_repeated(card: ExperimentCard) -> list[str]:
    axes: dict[str, list[Any]] = {
        "pairs": [pair.name for pair in card.pairs],
        "methods": list(card.methods),
        "shots": list(card.shots),
        "seeds": list(card.seeds),
        "students": list(card.students),
    }
    problems = [f"{name}: empty; at least one entry is needed" for name, values in axes.items() if not values]
    for name, values in axes.items():
        repeated = sorted({str(value) for value in values if values.count(value) > 1})
        problems += [f"{name}: {value} comes more than once; give each once" for value in repeated]
    return problems


def _wrong_overrides(card: ExperimentCard) -> list[str]:
    problems: dict[str, None] = {}  # one method may fail alike with every student: say it once
    for name, method in card.methods.items():
        for field_name in method.overrides:
            if field_name.split(".")[0] in SET_BY_THE_GRID:
                problems[f"methods.{name}: {field_name} is set by the grid and cannot be overridden"] = None
        for student, pair in itertools.product(card.students, card.pairs):
            try:
                method_config(card, student, name, pair.name)
            except UsageError as error:
                problems[f"methods.{name}: {error}"] = None
    return list(problems)


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
            sides = ((config.source or "", config.source_columns), (config.target, config.target_columns))
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
    return _named_after(reference, load_domain(reference, columns, data_folder, progress, "columns in the card").files)


def _named_after(reference: str, files: DataFiles) -> DataFiles:
    """Name files by the card's reference, since both domains may be folders that hold a train.csv."""
    return {reference if reference.endswith(name) else f"{reference}/{name}": files[name] for name in files}
