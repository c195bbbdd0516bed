"""What the student learns from: encoded texts with teacher outputs, mixed in fixed shares."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from l2a.data import Floats, Ints
from l2a.data.encoding import EncodedTexts
from l2a.generator.tokens import token_kinds, vocabulary
from l2a.kd.losses import soft_label_loss
from l2a.student.student import Student
from l2a.teacher.labelling import TeacherOutputs, join_outputs
from l2a.teacher.model import Teacher
from l2a.util import RunError, training

Batch = dict[str, torch.Tensor]
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
    labels: Ints

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.labels)

    def take(self, indices: Ints) -> "DistillationSet":
        """Select examples by position, int64."""
        starts, lengths = self.encoded.offsets[indices], self.encoded.lengths[indices]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
        encoded = EncodedTexts(self.encoded.ids[tokens], self.encoded.types[tokens], offsets, self.encoded.pad_id)
        return DistillationSet(encoded, self.teacher.take(indices), self.labels[indices])


BatchReader = Callable[[Student, DistillationSet, Ints], tuple[Batch, TeacherOutputs]]
"""Gives what the student reads of the examples at some positions, and what the teacher says of them."""


def read_tokens(student: Student, data: DistillationSet, indices: Ints) -> tuple[Batch, TeacherOutputs]:
    """Read a padded batch as it is, with the teacher's outputs: the reader of all training that changes no embeddings.

    The ``indices`` are positions, int64 (B,); the batch goes to the student's device.
    """
    return data.encoded.padded(indices, student.model.device), data.teacher.take(indices)


def join(sets: Sequence[DistillationSet]) -> DistillationSet:
    """Concatenate one or more sets of one tokenizer and one teacher."""
    encoded, teacher = join_encoded([part.encoded for part in sets]), join_outputs([part.teacher for part in sets])
    return DistillationSet(encoded, teacher, np.concatenate([part.labels for part in sets]))


def join_encoded(parts: Sequence[EncodedTexts]) -> EncodedTexts:
    """Concatenate tokenised texts, in order; the parts, at least one, are of one tokenizer."""
    ids, types = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "types"))
    offsets = np.cumsum([0, *(length for part in parts for length in part.lengths)], dtype=np.int64)
    return EncodedTexts(ids, types, offsets, parts[0].pad_id)


def refuse_constant_targets(data: DistillationSet) -> None:
    """Raise a RunError when all soft labels of several texts agree to 1e-6: the student would learn a constant."""
    if len(data) > 1 and float(np.ptp(data.teacher.probabilities(), axis=0).max()) < 1e-6:
        fix = "fine-tune it (teacher.fine_tuned: false) or check the order of its labels"
        raise RunError(f"teacher: it gives every text the same probabilities, so nothing can be distilled; {fix}")


# Batches whose texts are drawn and sorted by length together.
WINDOW = 16


def mixture_batches(
    cycles: Sequence[Iterator[int]], shares: Sequence[float], lengths: Ints, size: int, steps: int,
    rng: np.random.Generator,
) -> Iterator[Ints]:  # fmt: skip
    """Draw batches, int64 (B,) positions, from several joined sets, each contributing a fixed share.

    Every set is cycled through in its own shuffled order, so that a small set repeats evenly. Texts are sorted by
    length inside a window of batches, so that little padding is computed.

    Args:
        cycles: The order of each set (``cycle``); they go on where they were left.
        shares: Relative weight of each set; 0 for an empty one.
        lengths: int64 (N,), tokens in each text of the joined set.
        size: Texts in a batch, B.
        steps: Batches to draw.
        rng: Source of the draws.
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


def cycle(positions: Ints, rng: np.random.Generator) -> Iterator[int]:
    """Go through a set's texts, int64 (n,), without end, each time in another order; an empty set yields nothing."""
    while len(positions):
        yield from positions[rng.permutation(len(positions))].tolist()


