"""A ModernBERT whose classifier reads the mean over all tokens."""

import copy
from typing import Any

from l2a.students.fitting import attention_heads, largest_fitting
from l2a.students.narrow import start_from_words, widths
from l2a.students.request import StudentRequest
from l2a.students.student import Student
from l2a.teacher.labelling import token_vectors


def build_mean_pooled(request: StudentRequest) -> Student:
    """Build a mean-pooled ModernBERT that starts by averaging the teacher's token vectors.

    Args:
        request: The student wanted.

    Returns:
        The student.

    Raises:
        UsageError: If the budget does not hold it.
    """
    width = largest_fitting(request, "mean_pooled", widths(request), lambda width: _modernbert(request, width))
    student = Student(_modernbert(request, width), _without_types(request.teacher.tokenizer))
    start_from_words(student, token_vectors(request.teacher))
    return student


def _modernbert(request: StudentRequest, width: int) -> Any:
    from transformers import ModernBertConfig, ModernBertForSequenceClassification

    tokenizer = request.teacher.tokenizer
    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=request.layers,
        num_attention_heads=attention_heads(width),
        intermediate_size=2 * width,
        max_position_embeddings=request.positions,
        layer_types=["full_attention"] * request.layers,
        classifier_pooling="mean",
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep", "bos", "eos")},
        **request.labels(),
    )
    return ModernBertForSequenceClassification(config)


def _without_types(tokenizer: Any) -> Any:
    # The architecture takes no token types: the sides of a pair are told apart by the separator alone.
    plain = copy.deepcopy(tokenizer)
    plain.model_input_names = ["input_ids", "attention_mask"]
    plain.init_kwargs["model_input_names"] = plain.model_input_names
    return plain
