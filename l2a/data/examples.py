"""Labelled texts: the one data structure that every stage reads."""

import hashlib
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from l2a.config import Columns

TextInput = tuple[str, ...]
"""One input of a classifier: (sentence,) or (first, second) in tasks on pairs."""


@dataclass(frozen=True)
class Examples:
    """Texts with their labels.

    Attributes:
        inputs: N texts, each a tuple of one or two strings.
        labels: int64 (N,), indices into ``label_names``.
        label_names: The C class names, in the order of the labels.
    """

    inputs: tuple[TextInput, ...]
    labels: NDArray[np.int64]
    label_names: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check that texts and labels match."""
        if len(self.inputs) != len(self.labels):
            raise ValueError(f"there are {len(self.labels)} labels for {len(self.inputs)} texts; give one each")

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.inputs)

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> "Examples":
        """Select examples by position.

        Args:
            indices: Positions, in the wanted order.

        Returns:
            The selected examples.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        return Examples(tuple(self.inputs[i] for i in chosen), self.labels[chosen], self.label_names)


def concatenate(*parts: Examples) -> Examples:
    """Join examples that share their label names.

    Args:
        *parts: One or more sets of examples.

    Returns:
        All examples, in order.

    Raises:
        ValueError: If the label names differ.
    """
    if any(part.label_names != parts[0].label_names for part in parts):
        raise ValueError(f"label_names: cannot join examples with {[part.label_names for part in parts]}")
    inputs = tuple(text for part in parts for text in part.inputs)
    return Examples(inputs, np.concatenate([part.labels for part in parts]), parts[0].label_names)


def normalised_hash(text_input: TextInput) -> str:
    """Hash a text so that copies that differ in case, width or spacing collide.

    Args:
        text_input: One or two strings.

    Returns:
        32 hexadecimal digits.
    """
    folded = (" ".join(unicodedata.normalize("NFKC", part).casefold().split()) for part in text_input)
    return hashlib.sha256("\x1f".join(folded).encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclass(frozen=True)
class HeldOut:
    """The test split: its size and its texts' hashes are open, its texts and labels are not.

    Attributes:
        size: Number of examples; 0 for a domain that can only be a source.
        hashes: Normalised hashes of the texts, so that other data can be kept free of them.
    """

    size: int
    hashes: frozenset[str]
    _examples: Examples = field(repr=False)

    @classmethod
    def of(cls, examples: Examples) -> "HeldOut":
        """Hold examples back.

        Args:
            examples: The test split.

        Returns:
            The closed split.
        """
        return cls(len(examples), frozenset(map(normalised_hash, examples.inputs)), examples)

    def converted(self, convert: Callable[[Examples], Examples]) -> "HeldOut":
        """Change the split without opening it, such as the order of its label names.

        Args:
            convert: Keeps the texts as they are.

        Returns:
            The closed split, changed.
        """
        return HeldOut(self.size, self.hashes, convert(self._examples))

    def reveal(self) -> Examples:
        """Give texts and labels away; only the final evaluation of a run may call this.

        Returns:
            The test examples.
        """
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


USUAL_COLUMNS = Columns()
