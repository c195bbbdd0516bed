"""What a domain is: labelled splits of one kind of text, with the test split held back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from l2a.examples import Examples, normalised_hash


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


@dataclass(frozen=True)
class Columns:
    """Which columns to read; None means: find it by its usual names.

    Attributes:
        text: Column of the text, or of the first text of a pair.
        text_pair: Column of the second text of a pair; not searched for when ``text`` is given.
        label: Column of the label.
    """

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None


USUAL_COLUMNS = Columns()