@contextmanager
def compact_embeddings(
    student: Student, optimizer: torch.optim.Optimizer, texts: Sequence[EncodedTexts]
) -> Iterator[Callable[[], torch.Tensor]]:
    """Give the student a table of the rows that occur in texts only; afterwards they return to their places.

    Neither gradient nor moments of the other rows are computed, which is most of a step's cost. Texts stay as they are:
    their tokens are renumbered where the layer reads them.

    Args:
        student: Its word embeddings are exchanged for the time of the context.
        optimizer: Holds the table as one of its parameters; its moments move along.
        texts: All that the student will read.

    Yields:
        A function that copies the whole table, float32 (V, e), as it is now.
    """
    layer = student.model.get_input_embeddings()
    full, padding = layer.weight, layer.padding_idx
    occurs = np.zeros(len(full), bool)
    for encoded in texts:
        occurs[encoded.ids] = occurs[encoded.pad_id] = True
    if padding is not None:
        occurs[padding] = True
    rows = torch.from_numpy(np.flatnonzero(occurs)).to(full.device)
    numbers = torch.from_numpy(np.cumsum(occurs) - 1).to(full.device)
    compact = torch.nn.Parameter(full.detach()[rows])
    moments = optimizer.state.pop(full, {})
    optimizer.state[compact] = {k: v[rows] if v.shape == full.shape else v for k, v in moments.items()}
    _exchange(optimizer, full, compact)
    layer.weight, layer.padding_idx = compact, None if padding is None else int(numbers[padding])
    try:
        with layer.register_forward_pre_hook(lambda _, ids: numbers[ids[0]]):
            yield lambda: full.detach().index_copy(0, rows, compact.detach())
    finally:
        layer.weight, layer.padding_idx = full, padding
        _exchange(optimizer, compact, full)
        full.detach()[rows] = compact.detach()
        for name, value in optimizer.state.pop(compact).items():
            if value.shape == compact.shape:
                value = moments.get(name, torch.zeros_like(full)).index_copy_(0, rows, value)
            optimizer.state[full][name] = value


def _exchange(optimizer: torch.optim.Optimizer, old: torch.nn.Parameter, new: torch.nn.Parameter) -> None:
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]


# lambda ~ Beta(0.4, 0.4), as in MixKD (Liang et al., ICLR 2021).
MIX_CONCENTRATION = 0.4


def read_mixed(
    student: Student, data: DistillationSet, indices: Ints, *, start: int, partners: int, weights: Floats
) -> tuple[Batch, TeacherOutputs]:
    """Read a batch in which some examples are interpolated with a partner (MixKD, Liang et al., ICLR 2021).

    Args:
        student: As in ``read_tokens``, like the next two.
        data: The joined set; the teacher's outputs of the mixed examples are those of the mixes.
        indices: int64 (B,), positions.
        start: Position of the first of the N mixed examples in the joined set.
        partners: Position of the first of their N partners.
        weights: float32 (N,), lambda of each.
    """
    mixed = (indices >= start) & (indices < start + len(weights))
    offsets = np.where(mixed, indices - start, 0)
    each = np.where(mixed, weights[offsets], np.float32(1.0)).astype(np.float32)
    second = np.where(mixed, offsets + partners, indices)
    return mix_pairs(student.model, data.encoded, indices, second, each), data.teacher.take(indices)


def mix_pairs(model: Any, encoded: EncodedTexts, first: Ints, second: Ints, weights: Floats) -> Batch:
    """Interpolate the word embeddings of two texts, place by place: lambda E[x] + (1 - lambda) E[x'].

    Where one text has ended, the embedding of the padding enters, as it does in padded batches of MixKD.

    Args:
        model: A model of transformers.
        encoded: Texts in its tokens.
        first: int64 (B,), positions of x.
        second: int64 (B,), positions of x'.
        weights: float32 (B,), lambda; at 1 the place of x' does not matter.

    Returns:
        inputs_embeds, float32 (B, L, e), attention_mask and token_type_ids, int64 (B, L), on the model's device.
    """
    table = model.get_input_embeddings()
    device, count = table.weight.device, len(first)
    both = encoded.padded(np.concatenate([first, second]), device)
    one, other = ({name: value[part] for name, value in both.items()} for part in (slice(count), slice(count, None)))
    weight = torch.from_numpy(weights).to(device)[:, None, None]
    embeds = weight * table(one["input_ids"]) + (1 - weight) * table(other["input_ids"])
    types = torch.where(one["attention_mask"] == 1, one["token_type_ids"], other["token_type_ids"])
    mask = torch.maximum(one["attention_mask"], other["attention_mask"])
    return {"inputs_embeds": embeds, "attention_mask": mask, "token_type_ids": types}


