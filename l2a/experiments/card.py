"""Experiment cards: a grid of pairs, shots, seeds, students and variants of methods, checked before anything runs."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from l2a.config import Columns, DistillConfig, load_config, override
from l2a.data.bank import unlabelled_files
from l2a.data.domains import load_domain
from l2a.generator.operators import check_operators
from l2a.pipeline.methods import METHODS
from l2a.selector.agents import agent_parts, load_agent
from l2a.util.cards import build, find_card, load_yaml
from l2a.util.errors import UsageError, did_you_mean
from l2a.util.files import fingerprint
from l2a.util.progress import SILENT, Progress

OF_THE_GRID = ("source", "target", "source_columns", "target_columns", "unlabelled", "shots", "seed")
NEVER_DECIDES = {"output_dir", "overwrite", "compare", "report", "data_root", "selector.tensorboard"}
OF_ONE_OPERATOR = {"generator.operator", "generator.copies"}
"""Fields that only a method without a selector reads."""
OF_THE_CHAIN = {f"generator.{name}" for name in ("tau", "beta", "max_degree", "operators", "chains", "burn_in")}
"""Fields that a method of one named operator never reads."""
RESULTS_VERSION = 3
"""Raise it when a change of the code, rather than of a field, changes what cells give: then all run again."""
FORMER_DEFAULTS: Mapping[str, Any] = {}
"""Fields whose default has changed since results were kept, with the value that a key without them stands for."""

DataFiles = Mapping[str, str]


@dataclass(frozen=True)
class Pair:
    """A source domain and the target domain that is short of labels.

    Attributes:
        name: Name in results.
        source: Domain card, or a file or folder relative to the data root.
        target: Domain card, or a file or folder relative to the data root.
        source_columns: Columns of the source; found by their usual names when not given.
        target_columns: Columns of the target, likewise.
        unlabelled: Text without labels for variants that use some: files or folders relative to the data root, domains.
    """

    name: str
    source: str
    target: str
    source_columns: Columns = field(default_factory=Columns)
    target_columns: Columns = field(default_factory=Columns)
    unlabelled: tuple[str, ...] = ()


@dataclass(frozen=True)
class Variant:
    """A method with settings of its own.

    Attributes:
        method: A name in ``l2a.pipeline.methods.METHODS``.
        overrides: Fields of the configuration that differ from the preset, by dotted name; ``{pair}`` in a text stands
            for the pair's name.
        unlabelled: Whether it gets the pair's text without labels.
    """

    method: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    unlabelled: bool = False


@dataclass(frozen=True)
class ExperimentCard:
    """A grid: every pair with every number of shots, seed, student and variant.

    Attributes:
        description: What the grid is to show; it opens the report.
        preset: Card in ``configs/`` that gives every other field: the budget.
        pairs: Pairs of domains.
        variants: What is compared, by its name in results.
        shots: Labelled target examples per class.
        seeds: Seeds of the few labels and of every random draw.
        students: Student presets.
        name: The card's name; by default its file's.
    """

    description: str
    preset: str
    pairs: tuple[Pair, ...]
    variants: Mapping[str, Variant]
    shots: tuple[int, ...] = (32,)
    seeds: tuple[int, ...] = (0, 1, 2)
    students: tuple[str, ...] = ("auto",)
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
    path = Path(reference) if reference.endswith(".yaml") else find_card("configs/experiments", reference)
    card = build(ExperimentCard, {"name": path.stem, **load_yaml(path)}, f"experiment card {path}")
    problems = [*_empty_or_repeated(card), *_wrong_variants(card)]
    if problems:
        raise UsageError(f"experiment card {path}: " + "; ".join(dict.fromkeys(problems)))
    return card


def variant_config(card: ExperimentCard, student: str, variant: str, pair: str) -> DistillConfig:
    """Build the configuration of a variant, without its place in the grid.

    Args:
        card: The card.
        student: Student preset; a variant's own overrides come after it.
        variant: The variant's name.
        pair: The pair's name, for overrides that hold it.

    Returns:
        The preset with the student and the variant's overrides.

    Raises:
        UsageError: For unknown fields and wrong values.
    """
    given = card.variants[variant].overrides
    named = {key: value.replace("{pair}", pair) if isinstance(value, str) else value for key, value in given.items()}
    return override(load_config(card.preset), {"student.preset": student, **named})


def _empty_or_repeated(card: ExperimentCard) -> Iterable[str]:
    for name in ("pairs", "variants", "shots", "seeds", "students"):
        counts = Counter(it.name if isinstance(it, Pair) else it for it in getattr(card, name))
        if not counts:
            yield f"{name}: empty; give at least one entry"
        yield from (f"{name}: {it} is given more than once; give each once" for it, n in counts.items() if n > 1)


def _wrong_variants(card: ExperimentCard) -> Iterable[str]:
    for name, variant in card.variants.items():
        where = f"variants.{name}"
        if variant.method not in METHODS:
            hint = did_you_mean(variant.method, METHODS) or f"; give one of {', '.join(METHODS)}"
            yield f"{where}.method: {variant.method!r} is unknown{hint}"
        elif "unlabelled" in METHODS[variant.method].needs and not variant.unlabelled:
            yield f"{where}: {variant.method} needs unlabelled text; add unlabelled: true"
        for key in variant.overrides:
            if key.split(".")[0] in {*OF_THE_GRID, *NEVER_DECIDES}:
                yield f"{where}: {key} is set by the grid; take it out of the overrides"
        for student, pair in itertools.product(card.students, card.pairs):
            try:
                check_operators(variant_config(card, student, name, pair.name).generator)
            except UsageError as error:
                yield f"{where}: {error}"


class Place(NamedTuple):
    """Where a cell stands in the grid of a card, its variant aside: what paired comparisons match on."""

    pair: str
    shots: int
    seed: int
    student: str


@dataclass(frozen=True)
class Cell:
    """One run of one variant.

    Attributes:
        place: Its place in the grid.
        variant: The variant's name in the card.
        method: The method to run.
        config: The whole configuration.
        preset: The budget that the configuration started from.
    """

    place: Place
    variant: str
    method: str
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
    root = str(data_root.resolve()) if data_root else None
    for seed, shots, pair in itertools.product(card.seeds, card.shots, card.pairs):
        cells = []
        for student, (name, variant) in itertools.product(card.students, card.variants.items()):
            config = replace(
                variant_config(card, student, name, pair.name),
                **{side: getattr(pair, side) for side in ("source", "target", "source_columns", "target_columns")},
                unlabelled=pair.unlabelled if variant.unlabelled else (),
                shots=shots,
                seed=seed,
                data_root=root,
            )
            cells.append(Cell(Place(pair.name, shots, seed, student), name, variant.method, config, card.preset))
        by_source.setdefault(pair.source, []).append(tuple(cells))
    rounds = itertools.zip_longest(*by_source.values())
    return tuple(group for one_round in rounds for group in one_round if group is not None)


def refuse_missing_agents(groups: Iterable[Group]) -> None:
    """Look up every selector before anything runs: a missing policy should not cost the hours before its cell.

    Args:
        groups: The cells.

    Raises:
        UsageError: If an agent's card or policy is missing or wrong.
    """
    cells = (cell for group in groups for cell in group if "selector" in METHODS[cell.method].reads)
    for agent in {cell.config.selector.agent for cell in cells}:
        load_agent(agent)


def cell_key(cell: Cell, data: DataFiles) -> str:
    """Fingerprint everything that decides a cell's result.

    A cell keeps its key when only settings change that its method never reads, and when a field with a default is
    added, to the configuration or to the agents' cards. Of an agent, what decides its choices counts.

    Args:
        cell: The cell.
        data: Names and sha256 of its pair's files.

    Returns:
        32 hexadecimal digits.
    """
    method, defaults = METHODS[cell.method], {**_flat(DistillConfig()), **FORMER_DEFAULTS}
    unread = set(NEVER_DECIDES)
    if "selector" in method.reads:
        unread |= OF_ONE_OPERATOR
    elif cell.config.generator.operator is not None:
        unread |= OF_THE_CHAIN
    sections = {section for other in METHODS.values() for section in other.reads} - set(method.reads)
    decisive = {
        name: value
        for name, value in _flat(cell.config).items()
        if name not in unread and name.split(".")[0] not in sections and value != defaults[name]
    }
    agent = agent_parts(cell.config.selector.agent) if "selector" in method.reads else {}
    return fingerprint([RESULTS_VERSION, cell.method, decisive, cell_files(cell, data), agent])


def _flat(config: DistillConfig) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in asdict(config).items():
        flat |= {f"{name}.{key}": it for key, it in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def data_files(groups: Iterable[Group], progress: Progress = SILENT) -> dict[str, DataFiles]:
    """Read everything that a grid reads once and note the sha256 of the files; test labels stay held back.

    Args:
        groups: Groups of one card.
        progress: Told about the reading.

    Returns:
        The files of source, target and unlabelled text, by name of the pair.

    Raises:
        UsageError: If a domain cannot be read.
        RunError: If a shipped domain cannot be fetched.
    """

    @cache
    def files_of(reference: str, columns: Columns | None, folder: Path | None) -> DataFiles:
        if columns is None:
            files = unlabelled_files([reference], folder, progress)
        else:
            files = load_domain(reference, columns, folder, progress, "columns in the card").files
        # Named after the card's reference, since both domains may be folders that hold a train.csv.
        return {reference if reference.endswith(name) else f"{reference}/{name}": files[name] for name in files}

    found: dict[str, Mapping[str, str]] = {}
    with progress.stage("read domains"):
        for cell in itertools.chain.from_iterable(groups):
            config, pair = cell.config, cell.place.pair
            source = files_of(config.source or "", config.source_columns, config.data_folder)
            target = files_of(config.target, config.target_columns, config.data_folder)
            texts = [files_of(reference, None, config.data_folder) for reference in config.unlabelled]
            for files in (source, target, *texts):
                found[pair] = {**found.get(pair, {}), **files}
    return found


def cell_files(cell: Cell, data: DataFiles) -> dict[str, str]:
    """Choose the files that a cell reads.

    Args:
        cell: The cell.
        data: Names and sha256 of its pair's files.

    Returns:
        Those of source and target, and of the unlabelled text if the method reads it.
    """
    read = [cell.config.source, cell.config.target]
    read += cell.config.unlabelled if "unlabelled" in METHODS[cell.method].reads else ()
    return {name: data[name] for name in data if any(name == it or name.startswith(f"{it}/") for it in read)}
