"""Labelled texts, domains of them, the few labels that a run may use, and labels matched by name."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

import numpy as np

from l2a.util import UsageError, did_you_mean, logger

HELD_OUT_PART = 4  # reward and validation get at most a quarter of a class each when all labels are used
HELD_OUT = "held out or near copies of held-out texts"
WORD = re.compile(r"[^\W_]+")

Bools = np.typing.NDArray[np.bool_]
Ints = np.typing.NDArray[np.int64]
Floats = np.typing.NDArray[np.float32]
Doubles = np.typing.NDArray[np.float64]
TextInput = tuple[str, ...]  # one input of a classifier: (sentence,) or (first, second) in tasks on pairs


@dataclass(frozen=True)
class Examples:
    """Texts with their labels.

    Attributes:
        inputs: N texts, each a tuple of one or two strings.
        labels: int64 (N,), indices into ``label_names``.
        label_names: The C class names, in the order of the labels.
    """

    inputs: tuple[TextInput, ...]
    labels: Ints
    label_names: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.inputs)

    def take(self, indices: Sequence[int] | Ints) -> "Examples":
        """Select examples by position, in the wanted order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return Examples(tuple(self.inputs[i] for i in chosen), self.labels[chosen], self.label_names)


def concatenate(*parts: Examples) -> Examples:
    """Join examples with the same label names in order."""
    inputs = tuple(text for part in parts for text in part.inputs)
    return Examples(inputs, np.concatenate([part.labels for part in parts]), parts[0].label_names)


