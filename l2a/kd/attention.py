"""Attention transfer: the student's last layer learns to look where the teacher's last layer looks.

The teacher reads every batch again, because its maps are too large to be cached, and both models run without fused
attention, which returns no maps.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from l2a.kd.data import Batch
from l2a.kd.losses import Reduction, attention_loss
from l2a.student.student import Student
from l2a.teacher.model import Teacher
from l2a.util.errors import UsageError
from l2a.util.training import mixed_precision


class AttentionTransfer:
    """Compares the maps of a student in training with those of its teacher (TinyBERT, Jiao et al., 2020)."""

    def __init__(self, student: Student, teacher: Teacher) -> None:
        """Copy the teacher's encoder, so that labelling keeps its fast kernels and its last digits.

        Args:
            student: Its maps are kept while it is watched.
            teacher: Of the same vocabulary.

        Raises:
            UsageError: If the two read different tokens.
        """
        if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
            raise UsageError(
                "kd.attention_weight: it compares maps over the same tokens, but student and teacher have different "
                "vocabularies; set it to 0 or take a student.preset that keeps the teacher's vocabulary (narrow "
                "or scratch)"
            )
        self._student = student
        self._encoder: Any = copy.deepcopy(teacher.encoder.base_model).eval()
        _choose_kernel(self._encoder, "eager")
        self._map = torch.zeros(0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Let the student run eagerly and keep its last layer's map of every forward pass."""
        model = self._student.model
        kernel = model.config._attn_implementation
        _choose_kernel(model, "eager")
        hooks = [
            model.register_forward_pre_hook(_ask_for_maps, with_kwargs=True),
            model.register_forward_hook(self._keep_map),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            _choose_kernel(model, kernel)

    def _keep_map(self, model: torch.nn.Module, arguments: tuple[Any, ...], outputs: Any) -> None:
        self._map = outputs.attentions[-1]

    def loss(self, batch: Batch, tokens: torch.Tensor | None, reduction: Reduction = "mean") -> torch.Tensor:
        """Compare the maps of the batch that the watched student read last.

        The student's map is the one it used: in training with dropout.

        Args:
            batch: What it read, with input_ids.
            tokens: int64 (U,), the teacher's token of each id in the batch; None where they are the teacher's.
            reduction: "mean" over the texts, or "none".

        Returns:
            float32 () or (B,), see ``attention_loss``.

        Raises:
            UsageError: If the student read embeddings, for which the teacher has no tokens.
        """
        if "input_ids" not in batch:
            raise UsageError(
                "kd.attention_weight: mixkd and unprojected_fgsm give the student embeddings that no tokens of the "
                "teacher match; set it to 0 or choose another generator.operator"
            )
        ids, mask = batch["input_ids"], batch["attention_mask"]
        inputs = {"input_ids": ids if tokens is None else tokens[ids], "attention_mask": mask}
        if getattr(self._encoder.config, "type_vocab_size", 0):
            inputs["token_type_ids"] = batch["token_type_ids"]
        with torch.no_grad(), mixed_precision(mask.device):
            taught = self._encoder(**inputs, output_attentions=True).attentions[-1]
        return attention_loss(self._map.float(), taught.float(), mask, reduction)


def _ask_for_maps(
    model: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return arguments, named | {"output_attentions": True}


def _choose_kernel(model: Any, name: str) -> None:
    if model.config._attn_implementation != name:  # models that only run eagerly refuse to be asked
        model.set_attn_implementation(name)