def mixed_outputs(teacher: Teacher, pairs: EncodedTexts, weights: Floats) -> TeacherOutputs:
    """Run the teacher, in eval mode, on N interpolations of its own word embeddings, with weights lambda, float32 (N,).

    The pairs are 2N texts in its tokens: N texts, then the partner of each.
    """
    count, found = len(weights), []
    order = np.argsort(np.maximum(pairs.lengths[:count], pairs.lengths[count:]), kind="stable")
    with torch.inference_mode(), training.mixed_precision(next(teacher.parameters()).device):
        for rows in np.split(order, range(64, count, 64)):
            outputs = teacher(mix_pairs(teacher.encoder, pairs, rows, rows + count, weights[rows]))
            found.append([part.float().cpu().numpy() for part in outputs])
    return TeacherOutputs(*(np.concatenate(parts)[np.argsort(order)] for parts in zip(*found, strict=True)))


def read_perturbed(
    student: Student, data: DistillationSet, indices: Ints, *, start: int, teacher: Teacher, texts: EncodedTexts,
    teacher_steps: torch.Tensor, student_steps: torch.Tensor,
) -> tuple[Batch, TeacherOutputs]:  # fmt: skip
    """Read a batch in which some examples take a step up KL(teacher, student) in embedding space (FGSM).

    Args:
        student: As in ``read_tokens``, like the next two.
        data: The joined set.
        indices: int64 (B,), positions.
        start: Position of the first of the N perturbed examples in the joined set.
        teacher: Runs on its own perturbed embeddings.
        texts: The N texts in the teacher's tokens.
        teacher_steps: float32 (V,), from ``token_steps``, of the teacher's vocabulary.
        student_steps: The same, of the student's.

    Returns:
        The batch and the teacher's outputs, those of the perturbed examples for what the teacher's step made of them.
    """
    batch, outputs = read_tokens(student, data, indices)
    rows = np.flatnonzero((indices >= start) & (indices < start + len(texts)))
    if not len(rows):
        return batch, outputs
    table, device = student.model.get_input_embeddings(), student.model.device
    ids, places = batch.pop("input_ids"), torch.from_numpy(rows).to(device)
    embeds = table(ids)
    mine = {name: value[places] for name, value in batch.items()} | {"inputs_embeds": embeds[places]}
    theirs = texts.padded(indices[rows] - start, device)
    their_ids = theirs.pop("input_ids")
    theirs["inputs_embeds"] = teacher.encoder.get_input_embeddings()(their_ids)
    for part in (mine, theirs):
        part["inputs_embeds"] = part["inputs_embeds"].detach().requires_grad_(True)
    with training.evaluating(student.model):
        student_logits, _ = student(mine)
        with training.mixed_precision(device):
            teacher_logits, _ = teacher(theirs)
        loss = soft_label_loss(student_logits, teacher_logits.float(), 1.0).sum()
        ascent, teacher_ascent = torch.autograd.grad(loss, (mine["inputs_embeds"], theirs["inputs_embeds"]))
    shift = ascent.sign() * student_steps.to(device)[ids[places], None]
    teacher_shift = teacher_ascent.sign() * teacher_steps.to(device)[their_ids, None]
    theirs["inputs_embeds"] = theirs["inputs_embeds"] + teacher_shift
    with torch.inference_mode(), training.mixed_precision(device):
        logits, pooled = (part.float().cpu().numpy() for part in teacher(theirs))
    taught = TeacherOutputs(outputs.logits.copy(), outputs.embeddings.copy())
    taught.logits[rows], taught.embeddings[rows] = logits, pooled
    return batch | {"inputs_embeds": embeds.index_add(0, places, shift)}, taught


def token_steps(model: Teacher | Student, rng: np.random.Generator) -> torch.Tensor:
    """Say how far each entry of a token's embedding moves, float32 (V,), so that the token stays among words.

    For words and pieces of letters the steps are as long in all as the way from a word to its nearest other word (the
    median over at most 512 words that ``rng`` draws); they are 0 for tokens that no operator may change.
    """
    may_move = token_kinds(vocabulary(model.tokenizer))[1]
    words = may_move.nonzero().flatten()
    rows = model.word_embeddings().cpu()[words]
    sample = torch.from_numpy(rng.permutation(len(words))[:512])
    distances = torch.cdist(rows[sample], rows)
    distances[torch.arange(len(sample)), sample] = torch.inf
    return may_move.mul(float(distances.min(dim=1).values.median()) / rows.shape[1] ** 0.5)
