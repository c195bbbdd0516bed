"""Experiment cards: a grid of pairs, shots, seeds and variants of methods, checked before anything runs."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from l2a.config import Columns, DistillConfig, load_config, override
from l2a.data import bank, load_domain
from l2a.generator.operators import check_operators
from l2a.pipeline.methods import METHODS
from l2a.selector.agents import agent_parts, check_agent
from l2a.util import SILENT, Progress, UsageError, build, did_you_mean, files, find_card, fingerprint, load_yaml

NEVER_DECIDES = {"output_dir", "overwrite", "compare", "report", "data_root"}
RESULTS_VERSION = 3
"""Raise it when a change of the code, rather than of a field, changes what cells give: then all run again."""
FORMER_DEFAULTS: Mapping[str, Any] = {}
"""Fields whose default has changed since results were kept, with the value that a key without them stands for."""
DataFiles = Mapping[str, str]
"""The sha256 of files by their names."""


@dataclass(frozen=True)
class Pair:
    """A source domain and the target that is short of labels: cards, or files or folders from the data root on."""

    name: str
    source: str
    target: str
    source_columns: Columns = field(default_factory=Columns)
    target_columns: Columns = field(default_factory=Columns)
    unlabelled: tuple[str, ...] = ()  # text for the variants that use some


@dataclass(frozen=True)
class Variant:
    """A method with settings of its own."""

    method: str
    overrides: Mapping[str, Any] = field(default_factory=dict)  # by dotted name; {pair} in a text is the pair's name
    unlabelled: bool = False  # whether it gets the pair's text without labels


@dataclass(frozen=True)
class ExperimentCard:
    """A grid: every pair with every number of shots per class, seed and variant."""

    description: str  # it opens the report
    preset: str  # the card in configs/ that gives every other field: the budget
    pairs: tuple[Pair, ...]
    variants: Mapping[str, Variant]  # by their names in results
    shots: tuple[int, ...] = (32,)
    seeds: tuple[int, ...] = (0, 1, 2)
    name: str = ""  # by default its file's


def load_experiment(reference: str) -> ExperimentCard:
    """Read a card, by its name in ``configs/experiments`` or a path to a ``.yaml``, and check it whole, with overrides.

    Raises:
        UsageError: For unknown keys with "did you mean", wrong values, empty or repeated entries; all at once.
    """
    path = Path(reference) if reference.endswith(".yaml") else find_card("configs/experiments", reference)
    card = build(ExperimentCard, {"name": path.stem, **load_yaml(path)}, f"experiment card {path}")
    if problems := dict.fromkeys(_problems(card)):
        raise UsageError(f"experiment card {path}: " + "; ".join(problems))
    return card


def variant_config(card: ExperimentCard, variant: str, pair: str) -> DistillConfig:
    """Build the configuration of a variant, without its place in the grid: the preset and its overrides."""
    given = card.variants[variant].overrides
    named = {key: value.replace("{pair}", pair) if isinstance(value, str) else value for key, value in given.items()}
    return override(load_config(card.preset), named)


def _problems(card: ExperimentCard) -> Iterable[str]:
    for name in ("pairs", "variants", "shots", "seeds"):
        given = [it.name if isinstance(it, Pair) else it for it in getattr(card, name)]
        if not given:
            yield f"{name}: empty; give at least one entry"
        yield from (f"{name}: {it} is given more than once; give each once" for it in given if given.count(it) > 1)
    if files.leads_out(card.name) or "/" in card.name:
        yield f"name is {card.name!r}; give the name of a folder"
    of_the_grid = {"source", "target", "source_columns", "target_columns", "unlabelled", "shots", "seed"}
    for name, variant in card.variants.items():
        where = f"variants.{name}"
        if variant.method not in METHODS:
            hint = did_you_mean(variant.method, METHODS) or f"; give one of {', '.join(METHODS)}"
            yield f"{where}.method: {variant.method!r} is unknown{hint}"
        elif "unlabelled" in METHODS[variant.method].needs and not variant.unlabelled:
            yield f"{where}: {variant.method} needs unlabelled text; add unlabelled: true"
        for key in variant.overrides:
            if key.split(".")[0] in of_the_grid | NEVER_DECIDES:
                yield f"{where}: {key} is set by the grid; take it out of the overrides"
        for pair in card.pairs:
            try:
                check_operators(variant_config(card, name, pair.name).generator)
            except UsageError as error:
                yield f"{where}: {error}"


class Place(NamedTuple):
    """Where a cell stands in the grid of a card."""

    pair: str
    shots: int
    seed: int
    variant: str

    @property
    def name(self) -> str:
        """What ``--only`` looks into."""
        return f"{self.pair} {self.shots} {self.seed} {self.variant}"


@dataclass(frozen=True)
class Cell:
    """One run of one method with its whole configuration, which started from the preset."""

    place: Place
    method: str
    config: DistillConfig
    preset: str


Group = tuple[Cell, ...]
"""The cells of one pair, number of shots and seed: they share their teachers and run one after another."""


def expand(card: ExperimentCard, data_root: Path | None) -> tuple[Group, ...]:
    """List a card's cells in groups, in the order of the run; relative data paths start from ``data_root``.

    A group's cells run in the card's order, so that what they share through the cache is filled in one order whatever
    runs beside them. Groups that share a source stand apart, so that the first few train different source teachers side
    by side and those that follow find them in the cache, instead of waiting for one another.
    """
    by_source: dict[str, list[Group]] = {}
    settings = cache(lambda variant, pair: variant_config(card, variant, pair))  # the same for all seeds and shots
    for seed, shots, pair in itertools.product(card.seeds, card.shots, card.pairs):
        of_pair = {side: getattr(pair, side) for side in ("source", "target", "source_columns", "target_columns")}
        of_pair |= {"shots": shots, "seed": seed, "data_root": str(data_root.resolve()) if data_root else None}
        cells = []
        for name, variant in card.variants.items():
            texts = pair.unlabelled if variant.unlabelled else ()
            config = replace(settings(name, pair.name), **of_pair, unlabelled=texts)
            cells.append(Cell(Place(pair.name, shots, seed, name), variant.method, config, card.preset))
        by_source.setdefault(pair.source, []).append(tuple(cells))
    rounds = itertools.zip_longest(*by_source.values())
    return tuple(group for one_round in rounds for group in one_round if group is not None)


def choose(groups: Sequence[Group], only: Sequence[str]) -> tuple[Group, ...]:
    """Choose the cells whose name, "pair shots seed variant", contains one of the texts.

    Raises:
        UsageError: If no name does.
    """
    chosen = [tuple(cell for cell in group if any(text in cell.place.name for text in only)) for group in groups]
    if not any(chosen):
        example = f"no cell's name contains it; names are 'pair shots seed variant', as in '{groups[0][0].place.name}'"
        raise UsageError(f"--only is {', '.join(map(repr, only))}, but {example}")
    return tuple(group for group in chosen if group)


def refuse_missing_agents(groups: Iterable[Group]) -> None:
    """Look up every selector before anything runs: a missing policy should not cost the hours before its cell.

    Raises:
        UsageError: If an agent's card or policy is missing or wrong.
    """
    cells = (cell for group in groups for cell in group if "selector" in METHODS[cell.method].reads)
    for agent in {cell.config.selector.agent for cell in cells}:
        check_agent(agent)


def cell_key(cell: Cell, data: DataFiles) -> str:
    """Fingerprint everything that decides a cell's result, its pair's files included, to 32 hexadecimal digits.

    A cell keeps its key when only settings change that its method never reads, and when a field with a default is
    added, to the configuration or to the agents' cards. Of an agent, what decides its choices counts.
    """
    method, defaults = METHODS[cell.method], {**_flat(DistillConfig()), **FORMER_DEFAULTS}
    unread, selects = set(NEVER_DECIDES), "selector" in method.reads
    if selects:
        unread |= {"generator.operator", "generator.copies"}
    elif cell.config.generator.operator is not None:  # one operator makes all texts, without a chain
        unread |= {f"generator.{name}" for name in ("tau", "beta", "max_degree", "operators", "chains", "burn_in")}
    sections = {section for other in METHODS.values() for section in other.reads} - set(method.reads)
    decisive = {
        name: value for name, value in _flat(cell.config).items()
        if name not in unread and name.split(".")[0] not in sections and value != defaults[name]
    }  # fmt: skip
    agent = agent_parts(cell.config.selector.agent) if selects else {}
    return fingerprint([RESULTS_VERSION, cell.method, decisive, cell_files(cell, data), agent])


def _flat(config: DistillConfig) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in asdict(config).items():
        flat |= {f"{name}.{key}": it for key, it in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def data_files(groups: Iterable[Group], progress: Progress = SILENT) -> dict[str, dict[str, str]]:
    """Read everything that the cells read once and note the sha256 of the files; test labels stay held back.

    Returns:
        The files of source, target and unlabelled text, by name of the pair.

    Raises:
        UsageError: If a domain cannot be read.
        RunError: If a shipped domain cannot be fetched.
    """

    @cache
    def files_of(reference: str, columns: Columns | None, folder: str | None) -> DataFiles:
        if columns is None:
            files = bank.unlabelled_files([reference], folder, progress)
        else:
            files = load_domain(reference, columns, folder, progress, "columns in the card").files
        # Named after the card's reference, since both domains may be folders that hold a train.csv.
        return {reference if reference.endswith(name) else f"{reference}/{name}": files[name] for name in files}

    found: dict[str, dict[str, str]] = {}
    with progress.stage("read domains"):
        for cell in itertools.chain.from_iterable(groups):
            config, files = cell.config, found.setdefault(cell.place.pair, {})
            sides = ((config.source or "", config.source_columns), (config.target, config.target_columns))
            for reference, columns in (*sides, *((text, None) for text in config.unlabelled)):
                files |= files_of(reference, columns, config.data_root)
    return found


def cell_files(cell: Cell, data: DataFiles) -> dict[str, str]:
    """Choose the files that a cell reads: source and target, and the unlabelled text if its method reads it."""
    read = [cell.config.source, cell.config.target]
    read += cell.config.unlabelled if "unlabelled" in METHODS[cell.method].reads else ()
    return {name: data[name] for name in data if any(name == it or name.startswith(f"{it}/") for it in read)}
