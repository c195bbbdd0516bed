"""What a preset is built from: the teacher, the classes, the domains' texts and the size that is allowed."""

import copy
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from l2a.config import StudentConfig
from l2a.data.examples import TextInput
from l2a.student.initialisation import (
    aligned_size,
    even_word_vectors,
    let_last_layer_average,
    open_head,
    principal_word_vectors,
    start_by_aligning,
    start_by_averaging,
)
from l2a.student.student import Student, load_checkpoint
from l2a.student.vocabulary import choose_tokens, count_tokens, keep_tokens, needed_tokens, refuse_other_tokenizers
from l2a.teacher.labelling import token_vectors
from l2a.teacher.model import Teacher
from l2a.util.errors import UsageError
from l2a.util.training import seeded


@dataclass(frozen=True)
class StudentRequest:
    """One student wanted.

    Attributes:
        teacher: Gives weights, vocabulary and the size to compare with.
        label_names: The C classes.
        texts: Texts of the domains, without labels; they say which tokens are worth keeping.
        max_share: Largest allowed share of the teacher's parameters.
    """

    teacher: Teacher
    label_names: tuple[str, ...]
    texts: Sequence[TextInput]
    max_share: float

    @property
    def budget(self) -> int:
        """Parameters allowed."""
        return int(self.max_share * self.teacher.parameters_count)

    @property
    def of_pairs(self) -> bool:
        """Whether the student is to read two texts at a time."""
        return bool(self.texts) and len(self.texts[0]) == 2

    @property
    def width(self) -> int:
        """Width d of the teacher; word vectors cannot be wider."""
        return self.teacher.hidden_size

    @property
    def positions(self) -> int:
        """Longest sequence that a fresh student reads, in tokens."""
        return min(512, int(self.teacher.encoder.config.max_position_embeddings))

    @property
    def layers(self) -> int:
        """Layers of a fresh student: a third of the teacher's, at least two."""
        return max(2, int(self.teacher.encoder.config.num_hidden_layers) // 3)

    def labels(self) -> dict[str, Any]:
        """Name the classes as a config of transformers wants them."""
        names = dict(enumerate(self.label_names))
        return {"id2label": names, "label2id": {name: index for index, name in names.items()}}


def largest_fitting(request: StudentRequest, preset: str, sizes: Sequence[int], build: Callable[[int], Any]) -> int:
    """Find the largest size whose model fits the budget.

    Args:
        request: Says how many parameters are allowed.
        preset: Name of the preset, for the message.
        sizes: At least one size, rising; the model grows with it.
        build: Makes the model of a size.

    Returns:
        A member of ``sizes``.

    Raises:
        UsageError: If not even the first fits.
    """
    fitting = bisect_right(sizes, request.budget, key=lambda size: parameters_count(lambda: build(size)))
    if not fitting:
        least = parameters_count(lambda: build(sizes[0]))
        share = math.ceil(1000 * least / request.teacher.parameters_count) / 1000
        raise UsageError(
            f"student.max_share: {request.max_share} of the teacher are {request.budget:,} parameters, the preset "
            f"{preset!r} needs at least {least:,}; raise student.max_share to {share}, choose another student.preset, "
            "or give --student a smaller checkpoint"
        )
    return sizes[fitting - 1]


def parameters_count(build: Callable[[], Any]) -> int:
    """Count the parameters of a model that is built without memory for its weights.

    Args:
        build: Makes the model.

    Returns:
        All parameters, embeddings and head included.
    """
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters())


def attention_heads(width: int) -> int:
    """Choose the number of attention heads of a fresh layer.

    Args:
        width: Hidden size, even.

    Returns:
        The largest number whose heads are at least 32 wide (one below that), of even width, and fill the layer.
    """
    return max(heads for heads in range(1, max(1, width // 32) + 1) if width % (2 * heads) == 0)


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


PRESETS: Mapping[str, Callable[[StudentRequest], Student]] = {
    "auto": build_narrow,
    "narrow": build_narrow,
    "scratch": build_scratch,
    "pruned": build_pruned,
}


def build_student(
    config: StudentConfig, teacher: Teacher, label_names: tuple[str, ...], texts: Sequence[TextInput], seed: int
) -> Student:
    """Build the student and check its size.

    Args:
        config: The preset or the checkpoint, and the largest share.
        teacher: Gives weights, vocabulary and the size to compare with.
        label_names: The C classes.
        texts: Texts of the domains, without labels: a pruned vocabulary keeps the tokens that they use.
        seed: Draws the weights that are not initialised from the teacher.

    Returns:
        The student in eval mode, on the CPU.

    Raises:
        UsageError: If the checkpoint has no tokenizer, the preset does not suit the teacher or the student is larger
            than allowed.
        RunError: If the checkpoint cannot be loaded.
    """
    with seeded(seed):
        if config.model is not None:
            student = load_checkpoint(config.model, label_names)
        else:
            student = PRESETS[config.preset](StudentRequest(teacher, label_names, texts, config.max_share))
    share = student.parameters_count / teacher.parameters_count
    if share > config.max_share:
        raise UsageError(
            f"student: {student.parameters_count:,} parameters are {share:.1%} of the teacher's "
            f"{teacher.parameters_count:,}; at most {config.max_share:.1%} is allowed (student.max_share)"
        )
    student.model.eval()
    return student
