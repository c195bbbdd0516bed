"""The nearest neighbours of every token in a word-embedding matrix: found once per matrix, then looked up.

Rows are compared by direction (Euclidean distance of unit rows). Raw distances fail on real matrices: rows that
pre-training hardly touched stay short, so they are near everything; in a BERT-family vocabulary two rare names were
among the 16 nearest neighbours of two thirds of all tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from l2a.cache import cached_folder, fingerprint
from l2a.errors import UsageError
from l2a.progress import SILENT, Advance, Progress

BLOCK = 1024
LAYOUT = 2
"""Part of the cache key: raise it when the rules for neighbours change."""


@dataclass(frozen=True)
class NeighbourTable:
    """The k nearest neighbours of each token among the tokens that may stand in its place.

    Attributes:
        ids: int32 (V, k), nearest first; the row of a token that is not allowed repeats the token itself.
        distances: float32 (V, k), Euclidean between unit rows; infinity for tokens that are not allowed.
        word_start: bool (V,), False for pieces that continue a word ("##ing").
        allowed: bool (V,), tokens that operators may change and emit.
    """

    ids: Tensor
    distances: Tensor
    word_start: Tensor
    allowed: Tensor

    def to(self, device: torch.device | str) -> "NeighbourTable":
        """Move the table to a device.

        Args:
            device: Such as "cuda".

        Returns:
            The table there.
        """
        parts = (self.ids, self.distances, self.word_start, self.allowed)
        return NeighbourTable(*(part.to(device) for part in parts))


def build_neighbour_table(
    embeddings: Tensor, tokens: Sequence[str], k: int = 16, progress: Progress = SILENT
) -> NeighbourTable:
    """Find the nearest neighbours of every token, or load them if this matrix was seen before.

    A neighbour is an allowed token of the same kind (whole words for whole words, "##" pieces for "##" pieces),
    and never the token itself. Where fewer than k exist, the row repeats them in order.

    Args:
        embeddings: float32 (V, d), the word-embedding matrix.
        tokens: The V vocabulary entries, by id.
        k: Neighbours to keep.
        progress: Told of the rows done.

    Returns:
        The table, on the CPU.

    Raises:
        UsageError: If the vocabulary is not WordPiece.
    """
    word_start, allowed = token_kinds(tokens)

    def build(folder: Path) -> None:
        ids, distances = find_neighbours(embeddings.detach().cpu().float(), word_start, allowed, k, progress)
        np.save(folder / "ids.npy", ids.numpy())
        np.save(folder / "distances.npy", distances.numpy())

    key = fingerprint(LAYOUT, k, list(tokens), embeddings.detach().cpu().float().numpy())
    folder = cached_folder("neighbours", key, build)
    ids = torch.from_numpy(np.load(folder / "ids.npy", allow_pickle=False))
    distances = torch.from_numpy(np.load(folder / "distances.npy", allow_pickle=False))
    return NeighbourTable(ids, distances, word_start, allowed & (distances[:, 0] < float("inf")))


def token_kinds(tokens: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tell which tokens start a word and which ones operators may change or emit.

    Allowed are pieces of letters only, two at least: numbers, punctuation, [CLS], [unused7] and the single letters
    that apostrophes leave over ("don't") stay as they are.

    Args:
        tokens: The V vocabulary entries, by id.

    Returns:
        Two bool (V,): starts a word, is allowed.

    Raises:
        UsageError: If the vocabulary is not WordPiece.
    """
    marked = next((token for token in tokens if len(token) > 1 and token[0] in "\u0120\u2581"), None)
    if marked is not None:
        raise UsageError(
            f"tokenizer: the vocabulary holds {marked!r}, so it is not WordPiece; "
            "the generator reads and writes WordPiece tokens: use a teacher of the BERT family"
        )
    surfaces = [token.removeprefix("##") for token in tokens]
    word_start = torch.tensor([not token.startswith("##") for token in tokens])
    return word_start, torch.tensor([len(surface) > 1 and surface.isalpha() for surface in surfaces])


def find_neighbours(
    embeddings: Tensor, word_start: Tensor, allowed: Tensor, k: int, progress: Progress = SILENT
) -> tuple[Tensor, Tensor]:
    """Search the neighbours of all tokens, by blocked matrix products.

    Args:
        embeddings: float32 (V, d).
        word_start: bool (V,).
        allowed: bool (V,).
        k: Neighbours to keep.
        progress: Told of the rows done.

    Returns:
        int32 (V, k) ids and float32 (V, k) distances, as in ``NeighbourTable``.
    """
    ids = torch.arange(len(embeddings), dtype=torch.int32)[:, None].repeat(1, k)
    distances = torch.full((len(embeddings), k), float("inf"))
    directions = unit_rows(embeddings)
    with progress.stage("nearest tokens", int(allowed.sum())) as advance:
        for kind in (word_start & allowed, ~word_start & allowed):
            members = kind.nonzero().flatten()
            if len(members) > 1:
                _search_kind(directions[members], members, ids, distances, advance)
    return ids, distances


def unit_rows(embeddings: Tensor) -> Tensor:
    """Scale every row to length 1: the space in which tokens are compared.

    Args:
        embeddings: float32 (..., d).

    Returns:
        float32 (..., d).
    """
    return torch.nn.functional.normalize(embeddings, dim=-1)


def _search_kind(directions: Tensor, members: Tensor, ids: Tensor, distances: Tensor, advance: Advance) -> None:
    found = min(ids.shape[1], len(members) - 1)
    repeats = torch.arange(ids.shape[1]) % found
    for start in range(0, len(members), BLOCK):
        rows = slice(start, start + BLOCK)
        cosine = directions[rows] @ directions.T
        cosine[torch.arange(len(cosine)), torch.arange(start, start + len(cosine))] = -float("inf")
        nearest = cosine.topk(found)
        ids[members[rows]] = members[nearest.indices][:, repeats].to(torch.int32)
        distances[members[rows]] = (2 - 2 * nearest.values).clamp_min(0).sqrt()[:, repeats]
        advance(len(cosine))
