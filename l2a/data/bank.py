"""Unlabelled text by the million: read as a stream, cut into sentences, freed of copies and of held-out texts, mapped.

A bank is written once, into the cache: the texts as UTF-8 in one file, and where each of them begins and ends in
another. While it is written, sixteen bytes a text are in memory.
"""

import hashlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from l2a.data import domains, readers
from l2a.data.examples import HELD_OUT, Domain, Ints, TextInput, normalised_hash, words_of
from l2a.util import SILENT, Progress, UsageError, cached_folder, cards, errors, fingerprint, logger, sha256_file

RECIPE = 2  # to be raised whenever the same files would give another bank: part of the cache's key
UNCUT, LEAST, MOST = 40, 3, 60  # words: of a text that is left whole, and of a piece of one that is cut
SHINGLE = 6  # words in a row; of texts with fewer, a near copy has the same words
ENDS, CLOSERS = ".!?\u2026", "\"')]\u201d\u2019"
MARKS = frozenset(ENDS + CLOSERS)
ABBREVIATIONS = frozenset(["mr.", "mrs.", "ms.", "dr.", "st.", "vs.", "e.g.", "i.e.", "prof.", "jr.", "u.s."])
IsHeldOut = Callable[[str, Sequence[str]], bool]  # from a text's hash and its words


