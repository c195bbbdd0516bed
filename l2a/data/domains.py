"""Domains from cards, files, folders of splits, saved datasets, the Hub and memory, and the cards themselves."""

import hashlib
import html
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import numpy as np

from l2a.config import Columns
from l2a.data import fetch, readers
from l2a.data.examples import Domain, Examples, HeldOut, TextInput, normalised_hash, words_key
from l2a.util import SILENT, Progress, RunError, UsageError, cards, did_you_mean, fingerprint, logger, to_json

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")
UNLABELLED = "unlabelled"  # the task of cards whose text has no labels
OF_A_CARD = "its usual name, or by columns in a domain card"  # where no option of the command names one
DEV_SHARE, TEST_SHARE = 0.1, 0.2
DEV_PART_OF_TRAIN = 8  # an eighth of 80 % of the data is 10 % of all of it


def hashed_split(key: str) -> readers.SplitName:
    """Put a text or a document into a split by the hash of its key: the same in every process and for ever.

    The key is what must not be cut in two, such as a normalised text or a document's id. About 70 % of the keys come to
    train, 10 % to dev and 20 % to test.
    """
    place = int.from_bytes(hashlib.sha256(f"split {key}".encode()).digest()[:8]) / 2**64
    return "test" if place < TEST_SHARE else "dev" if place < TEST_SHARE + DEV_SHARE else "train"


def text_key(text: TextInput) -> str:
    """Give the key by which a text is split: pairs go together when they share their first text."""
    return normalised_hash(text[:1])


class RawDomain(NamedTuple):
    """Everything that one reference gave.

    Attributes:
        name: Name of the domain.
        rows: Good rows.
        problems: What makes the data unusable, in the order of the files.
        files: Names of the files read, with the sha256 of their content.
        label_names: The class names, sorted or in the order of a card; none for text without labels.
    """

    name: str
    rows: Sequence[readers.Row]
    problems: Sequence[str]
    files: Mapping[str, str]
    label_names: tuple[str, ...]

    @property
    def is_pair(self) -> bool:
        """Whether inputs are pairs of texts."""
        return bool(self.rows) and len(self.rows[0].text) == 2

    def of(self, split: str) -> list[readers.Row]:
        """Select the rows of a split."""
        return [row for row in self.rows if row.split == split]

    def counts(self, split: str) -> dict[str, int]:
        """Describe a split that has rows.

        Returns:
            What is counted, by name: "examples", "label NAME", "words, median", "words, longest", "characters, longest"
            (both texts of a pair count), and "duplicates", the examples whose text came before in the split, apart from
            case, width and spacing.
        """
        rows = self.of(split)
        words = [sum(len(part.split()) for part in row.text) for row in rows]
        labels = Counter(row.label for row in rows)
        named = {f"label {name}": labels[name] for name in sorted(self.label_names)}
        longest = {"words, longest": max(words), "characters, longest": max(sum(map(len, row.text)) for row in rows)}
        copies = len(rows) - len({normalised_hash(row.text) for row in rows})
        return {"examples": len(rows), **named, "words, median": int(np.median(words)), **longest, "duplicates": copies}

    def notes(self) -> Iterator[str]:
        """Say what a user should know but what does not stop a run, such as texts that two splits share."""
        hashes = {split: {normalised_hash(row.text) for row in self.of(split)} for split in readers.SPLITS}
        for first, second in combinations(readers.SPLITS, 2):
            if shared := len(hashes[first] & hashes[second]):
                use = "they are never drawn for training" if second == "test" else "copies are drawn once"
                yield f"{shared} texts of {first} are also in {second}; {use}"
        labels = {(normalised_hash(row.text), row.label) for row in self.rows}
        if differing := sum(count > 1 for count in Counter(digest for digest, _ in labels).values()):
            yield f"{differing} texts have different labels in different rows"
        if not self.problems and not self.label_names:
            yield "there are no labels, so the domain can only be given to --unlabelled"
        elif not self.problems and not hashes["test"]:
            yield "there is no test split, so the domain can only be a source"


