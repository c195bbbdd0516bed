"""Word vectors of a fresh student: the principal components of what the teacher makes of each token."""

import numpy as np
import torch
from numpy.typing import NDArray

from l2a.errors import UsageError

WORD_SCALE = 0.1
"""Standard deviation of a word vector's entries: well above the positions' 0.02, so that words are what is averaged."""


def principal_word_vectors(states: NDArray[np.float32], size: int) -> torch.Tensor:
    """Project word states onto their leading principal components.

    Args:
        states: float32 (V, d).
        size: Number of components e, at most d.

    Returns:
        float32 (V, e), the components' scales kept relative to each other, the rows' mean norm 0.1 sqrt(e).

    Raises:
        UsageError: If size exceeds d.
    """
    projected = _projected(states, size)
    scale: torch.Tensor = WORD_SCALE * size**0.5 / projected.norm(dim=1).mean()
    return projected * scale


def even_word_vectors(states: NDArray[np.float32], size: int) -> torch.Tensor:
    """Project word states onto principal components of one scale, so that no two words are alike by chance.

    A word then matches itself, or one that the teacher takes for much the same, far better than any other.

    Args:
        states: float32 (V, d).
        size: Number of components e, at most d.

    Returns:
        float32 (V, e), whitened, every row's norm 0.1 sqrt(e).

    Raises:
        UsageError: If size exceeds d.
    """
    projected = _projected(states, size)
    whitened = projected / projected.std(0).clamp_min(1e-6)
    lengths = whitened.norm(dim=1, keepdim=True).clamp_min(1e-6)
    even: torch.Tensor = WORD_SCALE * size**0.5 * whitened / lengths
    return even


def _projected(states: NDArray[np.float32], size: int) -> torch.Tensor:
    if size > states.shape[1]:
        raise UsageError(f"student embedding_size: {size} exceeds the teacher's width {states.shape[1]}; lower it")
    centred = torch.from_numpy(states - states.mean(0))
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :size]
    return centred @ with_fixed_sign(directions)


def with_fixed_sign(directions: torch.Tensor) -> torch.Tensor:
    """Turn every direction so that its entries do not sum to less than 0.

    The sign of an eigenvector is arbitrary: fixing it lets every machine start from the same student.

    Args:
        directions: float32 (d, e), a direction a column.

    Returns:
        float32 (d, e).
    """
    return torch.where(directions.sum(0) < 0, -directions, directions)