@dataclass(frozen=True, eq=False)
class Bank(Sequence[TextInput]):
    """Distinct texts, memory-mapped, in the order in which they were read.

    Attributes:
        files: Names of what was read, with the sha256 of the content.
        summary: One sentence on what was read and what was left out.
        names: What was read, by its file's name.
        first_of: int64, the place of the first text of each of these.
    """

    files: Mapping[str, str]
    summary: str
    names: tuple[str, ...]
    first_of: Ints
    _data: np.typing.NDArray[np.uint8] = field(repr=False)
    _spans: Ints = field(repr=False)

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self._spans)

    def __getitem__(self, index: Any) -> Any:
        """Read one text, or those of a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, end = self._spans[index].tolist()
        return tuple(self._data[start:end].tobytes().decode("utf-8").split("\0"))

    def origin_of(self, place: int) -> str:
        """Say what a text was read from, and its place: "reviews.txt:17"."""
        return f"{self.names[int(np.searchsorted(self.first_of, place, 'right')) - 1]}:{place}"


class _Source(NamedTuple):
    """A file or other set of texts: how messages name it, its hash, the files behind it, and what reads it."""

    name: str
    digest: str
    files: Mapping[str, str]
    records: Callable[[], Iterator[readers.Record]]


def read_bank(
    references: Sequence[Any], is_pair: bool, forbidden: frozenset[str] = frozenset(),
    data_root: str | Path | None = None, progress: Progress = SILENT, held_out_words: frozenset[str] = frozenset(),
) -> Bank:  # fmt: skip
    """Read text whose labels, if it has any, are not used; single texts of more than 40 words are cut into sentences.

    Args:
        references: Files (.txt with one text a line or with pairs separated by a tab, or a table), folders of such
            files, domains (their training texts), Hub ids; in memory lists of texts or pairs, frames, datasets.
        is_pair: Whether pairs are wanted; texts of the other kind are left out.
        forbidden: Normalised hashes of held-out texts.
        data_root: Folder that relative paths start from first.
        progress: Shows downloads and the reading.
        held_out_words: ``held_out_words`` of these texts: what has the same words as one is left out, and, of texts
            with at least six words, what holds all words of one in a row or consists of words in a row of one.

    Returns:
        The distinct texts.

    Raises:
        UsageError: If there is no such text, a file cannot be read, or nothing is left.
        RunError: If a domain cannot be fetched or the cache cannot be written.
    """
    sources = [source for reference in references for source in _sources(reference, data_root, progress)]
    key = fingerprint(RECIPE, is_pair, [source.digest for source in sources], sorted(forbidden), sorted(held_out_words))
    is_held_out = _held_out_test(forbidden, held_out_words)
    folder = cached_folder("banks", key, lambda folder: _write(folder, sources, is_pair, is_held_out, progress))
    data = np.memmap(folder / "texts", np.uint8, "r").view(np.ndarray)
    spans, first_of = (np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in ("spans", "first"))
    names, summary = tuple(Path(source.name).name for source in sources), (folder / "summary.txt").read_text("utf-8")
    return Bank(_files(sources), summary, names, first_of, data, spans)


def unlabelled_files(references: Sequence[Any], data_root: str | Path | None, progress: Progress) -> Mapping[str, str]:
    """Give the names of what ``read_bank`` would read, with the sha256 of the content; see there."""
    return _files([source for reference in references for source in _sources(reference, data_root, progress)])


def _files(sources: Iterable[_Source]) -> Mapping[str, str]:
    read = dict.fromkeys(file for source in sources for file in source.files.items())
    times = Counter(name for name, _ in read)  # files of different folders may have one name
    return {name if times[name] == 1 else f"{name} ({digest[:8]})": digest for name, digest in read}


def _sources(reference: Any, data_root: str | Path | None, progress: Progress) -> list[_Source]:
    if not isinstance(reference, str | Path):
        return [_in_memory("data in memory", reference)]
    if (name := str(reference)) in cards.list_cards("domains"):
        raw = domains.read_domain(name, data_root=data_root, progress=progress)
        readers.refuse(raw.problems, name)
        return [_in_memory(name, [row.text for row in raw.of("train")])._replace(files=raw.files)]
    _, data = domains.locate("unlabelled", name, data_root, progress)
    if not isinstance(data, Path):
        return [_in_memory(name, data)]
    if not data.is_dir():
        return [_file(data, data.name)]
    if not (files := [file for file in sorted(data.rglob("*")) if file.is_file() and _is_text(file)]):
        raise UsageError(f"unlabelled {name!r}: the folder holds no file of text; give {', '.join(readers.FORMATS)}")
    return [_file(file, f"{data.resolve().name}/{file.relative_to(data).as_posix()}") for file in files]


def _is_text(file: Path) -> bool:
    """Files of a folder are read by their suffix, but for hidden ones and those that are a dev or test split."""
    stem, suffix = readers.name_and_format(file)
    is_train = readers.SPLIT_NAMES.get(stem.lower(), "train") == "train"
    return suffix in readers.FORMATS and not file.name.startswith(".") and is_train


def _in_memory(name: str, data: Any) -> _Source:
    texts = data.train.inputs if isinstance(data, Domain) else data
    texts = texts.get("train", texts) if isinstance(texts, Mapping) else texts
    content = hashlib.sha256()
    for record in readers.memory_records(texts, name, labelled=False):
        content.update(repr(record).encode("utf-8", "surrogatepass"))
    files = data.files if isinstance(data, Domain) else {name: content.hexdigest()}
    return _Source(name, content.hexdigest(), files, lambda: readers.memory_records(texts, name, labelled=False))


def _file(path: Path, name: str) -> _Source:
    suffix = readers.known_format(path, readers.FORMATS)
    try:
        digest = sha256_file(path)
    except OSError as error:
        raise UsageError(f"unlabelled {errors.os_error_sentence(error)}") from error
    if suffix == ".tsv":  # without a header it holds texts or pairs, like a .txt file
        first = next(readers.read_records(path, ".txt"), readers.Record(0, {}))
        line = "\t".join(first.values.values()).lower().split("\t")
        usual = {name for names in readers.USUAL_NAMES.values() for name in names}
        suffix = ".tsv" if len(line) > 2 or usual & {name.strip(' "') for name in line} else ".txt"
    return _Source(str(path), digest, {name: digest}, lambda: readers.read_records(path, suffix))


def _texts(source: _Source, counts: Counter[str]) -> Iterator[TextInput]:
    """The texts of a source's training rows; of lines that cannot be read the greater part is too much."""
    good, bad, first = 0, 0, ""
    for window in readers.windows(source.records()):
        table = readers.Table(source.name, window)
        rows, wrong = readers.check_table(table, readers.USUAL_COLUMNS, "its usual name", labelled=False)
        good, bad, first = good + len(rows), bad + len(wrong), first or "".join(wrong[:1])
        if bad > good:
            raise UsageError(first + (f"; {bad:,} of the first {good + bad:,} lines cannot be read" if bad > 1 else ""))
        yield from (tuple(map(str.strip, row.text)) for row in rows if row.split in (None, "train"))
    if not good:
        raise UsageError(f"{source.name}: the file is empty; give it lines or rows with text")
    if bad:
        logger.warning("%d of %d lines cannot be read and are left out: %s", bad, good + bad, first)
    counts["unreadable lines"] += bad


