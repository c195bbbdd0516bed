"""The teacher's first layers at full width, over the part of its vocabulary that the domains use."""

import copy
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from l2a.students.attention import let_last_layer_average
from l2a.students.fitting import largest_fitting, parameters_count
from l2a.students.head import open_head
from l2a.students.request import StudentRequest
from l2a.students.student import Student
from l2a.students.vocabulary import (
    choose_tokens,
    count_tokens,
    keep_tokens,
    needed_tokens,
    refuse_other_tokenizers,
)

LEAST_VOCABULARY = 1 / 8
"""A further layer is kept only where it leaves room for this part of the teacher's vocabulary."""


def build_pruned(request: StudentRequest) -> Student:
    """Cut a student out of the teacher.

    Args:
        request: The student wanted.

    Returns:
        The student; its layers and the vectors of the tokens that it keeps are the teacher's, but the last layer
        attends to all tokens alike.

    Raises:
        UsageError: If the vocabulary is not WordPiece, or if the budget does not hold one layer with the tokens that
            spelling needs.
    """
    tokenizer = request.teacher.tokenizer
    refuse_other_tokenizers(tokenizer, "pruned")
    counts = count_tokens(tokenizer, request.texts)
    least, layers = int(needed_tokens(tokenizer, counts).sum()), _layers(request)
    sizes = range(least, len(tokenizer) + 1)
    size = largest_fitting(request, "pruned", sizes, partial(_classifier, request, layers, pad_token_id=0))
    kept = choose_tokens(tokenizer, counts, size)
    pruned = keep_tokens(tokenizer, kept)
    student = Student(_classifier(request, layers, size, pruned.pad_token_id).eval(), pruned)
    _read_weights(student.model.base_model, request.teacher.encoder.base_model, kept)
    let_last_layer_average(student.model.base_model)
    open_head(student, request.texts)
    return student


def _layers(request: StudentRequest) -> int:
    least = int(LEAST_VOCABULARY * len(request.teacher.tokenizer))
    for layers in range(int(request.teacher.encoder.config.num_hidden_layers), 1, -1):
        if parameters_count(partial(_classifier, request, layers, least, 0)) <= request.budget:
            return layers
    return 1


def _classifier(request: StudentRequest, layers: int, vocabulary: int, pad_token_id: int) -> Any:
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(request.teacher.encoder.config)
    config.update({"num_hidden_layers": layers, "vocab_size": vocabulary, "pad_token_id": pad_token_id})
    config.update(request.labels())
    return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]


def _read_weights(body: Any, teacher: Any, kept: NDArray[np.int64]) -> None:
    shapes = {name: value.shape for name, value in body.state_dict().items()}
    shared = {name: value for name, value in teacher.state_dict().items() if shapes.get(name) == value.shape}
    body.load_state_dict(shared, strict=False)
    with torch.no_grad():
        rows = teacher.get_input_embeddings().weight[torch.from_numpy(kept)]
        body.get_input_embeddings().weight.copy_(rows)
