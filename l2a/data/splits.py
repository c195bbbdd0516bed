"""Cutting data: a fixed split by hash, and the few labelled examples of a target domain."""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from l2a.data.examples import Domain, Examples, HeldOut, TextInput, concatenate, normalised_hash
from l2a.data.readers import SPLITS, DataProblem, LabelledRow, SplitName, to_examples
from l2a.util.cards import did_you_mean
from l2a.util.errors import UsageError

DEV_SHARE, TEST_SHARE = 0.1, 0.2


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


@dataclass(frozen=True)
class TargetSplits:
    """The scarce target domain of one run; the labelled parts are disjoint and free of test texts.

    Attributes:
        train: K labelled examples per class, for training.
        reward: Labelled examples whose log-likelihood is the selector's reward.
        validation: Labelled examples that choose the best student.
        unlabelled: The rest of the training texts, without their labels.
        labels_used: Number of target labels in the three labelled parts.
        labels_ignored: Number of target labels outside the test split that the run does not read.
    """

    train: Examples
    reward: Examples
    validation: Examples
    unlabelled: tuple[TextInput, ...]
    labels_used: int
    labels_ignored: int


def few_shot_splits(target: Domain, shots: int | None, dev_shots: int, rng: np.random.Generator) -> TargetSplits:
    """Draw the labels that a run may use.

    Training examples come from the train split, and so do the other two parts, which go on in the dev split when
    train is short. With one seed, more shots keep the examples that fewer shots drew. Without a number of shots every
    label is used: what the reward and the validation part leave is trained on; each has at most a quarter of a class.

    Args:
        target: The target domain.
        shots: Labelled examples per class for training, at least 1; None for all there are.
        dev_shots: Labelled examples per class for the reward, and as many again for the choice of the model.
        rng: Source of the draw.

    Returns:
        The parts, each with its classes interleaved.

    Raises:
        UsageError: If a number is not positive, the domain has no test split or a class has too few examples.
    """
    _check_request(target, shots, dev_shots)
    train, dev = _usable(target)
    pool = concatenate(train, dev)
    drawn = [
        _all_of_class(target, pool, len(train), index, dev_shots, rng)
        if shots is None
        else _draw_class(target, pool, len(train), index, shots, dev_shots, rng)
        for index in range(len(pool.label_names))
    ]
    parts = [_interleaved([part[number] for part in drawn]) for number in range(3)]
    used = {i for part in parts for i in part}
    unlabelled = tuple(text for i, text in enumerate(train.inputs) if i not in used)
    examples = [pool.take(part) for part in parts]
    return TargetSplits(examples[0], examples[1], examples[2], unlabelled, len(used), len(pool) - len(used))


def _interleaved(classes: Sequence[NDArray[np.int64]]) -> list[int]:
    rows = itertools.zip_longest(*(part.tolist() for part in classes))
    return [position for row in rows for position in row if position is not None]


