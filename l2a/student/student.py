"""The student: an ordinary sequence classifier of transformers, with a view on the state before its output layer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from l2a.util.errors import RunError, UsageError
from l2a.util.progress import silence_transformers


def output_layer(classifier: Any) -> nn.Linear:
    """Find the last linear layer of a sequence classifier, the one that gives the logits.

    Args:
        classifier: Any ``AutoModelForSequenceClassification``.

    Returns:
        The layer, of C outputs.

    Raises:
        UsageError: If there is none.
    """
    layers = [module for module in classifier.modules() if isinstance(module, nn.Linear)]
    if not layers or layers[-1].out_features != classifier.config.num_labels:
        name = type(classifier).__name__
        raise UsageError(
            f"student {name}: no linear output layer with {classifier.config.num_labels} classes was found"
        )
    return layers[-1]


class Student:
    """A sequence classifier, its tokenizer, and the features that its output layer reads.

    Attributes:
        model: ``AutoModelForSequenceClassification`` of transformers.
        tokenizer: Its fast tokenizer.
        output: The model's last linear layer (h) -> (C).
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """Watch a model's output layer.

        Args:
            model: ``AutoModelForSequenceClassification``.
            tokenizer: Its fast tokenizer.
        """
        self.model = model
        self.tokenizer = tokenizer
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
        types = "type_vocab_size" in self.model.config and self.model.config.type_vocab_size
        arguments = {name: value for name, value in batch.items() if name != "token_type_ids" or types}
        logits = self.model(**arguments).logits
        return logits, self._features

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
        """Load weights that ``snapshot`` copied.

        Args:
            weights: All of the model's weights.
        """
        self.model.load_state_dict(weights)


def load_checkpoint(model: str, label_names: tuple[str, ...]) -> Student:
    """Load a checkpoint as a classifier.

    Args:
        model: A folder or Hub id.
        label_names: The C classes.

    Returns:
        The student; an output layer of another number of classes is drawn afresh.

    Raises:
        RunError: If it cannot be loaded.
        UsageError: If it has no fast tokenizer or is no encoder.
    """
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
    student = Student(loaded, tokenizer)
    if tokenizer.pad_token_id is None or student.output.bias is None:
        raise UsageError(
            f"student.model {model!r}: a {loaded.config.model_type} without padding token or output bias came; "
            "encoders such as BERT, ELECTRA, DistilBERT or ModernBERT are allowed"
        )
    return student
