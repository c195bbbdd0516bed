"""The general student: a classifier and the projections that it is trained through."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from l2a.randomness import seeded


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
        with seeded(seed):
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
