"""The settings of a general student, the text that it learns from, and the teacher's states of that text."""

import copy
import math
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from l2a.config import Columns, Count, CountFromZero, Length, Positive, Seed, check_settings
from l2a.data.domains import load_domain
from l2a.data.encoding import EncodedTexts, bucket_of, encode, inference_batches
from l2a.data.examples import Domain, TextInput, normalised_hash
from l2a.data.readers import SUFFIXES, read_table, texts_of
from l2a.kd.data import Indices, join_encoded
from l2a.teacher.model import Teacher
from l2a.util.errors import UsageError
from l2a.util.files import cached_folder, fingerprint
from l2a.util.progress import SILENT, Progress
from l2a.util.training import has_fast_bfloat16


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
VARIANTS = ("span", "pair", "mix", "noise")
Words = list[str]
Texts = tuple[TextInput, ...]


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
    kinds = rng.choice(VARIANTS, size=count, p=[0.5, 1 / 6, 1 / 6, 1 / 6])
    made = [_variant(kind, sides[a], sides[b], rng) for kind, (a, b) in zip(kinds, chosen, strict=True)]
    return tuple(sorted((text for text in made if text[0]), key=len))


def _variant(kind: str, first: Words, second: Words, rng: np.random.Generator) -> TextInput:
    # Half of the pairs come from one text, so that related sides are as common as unrelated ones.
    partner = first if kind == "pair" and rng.random() < 0.5 else second
    span = random_span(first, rng)
    if kind == "pair":
        return (" ".join(span), " ".join(random_span(partner, rng)))
    if kind == "mix":
        other = random_span(partner, rng)
        swapped = rng.random(len(span)) < rng.uniform(0.1, 0.5)
        span = [other[i] if i < len(other) and swapped[i] else word for i, word in enumerate(span)]
    if kind == "noise":
        span = [word for word in span if rng.random() > 0.15] or span
        i, j = (int(rng.integers(0, len(span))) for _ in range(2))
        span[i], span[j] = span[j], span[i]
    return (" ".join(span),)


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


def read_corpus(config: PretrainConfig, progress: Progress = SILENT) -> tuple[Texts, Texts]:
    """Read all text of a run, without protected texts, and draw its variants.

    Args:
        config: Which files and domains to read, which domains to protect, how many variants.
        progress: Shows downloads.

    Returns:
        Distinct texts, single ones first, then pairs; and texts made from them, in the same order.

    Raises:
        UsageError: If a file or domain cannot be read, or nothing is left.
        RunError: If a domain cannot be fetched.
    """
    columns = Columns(config.text_column, config.text_pair_column)
    read = [_read(name, columns, progress) for name in config.text]
    whole = [load_domain(name, progress=progress) for name in config.protect]
    protected = protected_hashes([part for part in read if isinstance(part, Domain)], whole)
    texts = clean_corpus([part.train.inputs if isinstance(part, Domain) else part for part in read], protected)
    return texts, make_variants(texts, config.variants, np.random.default_rng([config.seed, 1]))


def _read(name: str, columns: Columns, progress: Progress) -> Domain | Texts:
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
    every = (*domains, *whole)
    splits = [*(domain.dev for domain in every), *(domain.train for domain in whole)]
    hashes = _hashes(text for split in splits for text in split.inputs)
    return frozenset(hashes.union(*(domain.test.hashes for domain in every)))


def _hashes(texts: Iterable[TextInput]) -> set[str]:
    """Hash texts, and each side of a pair."""
    return {normalised_hash(part) for text in texts for part in (text, *((side,) for side in text))}


def clean_corpus(sources: Sequence[Sequence[TextInput]], protected: AbstractSet[str]) -> Texts:
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
        if not _hashes([text]) & protected:
            distinct.setdefault(normalised_hash(text), text)
    if not distinct:
        raise UsageError("text: no text is left once the protected domains' texts are removed; give other text")
    return tuple(sorted(distinct.values(), key=len))


RECIPE = 1
"""To be raised whenever the same corpus would be labelled otherwise: part of the cache's key."""
HIDDEN_FILE = "hidden.f16"


@dataclass(frozen=True)
class TeacherTargets:
    """Texts as the teacher reads them, and what it makes of them.

    Attributes:
        encoded: Token ids of N texts.
        hidden: float16 (tokens, d), memory-mapped: the last hidden state of every token in order; the mean over a
            text's tokens is its pooled embedding.
    """

    encoded: EncodedTexts
    hidden: NDArray[np.float16]

    def states(self, index: int) -> NDArray[np.float16]:
        """Read the hidden states of one text.

        Args:
            index: Position of the text.

        Returns:
            float16 (tokens, d).
        """
        return np.array(self.hidden[slice(*self.encoded.offsets[index : index + 2])])

    def padded_hidden(self, batch: Indices, width: int) -> torch.Tensor:
        """Read the hidden states of a batch.

        Args:
            batch: int64 (B,), positions of the texts.
            width: Padded length L.

        Returns:
            bfloat16 (B, L, d), zero where padded.
        """
        padded = torch.zeros(len(batch), width, self.hidden.shape[1], dtype=torch.bfloat16)
        for row, index in enumerate(batch):
            states = torch.from_numpy(self.states(int(index)))
            padded[row, : len(states)] = states
        return padded


def label_texts(
    teacher: Teacher, corpus: tuple[Texts, Texts], max_length: int, device: torch.device, progress: Progress = SILENT
) -> TeacherTargets:
    """Run the teacher over the texts and their variants once; the result is cached by content.

    Args:
        teacher: The pretrained teacher; it is left on the processor in float32.
        corpus: The texts and their variants.
        max_length: Longest input in tokens.
        device: Where to compute.
        progress: Shows the tokens done.

    Returns:
        The labelled texts: first the originals, then the variants.

    Raises:
        RunError: If the disk is full.
    """
    # Single texts and pairs are tokenised apart.
    kinds = [[[text for text in texts if len(text) == sides] for sides in (1, 2)] for texts in corpus]
    parts = [join_encoded([encode(teacher.tokenizer, kind, max_length) for kind in both]) for both in kinds]
    encoded = join_encoded(parts)
    dtype = torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    shape = (len(encoded.ids), teacher.hidden_size)

    def build(folder: Path) -> None:
        encoder = copy.deepcopy(teacher.encoder).to(device, dtype)
        hidden, start = np.memmap(folder / HIDDEN_FILE, np.float16, "w+", shape=shape), 0
        with progress.stage("label the corpus", len(encoded.ids)) as advance:
            for part in parts:
                for batch in inference_batches(part, tokens_per_batch=4096):
                    advance(_write_batch(encoder, part, batch, hidden[start:]))
                start += len(part.ids)
        hidden.flush()

    tokens = (encoded.ids, encoded.types, encoded.offsets, len(parts[0]))
    folder = cached_folder("pretraining", fingerprint(RECIPE, str(dtype), teacher.fingerprint(), *tokens), build)
    return TeacherTargets(encoded, np.memmap(folder / HIDDEN_FILE, np.float16, "r", shape=shape))


@torch.inference_mode()
def _write_batch(encoder: nn.Module, encoded: EncodedTexts, batch: Indices, hidden: NDArray[np.float16]) -> int:
    inputs = encoded.padded(batch, next(encoder.parameters()).device)
    states = encoder(**inputs).last_hidden_state.to(torch.float16).cpu().numpy()
    for row, index in enumerate(batch):
        start, end = encoded.offsets[index], encoded.offsets[index + 1]
        hidden[start:end] = states[row, : end - start]
    return int(encoded.lengths[batch].sum())