def normalised_hash(text_input: TextInput) -> str:
    """Hash a text, to 32 hexadecimal digits, so that copies that differ in case, width or spacing collide."""
    folded = (" ".join(unicodedata.normalize("NFKC", part).casefold().split()) for part in text_input)
    return hashlib.sha256("\x1f".join(folded).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def words_of(text: str) -> list[str]:
    """Find the words of a text in lower case, which near copies share."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def words_key(text: str) -> str:
    """Reduce a text to its lower-case words, joined by single spaces, so that near-copies collide."""
    return " ".join(words_of(text))


def held_out_words(texts: Iterable[TextInput]) -> frozenset[str]:
    """Give the keys by which near copies of texts are found: the words of each, and those of both sides of a pair."""
    return frozenset(words_key(part) for text in texts for part in {" ".join(text), *text}) - {""}


def seen_in(where: str, texts: Sequence[TextInput], hashes: Set[str], words: Set[str]) -> Bools:
    """Find and warn of copies of held-out texts and near copies, with the same words in the same order: bool (N,).

    Args:
        where: What holds the texts, for the warning.
        texts: N texts.
        hashes: Normalised hashes of the held-out texts.
        words: ``held_out_words`` of the held-out texts.
    """
    known = (normalised_hash(text) in hashes or words_key(" ".join(text)) in words for text in texts)
    if (seen := np.fromiter(known, np.bool_, len(texts))).any():
        found = f"{where}: {seen.sum()} of its {len(seen)} texts"
        logger.warning("%s are %s and are left out; take them out, or see where they come from", found, HELD_OUT)
    return seen


def warn_of_absent_classes(where: str, found: Examples) -> None:
    """Name the classes of which there is no example."""
    if absent := [name for i, name in enumerate(found.label_names) if i not in found.labels]:
        logger.warning("%s: no example of %s; add some, or leave the class out everywhere", where, ", ".join(absent))


@dataclass(frozen=True)
class HeldOut:
    """The test split: its size and what its texts are recognised by are open, its texts and labels are not.

    Attributes:
        size: Number of examples; 0 for a domain that can only be a source.
        hashes: Normalised hashes of the texts, so that other data can be kept free of them.
        words: ``held_out_words`` of the texts, so that other data can be kept free of near copies.
    """

    size: int
    hashes: frozenset[str]
    words: frozenset[str]
    _examples: Examples = field(repr=False)

    @classmethod
    def of(cls, test: Examples) -> "HeldOut":
        """Hold examples back."""
        return cls(len(test), frozenset(map(normalised_hash, test.inputs)), held_out_words(test.inputs), test)

    def reveal(self) -> Examples:
        """Give texts and labels away; only the final evaluation of a run may call this."""
        return self._examples


@dataclass(frozen=True)
class Domain:
    """One domain, ready for use.

    Attributes:
        name: The card's name, the file's stem, or the Hub id.
        label_names: The C class names; every label of every split is an index into them.
        is_pair: Whether inputs are pairs of texts.
        train: Training examples.
        dev: Validation examples.
        test: The held-back test split.
        files: Names of the files read, with the sha256 of their content.
    """

    name: str
    label_names: tuple[str, ...]
    is_pair: bool
    train: Examples
    dev: Examples
    test: HeldOut
    files: Mapping[str, str]


@dataclass(frozen=True)
class TargetSplits:
    """The target domain of one run; the labelled parts are disjoint and free of test texts.

    Attributes:
        train: Labelled examples for training.
        reward: Labelled examples that judge the teacher and can refuse a selection.
        validation: Labelled examples that judge the teacher too and have a veto on the student's states.
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
    labels, the dev split fills the two held-out parts first and everything else is trained on. The classes of each part
    are interleaved.

    Args:
        target: The target domain.
        shots: Labelled examples per class for training, at least 1; None for all labels.
        dev_shots: Labelled examples per class for the reward split, and as many again for validation. With all labels,
            classes with few examples give a quarter of them to each, and at least 1.
        rng: Source of the draw.

    Raises:
        UsageError: If the domain has no test split or a class has too few examples.
    """
    if target.test.size == 0:
        fix = "so it can only be a source; add labelled rows whose split is test"
        raise UsageError(f"{target.name}: the domain has no test split, {fix}")
    pool = concatenate(target.train, target.dev)
    first = {normalised_hash(text): i for i, text in reversed(list(enumerate(pool.inputs)))}
    tested = seen_in("target, train and dev", pool.inputs, target.test.hashes, target.test.words)
    kept = np.sort([i for i in first.values() if not tested[i]])  # no copies, no test texts
    pool, train_size = pool.take(kept), int(np.sum(kept < len(target.train)))
    drawn: list[list[Ints]] = []
    for index, name in enumerate(pool.label_names):
        members = np.flatnonzero(pool.labels == index)
        from_train = rng.permutation(members[members < train_size])
        from_dev = rng.permutation(members[members >= train_size])
        if shots is None:
            drawn.append(_split_class(f"{target.name}: the class {name!r}", np.append(from_dev, from_train), dev_shots))
            continue
        # The two held-out parts are drawn from the far end, so that they stay the same when shots grow.
        rest = np.append(from_train[shots:][::-1], from_dev)
        if len(from_train) < shots or len(rest) < 2 * dev_shots:
            need = f"{shots} shots and 2 x {dev_shots} dev shots need {shots + 2 * dev_shots} different examples"
            has = f"{shots} of them in train; {name} has {len(from_train)} in train and {len(from_dev)} in dev"
            raise UsageError(f"{target.name}: {need} of each class, {has}; lower --shots or --dev-shots, or label more")
        drawn.append([from_train[:shots], rest[:dev_shots], rest[dev_shots : 2 * dev_shots]])
    parts = [_interleave(pool, part) for part in zip(*drawn, strict=True)]
    used = {int(i) for part in drawn for positions in part for i in positions}
    unlabelled = tuple(text for i, text in enumerate(pool.inputs[:train_size]) if i not in used)
    return TargetSplits(parts[0], parts[1], parts[2], unlabelled, len(used), len(pool) - len(used))


def _split_class(where: str, members: Ints, dev_shots: int) -> list[Ints]:
    """All examples of one class: reward and validation come from the front, the rest is trained on."""
    if len(members) < 3:
        least = "label at least 3: one each for training, reward and validation"
        raise UsageError(f"{where} has {len(members)} different labelled examples outside the test split; {least}")
    held_out = min(dev_shots, max(1, len(members) // HELD_OUT_PART))
    return [members[2 * held_out :], members[:held_out], members[held_out : 2 * held_out]]


def _interleave(pool: Examples, by_class: Sequence[Ints]) -> Examples:
    ranks = np.concatenate([np.arange(len(positions)) for positions in by_class])
    return pool.take(np.concatenate(by_class)[np.argsort(ranks, kind="stable")])


def align_labels(source: Domain, target: Domain) -> tuple[Domain, Domain]:
    """Give the source the target's label order, matched by name and never by integer; return source and target.

    Raises:
        UsageError: If one domain has a label that the other lacks, or only one of them has pairs of texts.
    """
    if source.is_pair != target.is_pair:
        pair, single = (source, target) if source.is_pair else (target, source)
        fix = "both domains must be of one kind, so name the columns of both"
        raise UsageError(f"{pair.name} has pairs of texts and {single.name} single ones; {fix}")
    numbered = {all(name.lstrip("-").isdigit() for name in domain.label_names): domain for domain in (source, target)}
    if len(numbered) == 2:
        numbers, names = (", ".join(numbered[is_number].label_names) for is_number in (True, False))
        shown = f"{numbered[True].name} has the labels {numbers} and {numbered[False].name} has {names}"
        raise UsageError(f"{shown}; labels are matched by name, so give names in both")
    problems = [
        f"{other.name} lacks the label {name!r} of {domain.name}{did_you_mean(name, other.label_names)}"
        for domain, other in ((source, target), (target, source))
        for name in domain.label_names
        if name not in other.label_names
    ]
    if problems:
        raise UsageError("; ".join(problems) + "; labels are matched by name, so rename or remove them")
    new_index = np.array([target.label_names.index(name) for name in source.label_names], dtype=np.int64)
    parts = (source.train, source.dev, source.test._examples)  # which is not opened by that
    train, dev, test = (Examples(part.inputs, new_index[part.labels], target.label_names) for part in parts)
    held_out = replace(source.test, _examples=test)
    return replace(source, label_names=target.label_names, train=train, dev=dev, test=held_out), target
