"""What the generator works on: two domains, their labels by the teacher, and callables instead of models."""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from l2a.examples import TextInput
from l2a.generator.neighbours import NeighbourTable
from l2a.teacher.outputs import Labeller, TeacherOutputs

Gradient = Callable[[Sequence[TextInput]], Sequence[NDArray[np.float32]]]
"""Gradients of KL(teacher, student) with respect to the word embeddings: float32 (L_i, d) for each text, one row for
each token of the problem's tokenizer, special ones included, cut to the maximum length."""


@dataclass(frozen=True)
class GeneratorProblem:
    """All that the generator reads.

    Attributes:
        source_inputs: S texts of the source domain.
        target_inputs: The n labelled texts of the target domain.
        source_outputs: The teacher's outputs for the source texts.
        target_outputs: The teacher's outputs for the target texts.
        tokenizer: A fast WordPiece tokenizer; that of the student where ``gradient`` is the student's.
        word_embeddings: float32 (V, d), on the CPU, in the tokenizer's order.
        neighbours: The table built from ``word_embeddings``.
        labeller: Labels new texts with the teacher.
        gradient: For AugPro-FGSM; None leaves that operator out.
        forbidden_hashes: Normalised hashes of the test texts, which are never drawn.
        max_length: Tokens that the models read of a text, special ones included.
    """

    source_inputs: tuple[TextInput, ...]
    target_inputs: tuple[TextInput, ...]
    source_outputs: TeacherOutputs
    target_outputs: TeacherOutputs
    tokenizer: Any
    word_embeddings: Tensor
    neighbours: NeighbourTable
    labeller: Labeller
    gradient: Gradient | None
    forbidden_hashes: AbstractSet[str]
    max_length: int

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """The vocabulary, by id."""
        return vocabulary(self.tokenizer)


def vocabulary(tokenizer: Any) -> tuple[str, ...]:
    """List the vocabulary of a tokenizer, added tokens included.

    Args:
        tokenizer: A tokenizer of transformers.

    Returns:
        V token texts, by id.
    """
    tokens: list[str] = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return tuple(tokens)
