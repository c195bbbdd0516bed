"""The student: an ordinary sequence classifier of transformers, with a view on the state before its output layer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from l2a.data.encoding import fit_tokenizer, model_inputs
from l2a.teacher.load import open_checkpoint
from l2a.teacher.model import output_layer, usable_positions


class Student:
    """A sequence classifier, its tokenizer, and the features that its output layer reads.

    Attributes:
        model: ``AutoModelForSequenceClassification`` of transformers.
        tokenizer: Its fast tokenizer, whose own call returns what the model reads.
        output: The model's last linear layer (h) -> (C).
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """Watch a model's output layer.

        Args:
            model: ``AutoModelForSequenceClassification``.
            tokenizer: A fast tokenizer of its vocabulary; it is copied.

        Raises:
            UsageError: If the model has no such layer.
        """
        self.model = model
        self.tokenizer = fit_tokenizer(tokenizer, model.config)
        self.output = output_layer(model)
        self._features = torch.zeros(0)
        self.output.register_forward_pre_hook(self._keep_features)

    def _keep_features(self, module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        self._features = arguments[0]

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Classify a padded batch.

        Args:
            batch: As made by ``EncodedTexts.padded``; inputs_embeds, float32 (B, L, e), may stand for input_ids.

        Returns:
            Logits, float32 (B, C), and the features that gave them, float32 (B, h).
        """
        logits = self.model(**model_inputs(self.model.config, batch)).logits
        return logits, self._features

    @property
    def positions(self) -> int | None:
        """Longest sequence that it reads, in tokens; None where there is no limit."""
        return usable_positions(self.model)

    @property
    def parameters_count(self) -> int:
        """All parameters, embeddings and head included."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def embeddings_name(self) -> str:
        """Name of the word-embedding matrix among the model's weights."""
        table = self.model.get_input_embeddings().weight
        return next(str(name) for name, parameter in self.model.named_parameters() if parameter is table)

    def word_embeddings(self) -> torch.Tensor:
        """Return the word-embedding matrix, float32 (V, e), detached."""
        weight: torch.Tensor = self.model.get_input_embeddings().weight
        return weight.detach().float()

    def snapshot(self) -> dict[str, torch.Tensor]:
        """Copy all weights."""
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def restore(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Load weights that ``snapshot`` copied."""
        self.model.load_state_dict(weights)


def class_names(label_names: tuple[str, ...]) -> dict[str, Any]:
    """Name the C classes as a config of transformers wants them."""
    return {"id2label": dict(enumerate(label_names)), "label2id": {name: i for i, name in enumerate(label_names)}}


def load_checkpoint(model: str, label_names: tuple[str, ...], weights: bool = True) -> Student:
    """Load a checkpoint as a classifier.

    Args:
        model: A folder, a Hub id or "minilm-l6".
        label_names: The C classes.
        weights: False gives a student without memory for its weights, for checks.

    Returns:
        The student; an output layer of another number of classes is drawn afresh.

    Raises:
        RunError: If it cannot be fetched.
        UsageError: If it is broken or no encoder with a fast tokenizer that fits it.
    """
    from transformers import AutoModelForSequenceClassification

    checkpoint, names = open_checkpoint("student.model", model), class_names(label_names)
    checkpoint.config.update(names)
    if not weights:
        return Student(checkpoint.build(AutoModelForSequenceClassification), checkpoint.tokenizer)
    loaded = checkpoint.load(AutoModelForSequenceClassification, fresh_head=True, **names)
    return Student(loaded, checkpoint.tokenizer)
