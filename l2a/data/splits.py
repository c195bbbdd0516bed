"""Cutting data: a fixed split by hash, and the few labelled examples of a target domain."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from l2a.data.examples import Domain, Examples, HeldOut, TextInput, concatenate, normalised_hash
from l2a.data.readers import SPLITS, Row, SplitName
from l2a.util.cards import did_you_mean
from l2a.util.errors import UsageError

DEV_SHARE, TEST_SHARE = 0.1, 0.2
DEV_PART_OF_TRAIN = 8  # an eighth of 80 % of the data is 10 % of all of it
HELD_OUT_PART = 4  # reward and validation get at most a quarter of a class each when all labels are used


@dataclass(frozen=True)
class TargetSplits:
    """The target domain of one run; the labelled parts are disjoint and free of test texts.

    Attributes:
        train: Labelled examples for training.
        reward: Labelled examples whose log-likelihood is the selector's reward.
        validation: Labelled examples that choose the best student.
        unlabelled: The rest of the training texts, without their labels.
        labels_used: Number of target labels in the three labelled parts.
        labels_ignored: Number of target labels outside the test split that the run does not read; copies count once.
    """

    train: Examples
    reward: Examples
    validation: Examples
    unlabelled: tuple[TextInput, ...]
    labels_used: int
    labels_ignored: int


def few_shot_splits(target: Domain, shots: int | None, dev_shots: int, rng: np.random.Generator) -> TargetSplits:
    """Draw the labels that a run may use.

    With a number of shots, training examples come from the train split, and so do the other two parts, which go on in
    the dev split when train is short; with one seed, more shots keep the examples that fewer shots drew. With all
    labels, the dev split fills the two held-out parts first and everything else is trained on.

    Args:
        target: The target domain.
        shots: Labelled examples per class for training, at least 1; None for all labels.
        dev_shots: Labelled examples per class for the reward, and as many again for the choice of the model. With all
            labels, classes with few examples give a quarter of them to each, and at least 1.
        rng: Source of the draw.

    Returns:
        The parts, each with its classes interleaved.

    Raises:
        UsageError: If a number is not positive, the domain has no test split or a class has too few examples.
    """
    _check_request(target, shots, dev_shots)
    pool = concatenate(target.train, target.dev)
    first = {normalised_hash(text): i for i, text in reversed(list(enumerate(pool.inputs)))}
    kept = np.sort([i for key, i in first.items() if key not in target.test.hashes])  # no copies, no test texts
    pool, train_size = pool.take(kept), int(np.sum(kept < len(target.train)))
    drawn: list[list[NDArray[np.int64]]] = []
    for index, name in enumerate(pool.label_names):
        members = np.flatnonzero(pool.labels == index)
        from_train = rng.permutation(members[members < train_size])
        from_dev = rng.permutation(members[members >= train_size])
        if shots is None:
            drawn.append(
                _all_of_class(f"{target.name}: the class {name!r}", np.append(from_dev, from_train), dev_shots)
            )
            continue
        # The two held-out parts are drawn from the far end, so that they stay the same when shots grow.
        rest = np.append(from_train[shots:][::-1], from_dev)
        if len(from_train) < shots or len(rest) < 2 * dev_shots:
            raise UsageError(
                f"{target.name}: {shots} shots and 2 x {dev_shots} dev shots need {shots + 2 * dev_shots} different "
                f"examples of each class, {shots} of them in train; {name} has {len(from_train)} in train and "
                f"{len(from_dev)} in dev; lower --shots or --dev-shots, or label more"
            )
        drawn.append([from_train[:shots], rest[:dev_shots], rest[dev_shots : 2 * dev_shots]])
    parts = [_interleave(pool, part) for part in zip(*drawn, strict=True)]
    used = {int(i) for part in drawn for positions in part for i in positions}
    unlabelled = tuple(text for i, text in enumerate(pool.inputs[:train_size]) if i not in used)
    return TargetSplits(parts[0], parts[1], parts[2], unlabelled, len(used), len(pool) - len(used))


def _all_of_class(where: str, members: NDArray[np.int64], dev_shots: int) -> list[NDArray[np.int64]]:
    """All examples of one class: reward and validation come from the front, the rest is trained on."""
    if len(members) < 3:
        raise UsageError(
            f"{where} has {len(members)} different labelled examples outside the test split; "
            "label at least 3: one each for training, reward and validation"
        )
    held_out = min(dev_shots, max(1, len(members) // HELD_OUT_PART))
    return [members[2 * held_out :], members[:held_out], members[held_out : 2 * held_out]]


def _interleave(pool: Examples, by_class: Sequence[NDArray[np.int64]]) -> Examples:
    ranks = np.concatenate([np.arange(len(positions)) for positions in by_class])
    return pool.take(np.concatenate(by_class)[np.argsort(ranks, kind="stable")])


def _check_request(target: Domain, shots: int | None, dev_shots: int) -> None:
    for name, value in (("shots", shots), ("dev_shots", dev_shots)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; give at least 1 example per class")
    if target.test.size == 0:
        raise UsageError(
            f"{target.name}: the domain has no test split, so it can only be a source; "
            "add labelled rows whose split is test"
        )


def hashed_split(key: str) -> SplitName:
    """Put a text or a document into a split by the hash of its key: the same in every process and for ever.

    Args:
        key: What must not be cut in two, such as a normalised text or a document's id.

    Returns:
        The split's name: train for about 70 % of the keys, dev for 10 %, test for 20 %.
    """
    place = int.from_bytes(hashlib.sha256(f"split {key}".encode()).digest()[:8]) / 2**64
    if place < TEST_SHARE:
        return "test"
    return "dev" if place < TEST_SHARE + DEV_SHARE else "train"


def text_key(text: TextInput) -> str:
    """Give the key by which a text is split: pairs go together when they share their first text."""
    return normalised_hash(text[:1])


@dataclass(frozen=True)
class RawDomain:
    """Everything that one reference gave.

    Attributes:
        name: Name of the domain.
        rows: Good rows.
        problems: What is wrong with the data.
        files: Names of the files read, with the sha256 of their content.
        label_names: The order of the class names; sorted when empty.
    """

    name: str
    rows: tuple[Row, ...]
    problems: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    label_names: tuple[str, ...] = ()


def with_splits(raw: RawDomain) -> RawDomain:
    """Give every row a split.

    Data without splits is cut 70/10/20 by a hash of the text (of the first text of a pair); data without a
    validation split gives an eighth of its training rows away. A missing test split stays missing.

    Args:
        raw: Rows of which all or none have a split.

    Returns:
        The same rows, all with a split, and the problems of the whole.
    """
    rows, present = raw.rows, {row.split for row in raw.rows}
    if None in present:
        rows = tuple(row._replace(split=hashed_split(text_key(row.text))) for row in rows)
    elif "dev" not in present:
        # The texts whose hashes sort first: independent of the order, and never the whole of a small train.
        keys = sorted({text_key(row.text) for row in rows if row.split == "train"})
        chosen = set(keys[: len(keys) // DEV_PART_OF_TRAIN])
        to_dev = (row.split == "train" and text_key(row.text) in chosen for row in rows)
        rows = tuple(row._replace(split="dev") if moves else row for row, moves in zip(rows, to_dev, strict=True))
    return replace(raw, rows=rows, problems=raw.problems or tuple(f"{raw.name}: {found}" for found in _problems(rows)))


def _problems(rows: Sequence[Row]) -> list[str]:
    """What is wrong with rows that are all fine by themselves."""
    if not rows:
        return ["no labelled rows; give at least two classes"]
    labels = {split: sorted({row.label for row in rows if row.split == split}) for split in SPLITS}
    train = labels["train"]
    found: list[str] = []
    if len({len(row.text) for row in rows}) > 1:
        found.append("some splits have pairs of texts and some single ones; give one kind")
    if len(train) < 2:
        only = f"train has one class only, {train[0]!r}" if train else "no training rows"
        return [*found, f"{only}; give at least two classes in rows whose split is train"]
    return found + [
        f"{split} has the label {name!r}, which train lacks{did_you_mean(name, train)}; rename it or remove its rows"
        for split in ("dev", "test")
        for name in labels[split]
        if name not in train
    ]


def to_domain(raw: RawDomain) -> Domain:
    """Build the domain.

    Args:
        raw: Rows with splits, without problems.

    Returns:
        The domain with its test split held back.
    """
    names = raw.label_names or tuple(sorted({row.label for row in raw.rows}))
    index = {name: i for i, name in enumerate(names)}
    parts: list[Examples] = []
    for split in SPLITS:
        rows = [row for row in raw.rows if row.split == split]
        labels = np.array([index[row.label] for row in rows], dtype=np.int64)
        parts.append(Examples(tuple(row.text for row in rows), labels, names))
    train, dev, test = parts
    return Domain(raw.name, names, len(raw.rows[0].text) == 2, train, dev, HeldOut.of(test), dict(raw.files))


def align_labels(source: Domain, target: Domain) -> tuple[Domain, Domain]:
    """Give two domains one label set in one order, matched by name and never by integer.

    Args:
        source: The domain rich in labels.
        target: The scarce domain; its order of names is kept.

    Returns:
        The source with the target's label order, and the target.

    Raises:
        UsageError: If one domain has a label that the other lacks, or only one of them has pairs of texts.
    """
    if source.is_pair != target.is_pair:
        pair, single = (source, target) if source.is_pair else (target, source)
        raise UsageError(
            f"{pair.name} has pairs of texts and {single.name} single ones; "
            "both domains must be of one kind, so name the columns of both"
        )
    numbered = [all(name.lstrip("-").isdigit() for name in domain.label_names) for domain in (source, target)]
    if numbered[0] != numbered[1]:
        numbers, names = (source, target) if numbered[0] else (target, source)
        raise UsageError(
            f"{numbers.name} has the labels {', '.join(numbers.label_names)} and {names.name} has "
            f"{', '.join(names.label_names)}; labels are matched by name, so give names in both"
        )
    problems = [
        f"{other.name} lacks the label {name!r} of {domain.name}{did_you_mean(name, other.label_names)}"
        for domain, other in ((source, target), (target, source))
        for name in domain.label_names
        if name not in other.label_names
    ]
    if problems:
        raise UsageError("; ".join(problems) + "; labels are matched by name, so rename or remove them")
    return relabel(source, target.label_names), target


def relabel(domain: Domain, label_names: tuple[str, ...]) -> Domain:
    """Put a domain's labels in another order.

    Args:
        domain: The domain.
        label_names: The same names in the wanted order.

    Returns:
        The domain with that order; its texts are the same.
    """
    new_index = np.array([label_names.index(name) for name in domain.label_names], dtype=np.int64)

    def convert(examples: Examples) -> Examples:
        return Examples(examples.inputs, new_index[examples.labels], label_names)

    test = domain.test.converted(convert)
    return replace(domain, label_names=label_names, train=convert(domain.train), dev=convert(domain.dev), test=test)
