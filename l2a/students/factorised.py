"""An ELECTRA whose word vectors are narrower than its layers, so that the layers get a fair part of the parameters."""

from typing import Any

from torch import nn

from l2a.students.fitting import attention_heads, largest_fitting
from l2a.students.narrow import LEAST_WIDTH, start_from_words
from l2a.students.request import StudentRequest
from l2a.students.student import Student
from l2a.teacher.labelling import token_vectors

WORDS_PART = 3
"""Layers are this many times as wide as the word vectors, so that a vocabulary of 30,000 gets two thirds of a student
of three million parameters; being wider, they can keep all distances between the vectors."""


def build_factorised(request: StudentRequest) -> Student:
    """Build an ELECTRA that starts by averaging the teacher's token vectors.

    Args:
        request: The student wanted.

    Returns:
        The student.

    Raises:
        UsageError: If the budget does not hold it.
    """
    widths = range(LEAST_WIDTH, WORDS_PART * request.width + 1, 8)
    model = _electra(request, largest_fitting(request, "factorised", widths, lambda width: _electra(request, width)))
    student = Student(model, request.teacher.tokenizer)
    start_from_words(student, token_vectors(request.teacher))
    nn.init.orthogonal_(model.electra.embeddings_project.weight)
    return student


def _electra(request: StudentRequest, width: int) -> Any:
    from transformers import ElectraConfig, ElectraForSequenceClassification

    config = ElectraConfig(
        vocab_size=len(request.teacher.tokenizer),
        embedding_size=width // WORDS_PART // 4 * 4,
        hidden_size=width,
        num_hidden_layers=request.layers,
        num_attention_heads=attention_heads(width),
        intermediate_size=4 * width,
        max_position_embeddings=request.positions,
        pad_token_id=request.teacher.tokenizer.pad_token_id,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **request.labels(),
    )
    return ElectraForSequenceClassification(config)
