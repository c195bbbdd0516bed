"""The settings of a general student, and the text that it learns from."""

import math
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from l2a.config import Columns, Count, CountFromZero, Length, Positive, Seed, check_settings
from l2a.data.domains import load_domain
from l2a.data.encoding import bucket_of
from l2a.data.examples import Domain, TextInput, normalised_hash
from l2a.data.readers import SUFFIXES, read_table, texts_of
from l2a.util.errors import UsageError
from l2a.util.progress import SILENT, Progress


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of the general stage; the student is an ELECTRA, which has factorised embeddings natively.

    Attributes:
        output_dir: Folder of the finished student.
        text: Files of texts and domains, whose train splits are read without labels.
        text_column: Column of the text, or of the first text of a pair; None for the usual names.
        text_pair_column: Column of the second text of a pair.
        protect: Domains whose texts the student must never see, whatever their split.
        teacher: "minilm-l6", a folder, or a Hub id: a pretrained encoder.
        steps: Optimizer steps.
        seed: Of the student's first weights, the variants and the order of the batches.
        max_length: Longest input in tokens.
        variants: Variants of the texts (spans, pairs, mixes, noise) that are labelled as well.
        tokens_per_batch: Padded tokens in a step, at most.
        learning_rate: Peak rate; 5 % of the steps warm up, then it falls linearly to zero.
        checkpoint_every: Steps between checkpoints.
        embedding_size: Width of the word embeddings.
        hidden_size: Width of the layers.
        layers: Number of layers.
        intermediate_size: Width of the feed-forward blocks.
        heads: Attention heads in a layer.
        positions: Longest input that the student can read, in tokens.
        overwrite: Replace a finished student in the output folder.
    """

    output_dir: Path
    text: tuple[str, ...]
    text_column: str | None = None
    text_pair_column: str | None = None
    protect: tuple[str, ...] = ()
    teacher: str = "minilm-l6"
    steps: Count = 4000
    seed: Seed = 0
    max_length: Length = 128
    variants: CountFromZero = 200_000
    tokens_per_batch: Count = 4096
    learning_rate: Positive = 8e-4
    checkpoint_every: Count = 500
    embedding_size: Count = 80
    hidden_size: Count = 128
    layers: Count = 2
    intermediate_size: Count = 512
    heads: Count = 4
    positions: Count = 256
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_settings(self)
        if self.hidden_size % self.heads:
            raise UsageError(f"heads is {self.heads}; give a divisor of hidden_size, which is {self.hidden_size}")
        if bucket_of(self.max_length) > self.positions:
            raise UsageError(
                f"max_length is {self.max_length}, padded to {bucket_of(self.max_length)}; give one that positions "
                f"({self.positions}) can hold, or raise positions"
            )
        if not self.text:
            raise UsageError("text is empty; give --text with a file of texts or a domain, once or more")


SHORTEST_SPAN, LONGEST_SPAN = 3, 60
Words = list[str]


def make_variants(texts: Sequence[TextInput], count: int, rng: np.random.Generator) -> tuple[TextInput, ...]:
    """Draw variants of a corpus: half spans, the rest pairs, mixes and noisy spans in equal parts.

    A text is drawn with a chance proportional to the square root of its length, so that long ones give more spans.

    Args:
        texts: The corpus, single texts and pairs.
        count: Number of variants.
        rng: Source of all draws.

    Returns:
        Single texts first, then pairs.
    """
    sides = [side.split() for text in texts for side in text]
    weights = np.sqrt([len(words) for words in sides])
    chosen = rng.choice(len(sides), size=(count, 2), p=weights / weights.sum())
    kinds = rng.choice(len(_MAKERS), size=count, p=[0.5, 1 / 6, 1 / 6, 1 / 6])
    made = (
        _MAKERS[kind](sides[first], sides[second], rng) for kind, (first, second) in zip(kinds, chosen, strict=True)
    )
    return tuple(sorted((text for text in made if text[0]), key=len))


def random_span(words: Words, rng: np.random.Generator) -> Words:
    """Cut a contiguous span whose length is log-uniform, so that short ones are common.

    Args:
        words: Words of a text.
        rng: Source of the draw.

    Returns:
        A span of 3 to 60 words, or the whole text if it is shorter.
    """
    low, high = math.log(SHORTEST_SPAN), math.log(LONGEST_SPAN + 1)
    length = min(len(words), int(math.exp(rng.uniform(low, high))))
    start = int(rng.integers(0, len(words) - length + 1))
    return words[start : start + length]


def _span(first: Words, second: Words, rng: np.random.Generator) -> TextInput:
    return (" ".join(random_span(first, rng)),)


def _pair(first: Words, second: Words, rng: np.random.Generator) -> TextInput:
    # Half of the pairs come from one text, so that related sides are as common as unrelated ones.
    partner = first if rng.random() < 0.5 else second
    return (" ".join(random_span(first, rng)), " ".join(random_span(partner, rng)))


def _mix(first: Words, second: Words, rng: np.random.Generator) -> TextInput:
    span, partner = random_span(first, rng), random_span(second, rng)
    swapped = rng.random(len(span)) < rng.uniform(0.1, 0.5)
    return (" ".join(partner[i] if i < len(partner) and swapped[i] else word for i, word in enumerate(span)),)


def _noise(first: Words, second: Words, rng: np.random.Generator) -> TextInput:
    span = random_span(first, rng)
    kept = [word for word in span if rng.random() > 0.15] or span
    position = int(rng.integers(0, len(kept)))
    other = int(rng.integers(0, len(kept)))
    kept[position], kept[other] = kept[other], kept[position]
    return (" ".join(kept),)


_MAKERS: tuple[Callable[[Words, Words, np.random.Generator], TextInput], ...] = (_span, _pair, _mix, _noise)


@dataclass(frozen=True)
class Corpus:
    """The text of a run.

    Attributes:
        texts: Distinct texts, single ones first, then pairs.
        variants: Texts made from them, in the same order.
    """

    texts: tuple[TextInput, ...]
    variants: tuple[TextInput, ...]


def read_corpus(config: PretrainConfig, progress: Progress = SILENT) -> Corpus:
    """Read all text of a run, without protected texts, and draw its variants.

    Args:
        config: Which files and domains to read, which domains to protect, how many variants.
        progress: Shows downloads.

    Returns:
        The corpus.

    Raises:
        UsageError: If a file or domain cannot be read, or nothing is left.
        RunError: If a domain cannot be fetched.
    """
    columns = Columns(config.text_column, config.text_pair_column)
    read = [_read(name, columns, progress) for name in config.text]
    whole = [load_domain(name, progress=progress) for name in config.protect]
    protected = protected_hashes([part for part in read if isinstance(part, Domain)], whole)
    texts = clean_corpus([part.train.inputs if isinstance(part, Domain) else part for part in read], protected)
    return Corpus(texts, make_variants(texts, config.variants, np.random.default_rng([config.seed, 1])))


def _read(name: str, columns: Columns, progress: Progress) -> Domain | tuple[TextInput, ...]:
    """Read a file without a column of labels as texts, anything else as a domain, with splits to respect."""
    path = Path(name).expanduser()
    if path.is_file() or path.suffix == ".txt":
        table = read_table(path, (".txt", *SUFFIXES))
        if not table.has_labels:
            return texts_of(table, columns)
    return load_domain(name, columns, progress=progress)


def protected_hashes(domains: Sequence[Domain], whole: Sequence[Domain] = ()) -> frozenset[str]:
    """Collect the hashes of all texts that a general student must never see.

    Args:
        domains: Domains whose dev and test splits are protected.
        whole: Domains that are protected with their train split too, such as those it will be tried on.

    Returns:
        Normalised hashes of the texts, and of each side of a pair.
    """
    hashes: set[str] = set()
    for domain in (*domains, *whole):
        hashes |= domain.test.hashes | _hashes_with_sides(domain.dev.inputs)
    return frozenset(hashes.union(*(_hashes_with_sides(domain.train.inputs) for domain in whole)))


def _hashes_with_sides(inputs: Iterable[TextInput]) -> set[str]:
    return {normalised_hash(part) for text in inputs for part in _parts(text)}


def _parts(text: TextInput) -> list[TextInput]:
    return [text] if len(text) == 1 else [text, *((side,) for side in text)]


def clean_corpus(sources: Sequence[Sequence[TextInput]], protected: AbstractSet[str]) -> tuple[TextInput, ...]:
    """Join texts, without duplicates and without protected ones.

    Args:
        sources: Texts of each file or domain, in order.
        protected: Hashes of ``protected_hashes``; a pair goes when either side is protected.

    Returns:
        Distinct texts: first all single ones, then all pairs, each in the order of the sources.

    Raises:
        UsageError: If nothing is left.
    """
    distinct: dict[str, TextInput] = {}
    for text in (text for source in sources for text in source):
        if not _hashes_with_sides([text]) & protected:
            distinct.setdefault(normalised_hash(text), text)
    if not distinct:
        raise UsageError("text: no text is left once the protected domains' texts are removed; give other text")
    return tuple(sorted(distinct.values(), key=len))