def _write(folder: Path, sources: Sequence[_Source], is_pair: bool, is_held_out: IsHeldOut, progress: Progress) -> None:
    """Write the distinct texts, and what was read."""
    counts: Counter[str] = Counter()
    hashes, ends, firsts = array("Q"), array("q", [0]), list[int]()
    with progress.stage("read unlabelled text"), (folder / "texts").open("wb", 1 << 17) as out:
        for source in sources:
            firsts.append(len(hashes))
            for text in _texts(source, counts):
                if (len(text) == 2) != is_pair:
                    counts["single texts" if is_pair else "pairs"] += 1
                    continue
                pieces = [text] if is_pair else [(piece,) for piece in sentences(text[0])]
                words = [words_of(" ".join(piece)) for piece in pieces]
                if len(pieces) > 1 and is_held_out(normalised_hash(text), [*chain(*words)]):
                    counts[HELD_OUT] += 1
                    continue
                for piece, its_words in zip(pieces, words, strict=True):
                    digest = normalised_hash(piece)
                    if is_held_out(digest, its_words):
                        counts[HELD_OUT] += 1
                    else:
                        ends.append(ends[-1] + out.write("\0".join(piece).encode("utf-8")))
                        hashes.append(int(digest[:16], 16))
    kept = np.sort(np.unique(np.frombuffer(hashes, np.uint64), return_index=True)[1])  # the first of each
    counts["copies"] = len(hashes) - len(kept)
    left_out = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count) or "nothing"
    if not len(kept):
        kind = "pairs (two texts separated by a tab)" if is_pair else "single texts"
        raise UsageError(f"unlabelled: no text can be used ({left_out} left out); give {kind}, as the target's")
    bounds = np.frombuffer(ends, np.int64)
    np.save(folder / "spans.npy", np.stack([bounds[:-1][kept], bounds[1:][kept]], axis=1))
    np.save(folder / "first.npy", np.searchsorted(kept, firsts))
    files = f"{len(sources)} file{'s' * (len(sources) > 1)}"
    (folder / "summary.txt").write_text(f"unlabelled: {len(kept):,} texts of {files} ({left_out} left out)", "utf-8")


def sentences(text: str) -> list[str]:
    """Cut a text of more than 40 words into sentences of 3 to 60 words; a shorter one stays as it is.

    The pieces are in order, and together they have all words of the text.
    """
    if len(words := text.split()) <= UNCUT:
        return [text]
    cuts = [0]
    for end, word in enumerate(words, start=1):
        if word[-1] in MARKS and end - cuts[-1] >= LEAST and _ends_sentence(word):
            cuts.append(end)
    if len(cuts) > 1 and len(words) - cuts[-1] < LEAST:  # the rest is no piece of its own
        cuts.pop()
    return [part for start, end in pairwise([*cuts, len(words)]) for part in _even_parts(words[start:end])]


def _ends_sentence(word: str) -> bool:
    bare = word.rstrip(CLOSERS)
    is_initial = len(bare) == 2 and bare[0].isupper() and bare[1] == "."
    return bare[-1:] in ENDS and bool(bare) and not is_initial and bare.lower() not in ABBREVIATIONS


def _even_parts(words: Sequence[str]) -> list[str]:
    parts = -(-len(words) // MOST)
    return [" ".join(words[start:end]) for start, end in pairwise(len(words) * i // parts for i in range(parts + 1))]


def _held_out_test(forbidden: frozenset[str], held_out: frozenset[str]) -> IsHeldOut:
    """Make the test whether a text is held out or a near copy of a text that is; see ``read_bank``."""
    by_shingle: dict[int, list[str]] = defaultdict(list)  # held-out texts by the hash of any six words in a row
    for key in held_out:
        for shingle in _shingles(key.split()):
            by_shingle[shingle].append(f" {key} ")

    def is_held_out(digest: str, words: Sequence[str]) -> bool:
        key = " ".join(words)
        near = (held for shingle in by_shingle.keys() & _shingles(words) for held in by_shingle[shingle])
        return digest in forbidden or key in held_out or any(f" {key} " in held or held in f" {key} " for held in near)

    return is_held_out


def _shingles(words: Sequence[str]) -> Iterator[int]:
    """The hashes of every six words in a row."""
    return map(hash, zip(*(words[i:] for i in range(SHINGLE)), strict=False))
