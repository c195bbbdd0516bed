"""Augmentation of the models' inputs instead of texts: unprojected interpolation and unprojected FGSM.

Teacher and student each change their own word embeddings, so the teacher must run on changed inputs, and no text shows
what the student reads: the foils of projection to tokens (AugPro, arXiv 2210.11768). A reader of batches stands in for
plain reading in the trainer: the changed examples are an ordinary set of the mixture, known by its place.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from l2a.data.encoding import EncodedTexts
from l2a.generator.tokens import token_kinds
from l2a.kd.data import Batch, DistillationSet, Indices, read_tokens
from l2a.kd.losses import soft_label_loss
from l2a.student.student import Student
from l2a.teacher.labelling import TeacherOutputs
from l2a.teacher.model import Teacher
from l2a.util.training import evaluating, mixed_precision

MIX_CONCENTRATION = 0.4
"""lambda ~ Beta(0.4, 0.4), as in MixKD (Liang et al., ICLR 2021)."""
Weights = NDArray[np.float32]
PAIRS_AT_ONCE = 64
SAMPLED_TOKENS = 512


@dataclass(frozen=True)
class MixedBatches:
    """Reads batches in which some examples are interpolated with a partner (MixKD, Liang et al., ICLR 2021).

    Attributes:
        start: Position of the first of the N mixed examples in the joined set.
        partners: Position of the first of their N partners.
        weights: float32 (N,), lambda of each.
    """

    start: int
    partners: int
    weights: Weights

    def __call__(self, student: Student, data: DistillationSet, indices: Indices) -> tuple[Batch, TeacherOutputs]:
        """Read a batch, as a ``BatchReader``; the teacher's outputs of the mixed examples are those of the mixes."""
        mixed = (indices >= self.start) & (indices < self.start + len(self.weights))
        offsets = np.where(mixed, indices - self.start, 0)
        weights = np.where(mixed, self.weights[offsets], np.float32(1.0)).astype(np.float32)
        partners = np.where(mixed, offsets + self.partners, indices)
        return mix_pairs(student.model, data.encoded, indices, partners, weights), data.teacher.take(indices)


def mix_pairs(model: Any, encoded: EncodedTexts, first: Indices, second: Indices, weights: Weights) -> Batch:
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


def mixed_outputs(teacher: Teacher, pairs: EncodedTexts, weights: Weights) -> TeacherOutputs:
    """Run the teacher on interpolations of its own word embeddings.

    Args:
        teacher: In eval mode.
        pairs: 2N texts in its tokens: N texts, then the partner of each.
        weights: float32 (N,), lambda.

    Returns:
        Logits and embeddings of the N mixes.
    """
    count, found = len(weights), []
    order = np.argsort(np.maximum(pairs.lengths[:count], pairs.lengths[count:]), kind="stable")
    with torch.inference_mode(), mixed_precision(next(teacher.parameters()).device):
        for rows in np.split(order, range(PAIRS_AT_ONCE, count, PAIRS_AT_ONCE)):
            outputs = teacher(mix_pairs(teacher.encoder, pairs, rows, rows + count, weights[rows]))
            found.append([part.float().cpu().numpy() for part in outputs])
    return TeacherOutputs(*(np.concatenate(parts)[np.argsort(order)] for parts in zip(*found, strict=True)))


