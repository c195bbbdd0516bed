"""Finds the largest size of a model that a budget of parameters holds, by counting, without making any weights."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import torch

from l2a.errors import UsageError
from l2a.students.request import StudentRequest


def largest_fitting(request: StudentRequest, preset: str, sizes: Sequence[int], build: Callable[[int], Any]) -> int:
    """Find the largest size whose model fits the budget.

    Args:
        request: Says how many parameters are allowed.
        preset: Name of the preset, for the message.
        sizes: At least one size, rising; the model grows with it.
        build: Makes the model of a size.

    Returns:
        A member of ``sizes``.

    Raises:
        UsageError: If not even the first fits.
    """
    fitting = bisect_right(sizes, request.budget, key=lambda size: parameters_count(lambda: build(size)))
    if not fitting:
        least = parameters_count(lambda: build(sizes[0]))
        share = math.ceil(1000 * least / request.teacher.parameters_count) / 1000
        raise UsageError(
            f"student.max_share: {request.max_share} of the teacher are {request.budget:,} parameters, the preset "
            f"{preset!r} needs at least {least:,}; raise student.max_share to {share}, choose another student.preset, "
            "or give --student a smaller checkpoint"
        )
    return sizes[fitting - 1]


def parameters_count(build: Callable[[], Any]) -> int:
    """Count the parameters of a model that is built without memory for its weights.

    Args:
        build: Makes the model.

    Returns:
        All parameters, embeddings and head included.
    """
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters())


def attention_heads(width: int) -> int:
    """Choose the number of attention heads of a fresh layer.

    Args:
        width: Hidden size, even.

    Returns:
        The largest number whose heads are at least 32 wide (one below that), of even width, and fill the layer.
    """
    return max(heads for heads in range(1, max(1, width // 32) + 1) if width % (2 * heads) == 0)
