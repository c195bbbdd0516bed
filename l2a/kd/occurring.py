"""Trains the word embeddings of the tokens that occur, and leaves all others untouched.

A small student is mostly its embedding table, and most of the table never occurs in the texts of a run. Gradient,
clipping, decay and the optimiser's moments are computed for the rows that occur alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from l2a.encoding import EncodedTexts
from l2a.students.student import Student


@dataclass(frozen=True)
class OccurringTokens:
    """The tokens of some texts.

    Attributes:
        ids: int64 (U,), ascending.
        positions: int32 (V,), where each token stands among them; 0 for those that do not occur.
    """

    ids: NDArray[np.int64]
    positions: NDArray[np.int32]

    def renumber(self, encoded: EncodedTexts) -> EncodedTexts:
        """Replace token ids by positions among the occurring tokens.

        Args:
            encoded: Texts of occurring tokens only.

        Returns:
            The same texts, for a table of U rows.
        """
        return replace(encoded, ids=self.positions[encoded.ids], pad_id=int(self.positions[encoded.pad_id]))


def occurring_tokens(texts: Sequence[EncodedTexts], vocabulary: int) -> OccurringTokens:
    """Collect the tokens of texts.

    Args:
        texts: In one tokenizer's ids; at least one.
        vocabulary: V, rows of the embedding table.

    Returns:
        The tokens that occur, the padding and those before it included.
    """
    occurs = np.zeros(vocabulary, bool)
    for encoded in texts:
        occurs[encoded.ids] = True
        # Ids up to the padding keep their numbers: some models tell positions by comparing ids with it.
        occurs[: encoded.pad_id + 1] = True
    ids = np.flatnonzero(occurs)
    positions = np.zeros(vocabulary, np.int32)
    positions[ids] = np.arange(len(ids), dtype=np.int32)
    return OccurringTokens(ids, positions)


@contextmanager
def compact_embeddings(
    student: Student, optimizer: torch.optim.Optimizer, tokens: OccurringTokens
) -> Iterator[torch.Tensor]:
    """Give the student a table of the occurring rows only; afterwards they return to their places.

    Args:
        student: Its word embeddings are exchanged for the time of the context.
        optimizer: Holds the table as one of its parameters; its moments move along.
        tokens: The rows to train.

    Yields:
        The full table, float32 (V, e); the rows of ``tokens`` in it are stale until the end.
    """
    layer = student.model.get_input_embeddings()
    full, padding = layer.weight, layer.padding_idx
    rows = torch.from_numpy(tokens.ids).to(full.device)
    compact = nn.Parameter(full.detach()[rows])
    _exchange(optimizer, full, compact)
    moments = optimizer.state.pop(full, {})
    if moments:
        optimizer.state[compact] = {k: v[rows] if v.shape == full.shape else v for k, v in moments.items()}
    layer.weight = compact
    layer.padding_idx = None if padding is None else int(tokens.positions[padding])
    try:
        yield full.detach()
    finally:
        layer.weight, layer.padding_idx = full, padding
        _exchange(optimizer, compact, full)
        with torch.no_grad():
            full[rows] = compact
        _return_moments(optimizer, full, compact, moments, rows)


def _exchange(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter) -> None:
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]


def _return_moments(
    optimizer: torch.optim.Optimizer,
    full: nn.Parameter,
    compact: nn.Parameter,
    moments: dict[str, torch.Tensor],
    rows: torch.Tensor,
) -> None:
    for name, value in optimizer.state.pop(compact, {}).items():
        if value.shape != compact.shape:
            optimizer.state[full][name] = value
            continue
        whole = moments.get(name, torch.zeros_like(full, requires_grad=False))
        whole[rows] = value
        optimizer.state[full][name] = whole
