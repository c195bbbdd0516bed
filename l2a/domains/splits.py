"""Cutting data: a fixed split by hash, and the few labelled examples of a target domain."""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l2a.domains.domain import Domain
from l2a.domains.rows import SplitName
from l2a.errors import UsageError
from l2a.examples import Examples, TextInput, concatenate, normalised_hash

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
        choice: Labelled examples that choose the best student.
        unlabelled: The rest of the training texts, without their labels.
        labels_used: Number of target labels in the three labelled parts.
    """

    train: Examples
    reward: Examples
    choice: Examples
    unlabelled: tuple[TextInput, ...]
    labels_used: int


def few_shot_splits(target: Domain, shots: int, dev_shots: int, rng: np.random.Generator) -> TargetSplits:
    """Draw the few labels that a run may use.

    Training examples come from the train split, and so do the other two parts, which go on in the dev split when
    train is short. With one seed, more shots keep the examples that fewer shots drew.

    Args:
        target: The target domain.
        shots: Labelled examples per class for training, at least 1.
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
    classes = range(len(pool.label_names))
    drawn = np.stack([_draw_class(target, pool, len(train), index, shots, dev_shots, rng) for index in classes])
    bounds = (0, shots, shots + dev_shots, shots + 2 * dev_shots)
    parts = [pool.take(drawn[:, start:stop].T.ravel()) for start, stop in itertools.pairwise(bounds)]
    used = set(drawn.ravel().tolist())
    unlabelled = tuple(text for i, text in enumerate(train.inputs) if i not in used)
    return TargetSplits(parts[0], parts[1], parts[2], unlabelled, len(used))


def _check_request(target: Domain, shots: int, dev_shots: int) -> None:
    for name, value in (("shots", shots), ("dev_shots", dev_shots)):
        if value < 1:
            raise UsageError(f"{name}: {value} came, at least 1 example per class is needed")
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
) -> NDArray[np.int64]:
    """Positions in the pool of one class: shots for training, then the reward's, then the choice's."""
    members = np.flatnonzero(pool.labels == index)
    from_train = rng.permutation(members[members < train_size])
    from_dev = rng.permutation(members[members >= train_size])
    # The two held-out parts are drawn from the far end, so that they stay the same when shots grow.
    rest = np.concatenate([from_train[shots:][::-1], from_dev])
    if len(from_train) < shots or len(rest) < 2 * dev_shots:
        raise UsageError(_too_few(target, pool, train_size, shots, dev_shots))
    return np.concatenate([from_train[:shots], rest[: 2 * dev_shots]]).astype(np.int64)


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
