"""Builds the student: a narrow BERT that is read from the teacher, or any checkpoint."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from l2a.errors import RunError, UsageError
from l2a.quiet import silence_transformers
from l2a.students.config import StudentConfig
from l2a.students.student import Student
from l2a.teacher.labelling import token_vectors
from l2a.teacher.model import Teacher

EMBEDDING_SCALE = 0.05
"""Standard deviation of a fresh student's word embeddings."""


def build_student(config: StudentConfig, teacher: Teacher, label_names: tuple[str, ...], seed: int) -> Student:
    """Build the student and check its size.

    Args:
        config: The checkpoint, if any, and the largest share.
        teacher: Gives embeddings, vocabulary and the size to compare with.
        label_names: The C classes.
        seed: Draws the weights that are not initialised from the teacher.

    Returns:
        The student in eval mode, on the CPU.

    Raises:
        UsageError: If the checkpoint has no tokenizer or the student is larger than allowed.
        RunError: If the checkpoint cannot be loaded.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.model is not None:
            student = _from_checkpoint(config.model, label_names)
        else:
            student = _narrow(teacher, label_names, config.max_share)
    share = student.parameters_count / teacher.parameters_count
    if share > config.max_share:
        raise UsageError(
            f"student: {student.parameters_count:,} parameters are {share:.1%} of the teacher's "
            f"{teacher.parameters_count:,}; at most {config.max_share:.1%} is allowed (student.max_share)"
        )
    student.model.eval()
    return student


def _from_checkpoint(model: str, label_names: tuple[str, ...]) -> Student:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    silence_transformers()
    names = dict(enumerate(label_names))
    try:
        loaded = AutoModelForSequenceClassification.from_pretrained(
            model,
            dtype=torch.float32,
            use_safetensors=True,
            id2label=names,
            label2id={name: i for i, name in names.items()},
            ignore_mismatched_sizes=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"student.model {model!r}: not loadable ({reason}); give a model folder or a Hub id") from error
    if not tokenizer.is_fast:
        raise UsageError(f"student.model {model!r}: it has no fast tokenizer; save tokenizer.json into its folder")
    return Student(loaded, tokenizer)


def narrow_width(vocabulary: int, positions: int, layers: int, budget: int) -> int:
    """Find the widest BERT whose parameters fit a budget.

    Args:
        vocabulary: V.
        positions: Longest sequence.
        layers: Transformer layers.
        budget: Parameters allowed.

    Returns:
        The hidden size, a multiple of 8.

    Raises:
        UsageError: If not even 32 fits.
    """
    # 12 h^2 a layer plus the pooler's h^2, embeddings of V + positions + 2 rows, and 16 h a layer of biases and norms.
    fitting = [
        h
        for h in range(32, 1025, 8)
        if (12 * layers + 1) * h * h + (vocabulary + positions + 8 + 16 * layers) * h <= budget
    ]
    if not fitting:
        raise UsageError(
            f"student.max_share: {budget:,} parameters do not hold a vocabulary of {vocabulary:,}; "
            "raise student.max_share or give --student a checkpoint with a smaller vocabulary"
        )
    return fitting[-1]


def _narrow(teacher: Teacher, label_names: tuple[str, ...], max_share: float) -> Student:
    from transformers import BertConfig, BertForSequenceClassification

    source = teacher.encoder.config
    vectors = token_vectors(teacher)
    layers = max(2, int(source.num_hidden_layers) // 3)
    positions = min(512, int(source.max_position_embeddings))
    budget = int(max_share * teacher.parameters_count) - 4096 - 1024 * len(label_names)  # room for the head
    width = min(narrow_width(len(vectors), positions, layers, budget), vectors.shape[1])
    config = BertConfig(
        vocab_size=len(vectors),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 32) if width % max(1, width // 32) == 0 else width // 8,
        intermediate_size=4 * width,
        max_position_embeddings=positions,
        pad_token_id=teacher.tokenizer.pad_token_id,
        id2label=dict(enumerate(label_names)),
        label2id={name: i for i, name in enumerate(label_names)},
    )
    model = BertForSequenceClassification(config)
    _read_embeddings(model, vectors)
    return Student(model, teacher.tokenizer)


def _read_embeddings(model: Any, vectors: NDArray[np.float32]) -> None:
    # What the teacher makes of each token alone already holds much of the task, also for words that no text shows.
    # The principal directions keep most of that; one scale brings the rows to the size that BERT starts from.
    table = torch.from_numpy(vectors)
    centred = table - table.mean(0)
    width = model.config.hidden_size
    _, directions = torch.linalg.eigh(centred.T @ centred)
    reduced = centred @ directions[:, -width:].flip(1)
    embeddings: nn.Embedding = model.get_input_embeddings()
    with torch.no_grad():
        embeddings.weight.copy_(reduced * (EMBEDDING_SCALE / reduced.std()))
