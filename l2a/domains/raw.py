"""Labelled rows of one domain before they are split, and the rules that make them a domain."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from l2a.cards import did_you_mean
from l2a.domains.domain import Domain, HeldOut
from l2a.domains.rows import SPLITS, Problem, Row, SplitName, to_examples
from l2a.domains.splits import hashed_split, text_key

DEV_PART_OF_TRAIN = 8  # an eighth of 80 % of the data is 10 % of all of it


@dataclass(frozen=True)
class RawDomain:
    """Everything that one reference gave.

    Attributes:
        name: Name of the domain.
        rows: Good rows.
        problems: What is wrong with the data.
        files: Names of the files read, with the sha256 of their content.
    """

    name: str
    rows: tuple[Row, ...]
    problems: tuple[Problem, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)


def with_splits(raw: RawDomain) -> RawDomain:
    """Give every row a split.

    Data without splits is cut 70/10/20 by a hash of the text (of the first text of a pair); data without a
    validation split gives an eighth of its training rows away. A missing test split stays missing.

    Args:
        raw: Rows of which all or none have a split.

    Returns:
        The same rows, all with a split.
    """
    present = {row.split for row in raw.rows}
    if None in present:
        rows = [replace(row, split=hashed_split(text_key(row.text))) for row in raw.rows]
    elif "dev" not in present:
        rows = _with_dev(raw.rows)
    else:
        rows = list(raw.rows)
    return replace(raw, rows=tuple(rows))


def _with_dev(rows: Sequence[Row]) -> list[Row]:
    """The texts whose hashes sort first become dev: independent of the order, and never the whole of a small train."""
    keys = sorted({text_key(row.text) for row in rows if row.split == "train"})
    chosen = set(keys[: len(keys) // DEV_PART_OF_TRAIN])
    return [replace(row, split="dev") if row.split == "train" and text_key(row.text) in chosen else row for row in rows]


def all_problems(raw: RawDomain) -> list[Problem]:
    """Find what is wrong with the data: its lines, or when these are fine, the whole.

    Args:
        raw: Rows with splits.

    Returns:
        Problems by line; or mixed singles and pairs, no training rows, one class only, labels that train lacks.
    """
    if raw.problems:
        return list(raw.problems)
    if not raw.rows:
        return [Problem(raw.name, None, "no labelled rows; give at least two classes")]
    found: list[str] = []
    if len({len(row.text) for row in raw.rows}) > 1:
        found.append("some splits have pairs of texts and some single ones; name the columns by --text-column")
    labels = {split: sorted({row.label for row in raw.rows if row.split == split}) for split in SPLITS}
    if not labels["train"]:
        found.append("no training rows; add rows whose split is train")
    elif len(labels["train"]) == 1:
        found.append(f"train has one class only, {labels['train'][0]!r}; at least two are needed")
    else:
        found += _labels_outside_train(labels)
    return [Problem(raw.name, None, message) for message in found]


def _labels_outside_train(labels: Mapping[SplitName, list[str]]) -> list[str]:
    train = labels["train"]
    return [
        f"{split} has the label {name!r}, which train lacks{did_you_mean(name, train)}; rename it or remove its rows"
        for split in ("dev", "test")
        for name in labels[split]
        if name not in train
    ]


def to_domain(raw: RawDomain, label_names: tuple[str, ...] | None = None) -> Domain:
    """Build the domain.

    Args:
        raw: Rows with splits, without problems.
        label_names: The order of the class names; sorted when None.

    Returns:
        The domain with its test split held back.
    """
    names = label_names or tuple(sorted({row.label for row in raw.rows}))
    train, dev, test = (to_examples([row for row in raw.rows if row.split == split], names) for split in SPLITS)
    is_pair = len(raw.rows[0].text) == 2
    return Domain(raw.name, names, is_pair, train, dev, HeldOut.of(test), dict(raw.files))
