"""What the student learns from: encoded texts with teacher outputs, mixed in fixed shares."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor, nn

from l2a.data.encoding import EncodedTexts
from l2a.student.student import Student
from l2a.teacher.labelling import TeacherOutputs, join_outputs
from l2a.util.errors import RunError

Indices = NDArray[np.int64]
Batch = dict[str, Tensor]
"""What a model reads: input_ids or inputs_embeds, attention_mask and token_type_ids, on the model's device."""


@dataclass(frozen=True)
class DistillationSet:
    """Texts that the teacher has labelled.

    Attributes:
        encoded: N texts in the student's tokens.
        teacher: The teacher's outputs for them.
        labels: int64 (N,), the real label or -1.
    """

    encoded: EncodedTexts
    teacher: TeacherOutputs
    labels: Indices

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.labels)

    def take(self, indices: Indices) -> "DistillationSet":
        """Select examples by position.

        Args:
            indices: int64 positions.

        Returns:
            The selected examples.
        """
        starts, lengths = self.encoded.offsets[indices], self.encoded.lengths[indices]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
        encoded = EncodedTexts(self.encoded.ids[tokens], self.encoded.types[tokens], offsets, self.encoded.pad_id)
        return DistillationSet(encoded, self.teacher.take(indices), self.labels[indices])


BatchReader = Callable[[Student, DistillationSet, Indices], tuple[Batch, TeacherOutputs]]
"""Gives what the student reads of the examples at some positions, and what the teacher says of them."""


def read_tokens(student: Student, data: DistillationSet, indices: Indices) -> tuple[Batch, TeacherOutputs]:
    """Read a batch as it is: the reader of all training that changes no embeddings.

    Args:
        student: Says where the batch goes.
        data: The examples.
        indices: int64 (B,), positions.

    Returns:
        The padded batch and the teacher's outputs.
    """
    return data.encoded.padded(indices, student.output.weight.device), data.teacher.take(indices)


@dataclass(frozen=True)
class Renewal:
    """A set of which only some texts are in use, chosen again while the student learns.

    Attributes:
        pool: One of the sets that the student is trained on.
        kept: int64, positions in the pool that are in use at first.
        every: Updates after which they are chosen again.
        choose: Gives the positions in use from the student's logits of the pool (N, C).
    """

    pool: DistillationSet
    kept: Indices
    every: int
    choose: Callable[[NDArray[np.float32]], Indices]


def join(sets: Sequence[DistillationSet]) -> DistillationSet:
    """Concatenate sets.

    Args:
        sets: One or more sets of one tokenizer and one teacher.

    Returns:
        All examples, in order.
    """
    encoded, teacher = join_encoded([part.encoded for part in sets]), join_outputs([part.teacher for part in sets])
    return DistillationSet(encoded, teacher, np.concatenate([part.labels for part in sets]))


