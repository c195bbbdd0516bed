"""Loads what an operator reads of models when it runs on a file, apart from any distillation."""

from typing import Any

import torch

from l2a.errors import RunError, UsageError
from l2a.generator.config import GeneratorConfig
from l2a.generator.neighbours import NeighbourTable, build_neighbour_table, token_kinds
from l2a.generator.problem import vocabulary
from l2a.generator.tinybert import MaskedCandidates, MaskedLanguageModel
from l2a.generator.token_rewriting import TokenSpace
from l2a.kd.gradients import embedding_gradients
from l2a.precision import best_device
from l2a.progress import SILENT, Progress
from l2a.students.checkpoint import load_checkpoint
from l2a.teacher.labelling import cached_labeller
from l2a.teacher.load import EMBEDDED, load_encoder, load_fine_tuned, load_masked_language_model, locate


def masked_language_model(model: str, max_length: int, progress: Progress = SILENT) -> MaskedCandidates | None:
    """Load a masked language model for TinyBERT's recipe.

    Args:
        model: "minilm-l6", a folder, or a Hub id.
        max_length: Longest sequence in tokens.
        progress: Shows the download.

    Returns:
        Its candidates; None when its weights have no masked-LM head.

    Raises:
        RunError: If the weights cannot be had.
        UsageError: If the folder is not a model with a tokenizer, or its vocabulary is not WordPiece.
    """
    loaded = load_masked_language_model(model, progress)
    return MaskedLanguageModel(*loaded, max_length) if loaded else None


def token_space(
    operator: str, teacher: str, student: str | None, max_length: int, progress: Progress = SILENT
) -> TokenSpace:
    """Load tokens, word embeddings and, where needed, neighbours and gradients.

    Args:
        operator: "augpro_mix", "augpro_fgsm" or "knn".
        teacher: An encoder; for augpro_fgsm a classifier.
        student: For augpro_fgsm, a classifier with the teacher's labels.
        max_length: Tokens read of a text.
        progress: Shows downloads and the search for neighbours.

    Returns:
        The space: the student's for augpro_fgsm, else the teacher's.

    Raises:
        RunError: If weights cannot be had.
        UsageError: If a model does not suit the operator.
    """
    if operator == "augpro_fgsm":
        return _gradient_space(teacher, student, max_length, progress)
    encoder = load_encoder(teacher, ("text",), 0, progress)
    embeddings = encoder.word_embeddings()
    table = None if operator == "knn" else _without_neighbours(encoder.tokenizer)
    return _space(encoder.tokenizer, embeddings, table, max_length, progress)


def _space(
    tokenizer: Any, embeddings: torch.Tensor, table: NeighbourTable | None, max_length: int, progress: Progress
) -> TokenSpace:
    tokens = vocabulary(tokenizer)
    embeddings = embeddings.cpu()[: len(tokens)]
    if table is None:
        table = build_neighbour_table(embeddings, tokens, GeneratorConfig().neighbours, progress)
    return TokenSpace(tokenizer, table, embeddings, None, max_length)


def _without_neighbours(tokenizer: Any) -> NeighbourTable:
    """A table that only says which tokens may change: the search for neighbours takes seconds."""
    word_start, allowed = token_kinds(vocabulary(tokenizer))
    none = torch.zeros(len(allowed), 0)
    return NeighbourTable(none.to(torch.int32), none, word_start, allowed)


def _gradient_space(teacher: str, student: str | None, max_length: int, progress: Progress) -> TokenSpace:
    if student is None or teacher == EMBEDDED:
        raise UsageError(
            "--operator augpro_fgsm: it needs two classifiers with the same labels; name both, "
            "by --teacher and --student, or use knn"
        )
    names = _label_names(student, progress)
    labeller = cached_labeller(load_fine_tuned(teacher, names, progress).to(best_device()), max_length, progress)
    model = load_checkpoint(locate(student, progress), names)
    model.model.to(best_device()).eval()
    space = _space(model.tokenizer, model.word_embeddings(), None, max_length, progress)
    return TokenSpace(
        space.tokenizer, space.neighbours, space.word_embeddings,
        lambda inputs: embedding_gradients(model, labeller, inputs, max_length), max_length,
    )  # fmt: skip


def _label_names(model: str, progress: Progress) -> tuple[str, ...]:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(locate(model, progress))
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"--student {model!r}: its config could not be loaded; give a model folder") from error
    return tuple(str(config.id2label[i]) for i in range(config.num_labels))
