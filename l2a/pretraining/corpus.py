"""Unlabelled text for the general stage: read, deduplicated, and kept apart from every text that must stay unseen."""

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from l2a.domains.domain import Domain
from l2a.domains.load import load_domain
from l2a.domains.unlabelled import read_text_file
from l2a.errors import UsageError
from l2a.examples import TextInput, normalised_hash
from l2a.files import sha256_file
from l2a.pretraining.config import PretrainConfig
from l2a.pretraining.variants import make_variants
from l2a.progress import SILENT, Progress


@dataclass(frozen=True)
class Corpus:
    """The text of a run.

    Attributes:
        texts: Distinct texts, single ones first, then pairs.
        variants: Texts made from them, in the same order.
        files: Names of the files read, with the sha256 of their content.
    """

    texts: tuple[TextInput, ...]
    variants: tuple[TextInput, ...]
    files: Mapping[str, str]


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
    domains = {name: load_domain(name, progress=progress) for name in config.text if not name.endswith(".txt")}
    whole = [load_domain(name, progress=progress) for name in config.protect]
    files: dict[str, str] = {}
    sources: list[tuple[TextInput, ...]] = []
    for name in config.text:
        path = Path(name)
        sources.append(domains[name].train.inputs if name in domains else read_text_file(path))
        files |= domains[name].files if name in domains else {path.name: sha256_file(path)}
    texts = clean_corpus(sources, protected_hashes(domains.values(), whole))
    return Corpus(texts, make_variants(texts, config.variants, np.random.default_rng([config.seed, 1])), files)


def protected_hashes(domains: Iterable[Domain], whole: Iterable[Domain] = ()) -> frozenset[str]:
    """Collect the hashes of all texts that a general student must never see.

    Args:
        domains: Domains whose dev and test splits are protected.
        whole: Domains that are protected with their train split too, such as those it will be tried on.

    Returns:
        Normalised hashes of the texts, and of each side of a pair.
    """
    hashes: set[str] = set()
    for domain in domains:
        hashes |= domain.test.hashes | _hashes_with_sides(domain.dev.inputs)
    for domain in whole:
        hashes |= domain.test.hashes | _hashes_with_sides(domain.dev.inputs + domain.train.inputs)
    return frozenset(hashes)


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
        parts = {normalised_hash(part) for part in _parts(text)}
        if not parts & protected:
            distinct.setdefault(normalised_hash(text), text)
    if not distinct:
        raise UsageError("text: no text is left once the protected domains' texts are removed; give other text")
    return tuple(sorted(distinct.values(), key=len))
