"""Rated sentences of the VADER study (Hutto and Gilbert, ICWSM 2014) as sentiment domains."""

import html
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from l2a.domains.archives import read_tar_members
from l2a.domains.rows import Row, SplitName
from l2a.domains.splits import hashed_split
from l2a.errors import RunError


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


def read_ratings(archive: Path, ratings: Ratings) -> list[Row]:
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
    rows: list[Row] = []
    for identifier, rating, text in lines[ratings.member]:
        key = words_key(text)
        if abs(rating) <= ratings.threshold or not key or key in seen:
            continue
        seen.add(key)
        label = "positive" if rating > 0 else "negative"
        rows.append(Row((text,), label, _split(ratings, identifier, key)))
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
