"""The general student: factorised embeddings read from the teacher, and the projections that it is trained through."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from l2a.errors import UsageError
from l2a.pretraining.shape import StudentShape

TOKENS_PER_CHUNK = 4096


@dataclass(frozen=True)
class StudentStates:
    """What the student makes of a batch, in the teacher's space.

    Attributes:
        sentence: float32 (B, d), the projected input of the classifier's output layer.
        tokens: float32 (B, L, d), the projected last hidden states.
    """

    sentence: torch.Tensor
    tokens: torch.Tensor


class GeneralStudent(nn.Module):
    """A sequence classifier whose body is trained through two projections; they are dropped on export.

    Attributes:
        classifier: ``ElectraForSequenceClassification``; the ``dense`` layer of its head is trained here too, so that
            the exported head starts from a sentence representation, and only its output layer is fresh.
        sentence_projection: (h) -> (d).
        token_projection: (h) -> (d).
    """

    def __init__(self, classifier: nn.Module, teacher_width: int, seed: int) -> None:
        """Add the projections.

        Args:
            classifier: The student.
            teacher_width: Width d of the teacher's states.
            seed: Draws the projections.
        """
        super().__init__()
        self.classifier = classifier
        width = int(classifier.config.hidden_size)  # type: ignore[union-attr, arg-type]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.sentence_projection = nn.Linear(width, teacher_width)
            self.token_projection = nn.Linear(width, teacher_width)

    def forward(self, batch: dict[str, torch.Tensor]) -> StudentStates:
        """Project the student's states.

        Args:
            batch: input_ids, attention_mask and token_type_ids, int64 (B, L).

        Returns:
            The states in the teacher's space.
        """
        hidden = self.classifier.electra(**batch).last_hidden_state  # type: ignore[operator]
        sentence = self.sentence_projection(sentence_representation(self.classifier, hidden))
        return StudentStates(sentence.float(), self.token_projection(hidden).float())


def sentence_representation(classifier: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Compute what the output layer of an ELECTRA classifier reads: gelu(dense(first token)).

    Args:
        classifier: ``ElectraForSequenceClassification``.
        hidden: float (B, L, h), its last hidden states.

    Returns:
        float (B, h).
    """
    head: Any = classifier.classifier
    return torch.nn.functional.gelu(head.dense(hidden[:, 0]))


def build_student(encoder: nn.Module, tokenizer: Any, shape: StudentShape, seed: int) -> nn.Module:
    """Create a student that shares the teacher's vocabulary and starts from its word representations.

    Args:
        encoder: The pretrained teacher, a transformers encoder.
        tokenizer: Its tokenizer.
        shape: Size of the student.
        seed: Draws every weight that is not read from the teacher.

    Returns:
        An ``ElectraForSequenceClassification`` with two labels and dropout 0.
    """
    from transformers import ElectraConfig, ElectraForSequenceClassification

    config = ElectraConfig(
        vocab_size=encoder.get_input_embeddings().num_embeddings,  # type: ignore[operator]
        embedding_size=shape.embedding_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=shape.positions,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = ElectraForSequenceClassification(config)
    embeddings = principal_word_vectors(word_states(encoder, tokenizer), shape.embedding_size)
    with torch.no_grad():
        student.electra.embeddings.word_embeddings.weight.copy_(embeddings)
    start_by_averaging(student.electra)
    return student


def start_by_averaging(body: Any) -> None:
    """Let every attention block start as the mean over all tokens (our derivation).

    Small random queries and keys attend to all tokens alike; identity values and outputs pass the mean on. With the
    usual small random values the first token, which the classifier reads, sees nothing of the text for long.

    Args:
        body: An ELECTRA model, changed in place.
    """
    for layer in body.encoder.layer:
        nn.init.eye_(layer.attention.self.value.weight)
        nn.init.eye_(layer.attention.output.dense.weight)


@torch.inference_mode()
def word_states(encoder: nn.Module, tokenizer: Any) -> torch.Tensor:
    """Read every vocabulary entry through the teacher, on its own between the special tokens.

    Args:
        encoder: A transformers encoder.
        tokenizer: Its tokenizer.

    Returns:
        float32 (V, d), the last hidden state of each word.
    """
    device = next(encoder.parameters()).device
    ids = torch.arange(encoder.get_input_embeddings().num_embeddings, device=device)  # type: ignore[operator]
    first, last = (torch.full_like(ids, value) for value in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    inputs = torch.stack([first, ids, last], dim=1)
    parts = [encoder(part).last_hidden_state[:, 1] for part in torch.split(inputs, TOKENS_PER_CHUNK)]
    return torch.cat(parts).float().cpu()


def principal_word_vectors(states: torch.Tensor, size: int) -> torch.Tensor:
    """Project word states onto their leading principal components, scaled to ELECTRA's initial size.

    Args:
        states: float32 (V, d).
        size: Number of components, at most d.

    Returns:
        float32 (V, size), each component's scale kept relative to the others, mean row norm 0.02 sqrt(size).

    Raises:
        UsageError: If size exceeds d.
    """
    if size > states.shape[1]:
        raise UsageError(f"student embedding_size: {size} exceeds the teacher's width {states.shape[1]}; lower it")
    centred = states - states.mean(0)
    eigenvectors = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :size]
    # The sign of an eigenvector is arbitrary: fix it, so that every machine starts from the same student.
    eigenvectors = eigenvectors * eigenvectors.sum(0).sign()
    projected: torch.Tensor = centred @ eigenvectors
    scale: torch.Tensor = 0.02 * size**0.5 / projected.norm(dim=1).mean()
    return projected * scale