def _check_request(target: Domain, shots: int | None, dev_shots: int) -> None:
    for name, value in (("shots", shots), ("dev_shots", dev_shots)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; give at least 1 example per class")
    if target.test.size == 0:
        raise UsageError(
            f"{target.name}: the domain has no test split, so it can only be a source; "
            "add labelled rows whose split is test"
        )


def _usable(target: Domain) -> tuple[Examples, Examples]:
    """Train and dev without copies and without any text of the test split."""
    seen = set(target.test.hashes)

    def keep(examples: Examples) -> Examples:
        positions: list[int] = []
        for i, text in enumerate(examples.inputs):
            key = normalised_hash(text)
            if key not in seen:
                seen.add(key)
                positions.append(i)
        return examples.take(positions)

    return keep(target.train), keep(target.dev)


def _draw_class(
    target: Domain, pool: Examples, train_size: int, index: int, shots: int, dev_shots: int, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Positions in the pool of one class: shots for training, then the reward's, then the choice's."""
    members = np.flatnonzero(pool.labels == index)
    from_train = rng.permutation(members[members < train_size])
    from_dev = rng.permutation(members[members >= train_size])
    # The two held-out parts are drawn from the far end, so that they stay the same when shots grow.
    rest = np.concatenate([from_train[shots:][::-1], from_dev])
    if len(from_train) < shots or len(rest) < 2 * dev_shots:
        raise UsageError(_too_few(target, pool, train_size, shots, dev_shots))
    return [from_train[:shots], rest[:dev_shots], rest[dev_shots : 2 * dev_shots]]


def _all_of_class(
    target: Domain, pool: Examples, train_size: int, index: int, dev_shots: int, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """All positions of one class: for training, the reward and the choice; the last two from the dev split first."""
    members = np.flatnonzero(pool.labels == index)
    held_out = min(dev_shots, len(members) // 4)
    if not held_out:
        raise UsageError(
            f"{target.name}: the class {pool.label_names[index]!r} has {len(members)} labelled examples outside the "
            "test split, and at least 4 are needed; label more"
        )
    shuffled = [rng.permutation(part) for part in (members[members >= train_size], members[members < train_size])]
    reward, validation, train = np.split(np.concatenate(shuffled), [held_out, 2 * held_out])
    return [train, reward, validation]


def _too_few(target: Domain, pool: Examples, train_size: int, shots: int, dev_shots: int) -> str:
    in_train, in_dev = (
        np.bincount(part, minlength=len(pool.label_names)) for part in np.split(pool.labels, [train_size])
    )
    scarcest = np.argsort(in_train + in_dev, kind="stable")[:5]
    has = ", ".join(f"{pool.label_names[i]}: {in_train[i]} in train and {in_dev[i]} in dev" for i in scarcest)
    return (
        f"{target.name}: {shots} shots and 2 x {dev_shots} dev shots need {shots + 2 * dev_shots} different examples "
        f"of each class, {shots} of them in train; there are {has}; lower --shots or --dev-shots, or label more"
    )


def text_key(text: Sequence[str]) -> str:
    """Give the key by which a text is split: pairs go together when they share their first text.

    Args:
        text: One or two texts.

    Returns:
        The normalised hash of the first text.
    """
    return normalised_hash((text[0],))


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
    rows: tuple[LabelledRow, ...]
    problems: tuple[DataProblem, ...] = ()
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


def _with_dev(rows: Sequence[LabelledRow]) -> list[LabelledRow]:
    """The texts whose hashes sort first become dev: independent of the order, and never the whole of a small train."""
    keys = sorted({text_key(row.text) for row in rows if row.split == "train"})
    chosen = set(keys[: len(keys) // DEV_PART_OF_TRAIN])
    return [replace(row, split="dev") if row.split == "train" and text_key(row.text) in chosen else row for row in rows]


def all_problems(raw: RawDomain) -> list[DataProblem]:
    """Find what is wrong with the data: its lines, or when these are fine, the whole.

    Args:
        raw: Rows with splits.

    Returns:
        Problems by line; or mixed singles and pairs, no training rows, one class only, labels that train lacks.
    """
    if raw.problems:
        return list(raw.problems)
    if not raw.rows:
        return [DataProblem(raw.name, None, "no labelled rows; give at least two classes")]
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
    return [DataProblem(raw.name, None, message) for message in found]


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
            "both domains need the same kind, name the columns by --text-column and --text-pair-column"
        )
    problems = _lacking(source, target) + _lacking(target, source)
    if problems:
        raise UsageError("; ".join(problems) + "; labels are matched by name, so rename or remove them")
    return relabel(source, target.label_names), target


def _lacking(domain: Domain, other: Domain) -> list[str]:
    return [
        f"{other.name} lacks the label {name!r} of {domain.name}{did_you_mean(name, other.label_names)}"
        for name in domain.label_names
        if name not in other.label_names
    ]


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