def with_splits(name: str, rows: Sequence[readers.Row], problems: Sequence[str], files: Mapping[str, str]) -> RawDomain:
    """Give every row a split, and find the problems of the whole.

    Data without splits is cut 70/10/20 by a hash of the text (of the first text of a pair); data without a
    validation split gives an eighth of its training rows away. A missing test split stays missing.
    """
    present, label_names = {row.split for row in rows}, tuple(sorted({row.label for row in rows} - {""}))
    if None in present:
        rows = [row._replace(split=hashed_split(text_key(row.text))) for row in rows]
    elif "dev" not in present and label_names:
        # The texts whose hashes sort first: independent of the order, and never the whole of a small train.
        keys = sorted({text_key(row.text) for row in rows if row.split == "train"})
        chosen = set(keys[: len(keys) // DEV_PART_OF_TRAIN])
        moves = [row.split == "train" and text_key(row.text) in chosen for row in rows]
        rows = [row._replace(split="dev") if moved else row for row, moved in zip(rows, moves, strict=True)]
    raw = RawDomain(name, rows, problems, files, label_names)
    return raw if problems else raw._replace(problems=[f"{name}: {found}" for found in _problems(raw)])


def _problems(raw: RawDomain) -> Iterator[str]:
    """What is wrong with rows that are all fine by themselves."""
    if not raw.rows:
        yield "no labelled rows; give at least two classes"
    if not raw.label_names:
        return
    if len({len(row.text) for row in raw.rows}) > 1:
        yield "some splits have pairs of texts and some single ones; give one kind"
    labels = {split: {row.label for row in raw.of(split)} for split in readers.SPLITS}
    if len(train := sorted(labels["train"])) < 2:
        only = f"train has one class only, {train[0]!r}" if train else "no training rows"
        yield f"{only}; give at least two classes in rows whose split is train"
        return
    for split in ("dev", "test"):
        for name in sorted(labels[split] - labels["train"]):
            hint = did_you_mean(name, train)
            yield f"{split} has the label {name!r}, which train lacks{hint}; rename it or remove its rows"


def to_domain(raw: RawDomain, reference: object) -> Domain:
    """Build a domain, its test split held back, or refuse what has problems."""
    readers.refuse(raw.problems, reference)
    if not raw.label_names:
        raise UsageError(f"domain {reference!r} has no labels; give it to --unlabelled, and name a domain with labels")
    names, splits = raw.label_names, np.array([row.split for row in raw.rows])
    labels = np.array([names.index(row.label) for row in raw.rows], dtype=np.int64)
    whole = Examples(tuple(row.text for row in raw.rows), labels, names)
    train, dev, test = (whole.take(np.flatnonzero(splits == split)) for split in readers.SPLITS)
    return Domain(raw.name, names, raw.is_pair, train, dev, HeldOut.of(test), dict(raw.files))


@dataclass(frozen=True)
class Ratings:
    """How to read one file of rated sentences: id, mean rating from -4 to 4, text; separated by tabs.

    Attributes:
        member: Path of the file in the archive.
        threshold: Ratings above it are positive, below its negative are negative, the rest is dropped.
        split_by: "text" splits single sentences, "document" keeps the sentences of one document together.
        exclude: Other files of the archive, whose texts are dropped here so that domains share none.
        also: Other files that are read as ``member`` is.
    """

    member: str
    threshold: float
    split_by: Literal["text", "document"]
    exclude: tuple[str, ...] = ()
    also: tuple[str, ...] = ()


def read_ratings(archive: Path, ratings: Ratings, neutral: bool = False) -> list[readers.Row]:
    """Read one domain out of the .tar.gz archive of rated sentences: rows with their splits, in the order of the files.

    Copies go by their words alone: the study holds sentences that differ only in case or exclamation marks. ``neutral``
    reads what is dropped otherwise, for training without labels.

    Raises:
        RunError: If the archive or the file in it is damaged.
    """
    members = (ratings.member, *ratings.also, *ratings.exclude)
    with TemporaryDirectory() as folder:
        fetch.unpack(archive, members, Path(folder), skip=0)
        lines = {name: _lines((Path(folder) / name).read_bytes(), f"{archive.name}: {name}") for name in members}
    seen = {words_key(text) for member in ratings.exclude for _, _, text in lines[member]}
    rows: list[readers.Row] = []
    for identifier, rating, text in chain.from_iterable(lines[name] for name in (ratings.member, *ratings.also)):
        key = words_key(text)
        if (abs(rating) <= ratings.threshold) != neutral or not key or key in seen:
            continue
        seen.add(key)
        # 12_3 is the third sentence of document 12
        unit = f"{ratings.member} {identifier.partition('_')[0]}" if ratings.split_by == "document" else key
        label = "" if neutral else "positive" if rating > 0 else "negative"
        rows.append(readers.Row((text,), label, "train" if neutral else hashed_split(unit)))
    return rows


def _lines(content: bytes, where: str) -> list[tuple[str, float, str]]:
    """Identifier, mean rating and text of each line; & and < come as HTML entities, some of them twice."""
    try:
        fields = [line.split("\t", 2) for line in content.decode("utf-8").splitlines() if line]
        return [(name, float(rating), html.unescape(html.unescape(text)).strip()) for name, rating, text in fields]
    except ValueError as error:
        raise RunError(f"{where} is not a file of ratings ({error}); correct the domain card") from error


@dataclass(frozen=True)
class DomainCard:
    """The content of ``domains/NAME.yaml``: either ``data`` or both ``artifact`` and ``ratings``.

    Attributes:
        name: The card's name, the same as the file's.
        description: One or two sentences on the texts.
        task: What is classified; "unlabelled" for text that has no labels.
        labels: The class names; none for text without labels.
        licence: Licence of the data.
        citation: Whom to cite.
        language: ISO 639 code of the texts' language.
        data: A file, folder or Hub id; relative paths start at the card's folder.
        columns: Columns of ``data``.
        artifact: The package that holds the data.
        ratings: How to read the rated sentences in the package.
        sizes: Number of examples by split, for show.
        rows_sha256: Hash that the rows read from the package must have.
    """

    name: str
    description: str
    task: str
    licence: str
    labels: tuple[str, ...] = ()
    citation: str = ""
    language: str = ""
    data: str | None = None
    columns: Columns = readers.USUAL_COLUMNS
    artifact: fetch.Artifact | None = None
    ratings: Ratings | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    rows_sha256: str | None = None


def load_card(name: str) -> DomainCard:
    """Read and check a card by name.

    Raises:
        UsageError: If there is no such card or it is wrong.
    """
    path = cards.find_card("domains", name)
    card = cards.build(DomainCard, cards.load_yaml(path), f"domain card {path}")
    if card.name != name:
        raise UsageError(f"domain card {path}: name is {card.name!r}; make it the file's name, {name!r}")
    if (card.data is None) == (card.artifact is None or card.ratings is None):
        raise UsageError(f"domain card {path}: give either data, or both artifact and ratings")
    if (card.task == UNLABELLED) == bool(card.labels) or (card.task == UNLABELLED and card.data):
        fix = f"give labels, or the task {UNLABELLED!r} with an artifact and ratings (a file of text needs no card)"
        raise UsageError(f"domain card {path}: the task is {card.task!r} and labels are {list(card.labels)}; {fix}")
    return card


def provenance(reference: str) -> dict[str, str]:
    """Say what a card tells of a domain's data: name, description, licence, citation, language, origin and sha256.

    Args:
        reference: As in ``load_domain``; of what has no card only the name, without its folder, is known.
    """
    known = ("name", "description", "licence", "citation", "language")
    if reference not in cards.list_cards("domains"):
        name = Path(reference).name if Path(reference).expanduser().exists() else reference
        return dict.fromkeys((*known, "origin", "sha256"), "") | {"name": name}
    card = load_card(reference)
    origin = {"origin": str(card.artifact or card.data), "sha256": card.artifact.sha256 if card.artifact else ""}
    return {name: getattr(card, name) for name in known} | origin


def rows_sha256(rows: Sequence[readers.Row]) -> str:
    """Hash rows by content and order, to 64 hexadecimal digits."""
    lines = (to_json([*row.text, row.label, row.split]) for row in rows)
    return hashlib.sha256("\n".join(lines).encode("utf-8")).hexdigest()


def load_domain(
    reference: Any, columns: Columns = readers.USUAL_COLUMNS, data_root: str | Path | None = None,
    progress: Progress = SILENT, flag: str = readers.FLAG,
) -> Domain:  # fmt: skip
    """Load a domain.

    Args:
        reference: A card's name, a .csv, .tsv, .jsonl, .json, .parquet, .arrow or .feather file, a folder with train.*,
            dev.* and test.*, a folder written by ``datasets``, or a Hub id ``name[:config]``, looked for in this order;
            or data in memory, as in ``as_domain``.
        columns: The columns of a file, folder or Hub dataset; found by their usual names when None.
        data_root: Folder that relative paths start from first; then the working directory.
        progress: Shows downloads.
        flag: How messages name the option for a column, ``{}`` standing for text, text-pair or label.

    Returns:
        The domain, all its labels checked, the test split held back.

    Raises:
        UsageError: If there is no such data or something is wrong with it; names the file and the line.
        RunError: If data cannot be fetched.
    """
    if not isinstance(reference, str | Path):
        return as_domain(reference, "data", columns)
    return to_domain(read_domain(str(reference), columns, data_root, progress, flag), reference)


def as_domain(data: Any, name: str, columns: Columns = readers.USUAL_COLUMNS) -> Domain:
    """Make a domain of data in memory.

    Args:
        data: A list of (text, label) or ((first, second), label), each with a split as a third item if wanted; a
            pandas frame or a ``datasets.Dataset``; a ``DatasetDict`` or any mapping of train, dev (or validation) and
            test to these; or a domain, which is returned as it is.
        name: Name of the domain.
        columns: The columns of a frame or dataset; found by their usual names when None.

    Returns:
        The domain; its ``files`` hold a hash of the content.

    Raises:
        UsageError: If the data is of no such type or something is wrong with it.
    """
    if isinstance(data, Domain):
        return data
    named = "its usual name or the argument columns (of l2a.distill: source_columns, target_columns)"
    return to_domain(_join(name, data, columns, named), name)


def read_domain(
    reference: str, columns: Columns = readers.USUAL_COLUMNS, data_root: str | Path | None = None,
    progress: Progress = SILENT, flag: str = readers.FLAG,
) -> RawDomain:  # fmt: skip
    """Read rows with splits and every problem that they have; see ``load_domain``, which refuses problems."""
    if reference in cards.list_cards("domains"):
        return _read_card(load_card(reference), progress)
    return _join(*locate("domain", reference, data_root, progress), columns, flag)


def _read_card(card: DomainCard, progress: Progress) -> RawDomain:
    if card.artifact is not None and card.ratings is not None:
        archive = fetch.fetch_artifact(card.artifact, progress) / card.artifact.members[0]
        rows = read_ratings(archive, card.ratings, neutral=card.task == UNLABELLED)
        if card.rows_sha256 not in (None, found := rows_sha256(rows)):
            promise = f"the card promises {card.rows_sha256}; update the card if it was changed on purpose"
            raise RunError(f"domain card {card.name}: the rows have sha256 {found}, {promise}")
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        raw = with_splits(card.name, rows, [], {Path(card.ratings.member).name: digest})
    else:
        source = cards.find_card("domains", card.name)
        _, data = locate(f"domain card {source}: data", str(card.data), source.parent, progress)
        raw = _join(card.name, data, card.columns, f"`columns` in {source}")
    if raw.label_names and set(raw.label_names) != set(card.labels):
        lists = f"the card has the labels {sorted(card.labels)}, its data {list(raw.label_names)}"
        return raw._replace(problems=[*raw.problems, f"{card.name}: {lists}; correct the card"])
    return raw._replace(label_names=card.labels)


def _join(name: str, data: Any, columns: Columns, flag: str) -> RawDomain:
    """The rows of a file, a folder of splits, a dataset, or a mapping of splits to datasets."""
    parts = _split_files(data) if isinstance(data, Path) else data if isinstance(data, Mapping) else {None: data}
    rows, problems, files = list[readers.Row](), list[str](), dict[str, str]()
    for key, part in parts.items():
        if key is not None and key not in readers.SPLIT_NAMES:
            logger.warning("%s: the split %r is ignored; train, dev (or validation) and test are read", name, key)
            continue
        # Nothing but train is one dataset, split like any other; it may have a split column.
        split = None if key is None or list(parts) == ["train"] else readers.SPLIT_NAMES[key]
        named = name if key is None else f"{name} {key}"
        table = readers.read_table(part) if isinstance(part, Path) else readers.memory_table(part, named)
        found, wrong = readers.check_table(table, columns, flag, optional=split in ("dev", "test"))
        rows += [row._replace(split=split) for row in found] if split else found
        problems += wrong
        file = Path(table.name).name if table.digest else table.name
        files[file] = table.digest or fingerprint([[*row.text, row.label] for row in found])
    return with_splits(name, rows, problems, files)


def _split_files(path: Path) -> Mapping[readers.SplitName | None, Path]:
    if not path.is_dir():
        return {None: path}
    files: dict[readers.SplitName | None, Path] = {}
    for file in sorted(path.iterdir()):
        stem, suffix = readers.name_and_format(file)
        if suffix in readers.SUFFIXES and (split := readers.SPLIT_NAMES.get(stem.lower())):
            if split in files:
                raise UsageError(f"{path}: both {files[split].name} and {file.name} are {split} files; keep one")
            files[split] = file
    if "train" not in files:
        kinds = ", ".join(f"train{suffix}" for suffix in readers.SUFFIXES)
        raise UsageError(f"{path}: no training file; the folder needs one of {kinds} (and dev.*, test.*)")
    return files


def locate(what: str, reference: str, data_root: str | Path | None, progress: Progress) -> tuple[str, Any]:
    """Find data by a path or a Hub id, under the data root first, then under the working directory, then on the Hub.

    Returns:
        Its name; and its file or folder, or the content of what the datasets library reads.

    Raises:
        UsageError: If there is no such data; the message names it by ``what``.
        RunError: If it cannot be fetched.
    """
    path = Path(reference).expanduser()
    roots = [Path(data_root or ""), Path()]
    if (found := next((root / path for root in roots if (root / path).exists()), None)) is None:
        near = [str(path.with_name(file.name)) for root in roots for file in (root / path).parent.glob("*")]
        hint = did_you_mean(reference, [*cards.list_cards("domains"), *near])
        if hint or readers.name_and_format(path)[1] in readers.FORMATS or not HUB_ID.fullmatch(reference):
            kinds = "give a domain card, a file, a folder or a Hub id; see `l2a domains list`"
            raise UsageError(f"{what} {reference!r}: no such card or path{hint}; {kinds}")
        return reference, _datasets_content(reference, None, progress)
    name = found.resolve().name if found.is_dir() else readers.name_and_format(found)[0]
    is_saved = any((found / mark).is_file() for mark in ("dataset_dict.json", "dataset_info.json"))
    return name, _datasets_content(reference, found, progress) if is_saved else found


def _datasets_content(reference: str, folder: Path | None, progress: Progress) -> Any:
    """What the datasets library wrote into a folder, else a dataset of the Hub, name[:config]."""
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs every retry; the error says it once
    name, _, config = reference.partition(":")
    try:
        if folder is not None:
            return datasets.load_from_disk(str(folder))
        with progress.stage(f"fetch {reference}", total=1):
            return datasets.load_dataset(name, config or None)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        why = " ".join(str(error).split())[:300] or type(error).__name__
        if folder is not None:
            raise UsageError(f"{folder}: not a readable saved dataset ({why}); save it again") from error
        if isinstance(error, datasets.exceptions.DatasetNotFoundError | ValueError):
            fix = "see `l2a domains list`, check the path, or write name:config"
            raise UsageError(f"{reference}: no card, no file, no dataset of the Hub ({why}); {fix}") from error
        reason = f"the Hub cannot give this dataset and it is not cached ({why})"
        raise RunError(f"{reference}: {reason}; connect once, or give a file") from error