def join_encoded(parts: Sequence[EncodedTexts]) -> EncodedTexts:
    """Concatenate tokenised texts.

    Args:
        parts: At least one, of one tokenizer.

    Returns:
        All texts, in order.
    """
    lengths = np.concatenate([part.lengths for part in parts])
    return EncodedTexts(
        ids=np.concatenate([part.ids for part in parts]),
        types=np.concatenate([part.types for part in parts]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        pad_id=parts[0].pad_id,
    )


def refuse_constant_targets(data: DistillationSet) -> None:
    """Stop when every teacher label is the same: the student would learn a constant.

    Args:
        data: The set to distil on.

    Raises:
        RunError: If more than one text came and all soft labels agree to 1e-6.
    """
    if len(data) > 1 and float(np.ptp(data.teacher.probabilities(), axis=0).max()) < 1e-6:
        raise RunError(
            "teacher: it gives every text the same probabilities, so there is nothing to distil; "
            "fine-tune it (teacher.fine_tuned: false) or check the order of its labels"
        )


WINDOW = 16
"""Batches whose texts are drawn and sorted by length together."""


def mixture_batches(
    cycles: Sequence[Iterator[int]], shares: Sequence[float], lengths: Indices, size: int, steps: int, rng: Generator
) -> Iterator[Indices]:
    """Draw batches from several joined sets, each contributing a fixed share.

    Every set is cycled through in its own shuffled order, so that a small set repeats evenly. Texts are sorted by
    length inside a window of batches, so that little padding is computed.

    Args:
        cycles: The order of each set (``cycle``); they go on where they were left.
        shares: Relative weight of each set; 0 for an empty one.
        lengths: int64 (N,), tokens in each text of the joined set.
        size: Texts in a batch, B.
        steps: Batches to draw.
        rng: Source of the draws.

    Yields:
        int64 (B,) positions in the joined set.
    """
    bounds = np.cumsum(np.array(shares) / np.sum(shares))
    for done in range(0, steps, WINDOW):
        batches = min(WINDOW, steps - done)
        groups = np.diff(np.round(bounds * batches * size).astype(int), prepend=0)
        drawn = np.array([next(cycles[g]) for g, count in enumerate(groups) for _ in range(count)], np.int64)
        drawn = rng.permutation(drawn)
        drawn = drawn[np.argsort(lengths[drawn], kind="stable")]
        for batch in rng.permutation(batches):
            yield drawn[batch * size : (batch + 1) * size]


def cycle(positions: Indices, rng: Generator, uses: Indices | None = None) -> Iterator[int]:
    """Go through a set again and again, each time in another order.

    Args:
        positions: int64 (n,), the set's texts.
        rng: Source of the orders.
        uses: int64, how often each text of the joined set was used so far: then those used least come first.

    Yields:
        Positions, without end; nothing for an empty set.
    """
    while len(positions):
        order = positions[rng.permutation(len(positions))]
        if uses is not None:
            order, uses = order[np.argsort(uses[order], kind="stable")], None
        yield from order.tolist()


@contextmanager
def compact_embeddings(
    student: Student, optimizer: torch.optim.Optimizer, texts: Sequence[EncodedTexts]
) -> Iterator[tuple[list[EncodedTexts], Tensor, Tensor]]:
    """Give the student a table of the rows that occur in texts only; afterwards they return to their places.

    Neither gradient nor moments of the other rows are computed, which is most of a step's cost.

    Args:
        student: Its word embeddings are exchanged for the time of the context.
        optimizer: Holds the table as one of its parameters; its moments move along.
        texts: All that the student will read.

    Yields:
        The texts in numbers of the U rows; the rows, int64 (U,), and the full table, float32 (V, e), in which they are
        stale until the end.
    """
    layer = student.model.get_input_embeddings()
    full, padding = layer.weight, layer.padding_idx
    occurs = np.zeros(len(full), bool)
    for encoded in texts:
        occurs[encoded.ids] = True
        # Ids up to the padding keep their numbers: some models tell positions by comparing ids with it.
        occurs[: encoded.pad_id + 1] = True
    rows, numbers = torch.from_numpy(np.flatnonzero(occurs)).to(full.device), np.cumsum(occurs, dtype=np.int32) - 1
    compact = nn.Parameter(full.detach()[rows])
    moments = optimizer.state.pop(full, {})
    if moments:
        optimizer.state[compact] = {k: v[rows] if v.shape == full.shape else v for k, v in moments.items()}
    _exchange(optimizer, full, compact)
    layer.weight, layer.padding_idx = compact, None if padding is None else int(numbers[padding])
    try:
        yield [replace(t, ids=numbers[t.ids], pad_id=int(numbers[t.pad_id])) for t in texts], rows, full.detach()
    finally:
        layer.weight, layer.padding_idx = full, padding
        _exchange(optimizer, compact, full)
        full.detach()[rows] = compact.detach()
        for name, value in optimizer.state.pop(compact, {}).items():
            if value.shape == compact.shape:
                value = moments.get(name, torch.zeros_like(full)).index_copy_(0, rows, value)
            optimizer.state[full][name] = value


def _exchange(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter) -> None:
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
