"""A narrow BERT: fresh layers, as wide as the budget allows, over word vectors read from the teacher or random."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from l2a.students.alignment import aligned_size, start_by_aligning
from l2a.students.attention import start_by_averaging
from l2a.students.fitting import attention_heads, largest_fitting
from l2a.students.head import open_head
from l2a.students.request import StudentRequest
from l2a.students.student import Student
from l2a.students.word_vectors import even_word_vectors, principal_word_vectors
from l2a.teacher.labelling import token_vectors

LEAST_WIDTH = 32


def build_narrow(request: StudentRequest) -> Student:
    """Build a narrow BERT that starts from the teacher's token vectors.

    Args:
        request: The student wanted.

    Returns:
        The student.

    Raises:
        UsageError: If the budget does not hold it.
    """
    student = Student(
        fresh_bert(request, "narrow", request.teacher.tokenizer, request.layers), request.teacher.tokenizer
    )
    start_from_words(student, token_vectors(request.teacher), request.of_pairs)
    return student


def build_scratch(request: StudentRequest) -> Student:
    """Build the control: a BERT of the narrow student's size, with the usual random weights throughout.

    Args:
        request: The student wanted.

    Returns:
        The student.

    Raises:
        UsageError: If the budget does not hold it.
    """
    tokenizer = request.teacher.tokenizer
    return Student(fresh_bert(request, "scratch", tokenizer, request.layers), tokenizer)


def fresh_bert(request: StudentRequest, preset: str, tokenizer: Any, layers: int) -> Any:
    """Make the widest BERT classifier that fits the budget and is not wider than the teacher.

    Args:
        request: The student wanted.
        preset: Name of the preset, for the message.
        tokenizer: Its vocabulary has one embedding a token.
        layers: Number of layers.

    Returns:
        ``BertForSequenceClassification`` with random weights.

    Raises:
        UsageError: If the budget does not hold the narrowest.
    """
    from transformers import BertConfig, BertForSequenceClassification

    def build(width: int) -> Any:
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=attention_heads(width),
            intermediate_size=4 * width,
            max_position_embeddings=request.positions,
            pad_token_id=tokenizer.pad_token_id,
            hidden_dropout_prob=0.0,  # with so few updates dropout costs a fifth of their time and helps nothing
            attention_probs_dropout_prob=0.0,
            **request.labels(),
        )
        return BertForSequenceClassification(config)

    return build(largest_fitting(request, preset, widths(request), build))


def widths(request: StudentRequest) -> range:
    """List the widths that a model over the teacher's token vectors may have.

    Args:
        request: The student wanted.

    Returns:
        Multiples of 8 from 32 to the teacher's width, or that width alone if it is smaller.
    """
    return range(min(LEAST_WIDTH, request.width), request.width + 1, 8)


def start_from_words(student: Student, vectors: NDArray[np.float32], of_pairs: bool = False) -> None:
    """Let a fresh student start as a mean over words; over words and what sets them apart from their matches in a pair.

    What the teacher makes of each token alone already holds much of the task, also for words that no text shows; the
    principal directions keep most of that.

    Args:
        student: A BERT, ELECTRA or ModernBERT classifier, changed in place.
        vectors: float32 (V, d), one vector for each token of its vocabulary.
        of_pairs: Whether a BERT is to align the two texts that it reads; it needs two attention heads, and a tokenizer
            that marks the texts.
    """
    body, table = student.model.base_model, student.model.get_input_embeddings()
    aligned = aligned_size(body) if of_pairs and _marks_sides(student.tokenizer) else 0
    start_by_averaging(body)
    with torch.no_grad():
        if aligned:
            table.weight.zero_()
            table.weight[:, : aligned - 1] = even_word_vectors(vectors, aligned - 1)
            start_by_aligning(body)
        else:
            table.weight.copy_(principal_word_vectors(vectors, table.embedding_dim))
    open_head(student)


def _marks_sides(tokenizer: Any) -> bool:
    return any(tokenizer("a", "a", return_token_type_ids=True)["token_type_ids"])