@dataclass(frozen=True)
class PerturbedBatches:
    """Reads batches in which some examples take a step up KL(teacher, student) in embedding space (FGSM).

    Attributes:
        start: Position of the first of the N perturbed examples in the joined set.
        teacher: Runs on its own perturbed embeddings.
        texts: The N texts in the teacher's tokens.
        teacher_open: The same texts with 1 for each token that may move, else 0.
        student_open: The same, in the student's tokens.
        teacher_step: Length of a token's step in the teacher's embedding space.
        student_step: The same, in the student's.
    """

    start: int
    teacher: Teacher
    texts: EncodedTexts
    teacher_open: EncodedTexts
    student_open: EncodedTexts
    teacher_step: float
    student_step: float

    def __call__(self, student: Student, data: DistillationSet, indices: Indices) -> tuple[Batch, TeacherOutputs]:
        """Read a batch; see ``MixedBatches``."""
        batch, outputs = read_tokens(student, data, indices)
        rows = np.flatnonzero((indices >= self.start) & (indices < self.start + len(self.texts)))
        if not len(rows):
            return batch, outputs
        table, device = student.model.get_input_embeddings(), student.output.weight.device
        embeds = table(batch.pop("input_ids"))
        chosen, places = indices[rows] - self.start, torch.from_numpy(rows).to(device)
        mine = {name: value[places] for name, value in batch.items()} | {"inputs_embeds": embeds[places]}
        theirs = mix_pairs(self.teacher.encoder, self.texts, chosen, chosen, np.ones(len(chosen), np.float32))
        for part in (mine, theirs):
            part["inputs_embeds"] = part["inputs_embeds"].detach().requires_grad_(True)
        with evaluating(student.model):
            student_logits, _ = student(mine)
            with mixed_precision(device):
                teacher_logits, _ = self.teacher(theirs)
            loss = soft_label_loss(student_logits, teacher_logits.float(), 1.0, "none").sum()
            ascent, teacher_ascent = torch.autograd.grad(loss, (mine["inputs_embeds"], theirs["inputs_embeds"]))
        shift = _step(ascent, self.student_open, chosen, self.student_step)
        teacher_shift = _step(teacher_ascent, self.teacher_open, chosen, self.teacher_step)
        theirs["inputs_embeds"] = theirs["inputs_embeds"] + teacher_shift
        with torch.inference_mode(), mixed_precision(device):
            logits, pooled = (part.float().cpu().numpy() for part in self.teacher(theirs))
        taught = TeacherOutputs(outputs.logits.copy(), outputs.embeddings.copy())
        taught.logits[rows], taught.embeddings[rows] = logits, pooled
        return batch | {"inputs_embeds": embeds.index_add(0, places, shift)}, taught


def _step(gradient: Tensor, is_open: EncodedTexts, indices: Indices, length: float) -> Tensor:
    """The sign of the gradient, scaled so that each open token moves by ``length``."""
    flags = is_open.padded(indices)["input_ids"].to(gradient.device)
    flags = nn.functional.pad(flags, (0, gradient.shape[1] - flags.shape[1]))
    step: Tensor = gradient.sign() * flags[:, :, None] * (length / gradient.shape[2] ** 0.5)
    return step


def open_tokens(encoded: EncodedTexts, tokens: tuple[str, ...]) -> EncodedTexts:
    """Mark the tokens that operators may change: words and pieces of letters, no special tokens.

    Args:
        encoded: N texts.
        tokens: The vocabulary, by id.

    Returns:
        The same texts with 1 for each such token and 0 for the others.
    """
    allowed = token_kinds(tokens)[1].numpy().astype(np.int32)
    return replace(encoded, ids=allowed[encoded.ids], pad_id=0)


def median_neighbour_distance(embeddings: Tensor, tokens: tuple[str, ...], rng: np.random.Generator) -> float:
    """Measure how far a word is from its nearest other word: the length of a step that stays among words.

    Args:
        embeddings: float32 (V, d), on the CPU.
        tokens: The vocabulary, by id.
        rng: Draws the words that are measured.

    Returns:
        The median over at most 512 words.
    """
    words = token_kinds(tokens)[1].nonzero().flatten()
    rows = embeddings[words]
    sample = torch.from_numpy(rng.permutation(len(words))[:SAMPLED_TOKENS])
    distances = torch.cdist(rows[sample], rows)
    distances[torch.arange(len(sample)), sample] = torch.inf
    return float(distances.min(dim=1).values.median())
