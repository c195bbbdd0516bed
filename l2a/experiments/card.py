"""Experiment cards: a grid of pairs, shots, seeds, students and methods, checked before anything runs."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from l2a.cards import build, find_card, load_yaml
from l2a.config import DistillConfig, load_config, override
from l2a.domains.domain import Columns
from l2a.errors import UsageError

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
