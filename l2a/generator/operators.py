"""The token operators: each maps tokens and given randomness to tokens, for a whole batch at once.

All take ``u``, float32 (B, L, 2) uniform in [0, 1): ``u[..., 0]`` decides whether a position changes, ``u[..., 1]``
to what. Only open slots change (``slots`` is not -1), so special tokens, numbers and punctuation stay. AugPro is
arXiv 2210.11768; that embedding-space points are projected back to tokens is stated by the paper, the closed forms
are our derivation.
"""

import torch
from torch import Tensor

from l2a.generator.corpus import FROZEN
from l2a.generator.neighbours import NeighbourTable

POSITIONS_AT_ONCE = 32


def changed_positions(slots: Tensor, u: Tensor, degree: float) -> Tensor:
    """Choose the positions to change: each open slot with probability ``degree``.

    Args:
        slots: int8 (B, L).
        u: float32 (B, L, 2).
        degree: In (0, 1].

    Returns:
        bool (B, L).
    """
    return (slots != FROZEN) & (u[..., 0] < degree)


def mix_weights(u: Tensor, degree: float) -> Tensor:
    """Turn uniform numbers into interpolation weights lambda with P(lambda < 1/2) = ``degree``.

    Args:
        u: float32 (B, L, 2).
        degree: In (0, 1].

    Returns:
        float32 (B, L), the weight of the text's own token, in [0, 1).
    """
    decide = u[..., 0]
    return torch.where(decide < degree, decide / (2 * degree), 0.5 + (decide - degree) / (2 * max(1 - degree, 1e-9)))


def mix_tokens(ids: Tensor, slots: Tensor, partner_ids: Tensor, u: Tensor, degree: float) -> Tensor:
    """AugPro-Mix: interpolate with the partner's tokens and project back, in O(1) a token.

    v = lambda E[x] + (1 - lambda) E[x'] is (1 - lambda) D away from E[x] and lambda D away from E[x'], so of the two
    ends the nearest is x' iff lambda < 1/2, and a third word is rarely nearer than both.

    Args:
        ids: int64 (B, L).
        slots: int8 (B, L).
        partner_ids: int64 (B, L), aligned by ``align_partners``.
        u: float32 (B, L, 2).
        degree: P(lambda < 1/2).

    Returns:
        int64 (B, L).
    """
    return torch.where(changed_positions(slots, u, degree), partner_ids, ids)


def mix_tokens_between(
    ids: Tensor, slots: Tensor, partner_ids: Tensor, u: Tensor, degree: float, table: NeighbourTable, directions: Tensor
) -> Tensor:
    """AugPro-Mix without the ends: a third word near the segment that joins the two tokens.

    The candidates are the neighbours of both tokens; lambda is ``u[..., 1]``, the nearest direction to
    lambda E[x] + (1 - lambda) E[x'] wins.

    Args:
        ids: int64 (B, L).
        slots: int8 (B, L).
        partner_ids: int64 (B, L), aligned by ``align_partners``.
        u: float32 (B, L, 2).
        degree: Probability that a position changes.
        table: Neighbours of every token.
        directions: float32 (V, d), E, rows of length 1 (``unit_rows``).

    Returns:
        int64 (B, L).
    """
    where = changed_positions(slots, u, degree)
    own, other, weight = ids[where], partner_ids[where], u[..., 1][where][:, None]
    candidates = torch.cat([table.ids.index_select(0, own), table.ids.index_select(0, other)], dim=1).long()
    points = weight * directions.index_select(0, own) + (1 - weight) * directions.index_select(0, other)
    scores = _products(candidates, points, directions)
    is_end = (candidates == own[:, None]) | (candidates == other[:, None])
    return ids.masked_scatter(where, _best(candidates, scores.masked_fill(is_end, -torch.inf)))


def knn_tokens(ids: Tensor, slots: Tensor, u: Tensor, degree: float, table: NeighbourTable) -> Tensor:
    """Token replacement: a uniformly chosen near neighbour of the token.

    Args:
        ids: int64 (B, L).
        slots: int8 (B, L).
        u: float32 (B, L, 2).
        degree: Probability that a position changes.
        table: Neighbours of every token.

    Returns:
        int64 (B, L).
    """
    return torch.where(changed_positions(slots, u, degree), random_neighbours(ids, u[..., 1], table), ids)


def random_neighbours(ids: Tensor, u: Tensor, table: NeighbourTable) -> Tensor:
    """Choose one of the neighbours of each token.

    Args:
        ids: int64, of any shape.
        u: float32, of that shape, uniform in [0, 1).
        table: Neighbours of every token.

    Returns:
        int64, of that shape.
    """
    k = table.ids.shape[1]
    choice = (u * k).long().clamp_max(k - 1)
    return table.ids[ids, choice].long()


def fgsm_replacements(
    ids: Tensor, slots: Tensor, gradients: Tensor, table: NeighbourTable, embeddings: Tensor
) -> Tensor:
    """AugPro-FGSM's token for every open slot: the neighbour w with the largest (E[w] - E[x]) . g.

    To first order this neighbour raises the loss most; it is the projection of a step along the gradient that is
    about as long as the way to the neighbours.

    Args:
        ids: int64 (B, L).
        slots: int8 (B, L).
        gradients: float32 (B, L, d), of KL(teacher, student) with respect to the word embeddings.
        table: Neighbours of every token.
        embeddings: float32 (V, d).

    Returns:
        int64 (B, L); the token itself where the slot is closed.
    """
    where = slots != FROZEN
    return ids.masked_scatter(where, steepest_neighbours(ids[where], gradients[where], table, embeddings))


def steepest_neighbours(ids: Tensor, gradients: Tensor, table: NeighbourTable, embeddings: Tensor) -> Tensor:
    """Find the neighbour w of each token x with the largest (E[w] - E[x]) . g.

    Args:
        ids: int64 (P,).
        gradients: float32 (P, d).
        table: Neighbours of every token.
        embeddings: float32 (V, d).

    Returns:
        int64 (P,).
    """
    candidates = table.ids.index_select(0, ids).long()
    # The term E[x] . g is the same for all candidates of a position, so it cannot change the winner.
    return _best(candidates, _products(candidates, gradients, embeddings))


def fgsm_tokens(ids: Tensor, slots: Tensor, replacements: Tensor, u: Tensor, degree: float) -> Tensor:
    """AugPro-FGSM at a degree: some positions take the token of ``fgsm_replacements``.

    Args:
        ids: int64 (B, L).
        slots: int8 (B, L).
        replacements: int64 (B, L).
        u: float32 (B, L, 2).
        degree: Probability that a position changes.

    Returns:
        int64 (B, L).
    """
    return torch.where(changed_positions(slots, u, degree), replacements, ids)


def exhaustive_projection(points: Tensor, rows: Tensor, eligible: Tensor) -> Tensor:
    """Find the nearest row for every point by looking at all rows: the slow reference.

    Args:
        points: float32 (P, d).
        rows: float32 (V, d).
        eligible: bool (P, V), rows that a point may become.

    Returns:
        int64 (P,).
    """
    return torch.cdist(points, rows).masked_fill(~eligible, torch.inf).argmin(dim=1)


def _best(candidates: Tensor, scores: Tensor) -> Tensor:
    return candidates.gather(1, scores.argmax(dim=1, keepdim=True)).squeeze(1)


def _products(candidates: Tensor, vectors: Tensor, embeddings: Tensor) -> Tensor:
    parts = [vectors.new_empty(0, candidates.shape[1])]
    for start in range(0, len(candidates), POSITIONS_AT_ONCE):
        some, points = candidates[start : start + POSITIONS_AT_ONCE], vectors[start : start + POSITIONS_AT_ONCE]
        # index_select is many times as fast as embeddings[some] on the CPU
        rows = embeddings.index_select(0, some.flatten()).view(*some.shape, embeddings.shape[1])
        parts.append(torch.bmm(rows, points[:, :, None]).squeeze(2))
    return torch.cat(parts)
