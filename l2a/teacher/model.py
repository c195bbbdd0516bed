"""The teacher: an encoder with a classification head, or a model that is fine-tuned already."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from l2a.data.encoding import model_inputs
from l2a.util.errors import UsageError
from l2a.util.files import fingerprint

NEVER_DECIDES = ("_name_or_path", "transformers_version", "dtype")


class Teacher(nn.Module):
    """Classifies texts and embeds them.

    A pretrained encoder gets mean pooling and a fresh linear head. A model that already classifies keeps its own
    head, and its mean-pooled last hidden state is the embedding.

    Attributes:
        encoder: A model of transformers; where ``head`` is None it returns logits itself.
        tokenizer: The model's fast tokenizer.
        label_names: The C class names, in the order of the logits.
        head: (d) -> (C) on the mean-pooled last hidden state, or None.
    """

    def __init__(
        self, encoder: nn.Module, tokenizer: Any, label_names: tuple[str, ...], head: nn.Linear | None
    ) -> None:
        """Join an encoder and a head; the arguments are the attributes."""
        super().__init__()
        self.encoder: Any = encoder
        self.head = head
        self.tokenizer = tokenizer
        self.label_names = label_names

    def forward(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Classify and embed a padded batch.

        Args:
            batch: attention_mask, optionally token_type_ids, int64 (B, L), with either input_ids, int64 (B, L), or
                inputs_embeds, float32 (B, L, d).

        Returns:
            Logits, float32 (B, C), and mean-pooled last hidden states, float32 (B, d).
        """
        inputs = model_inputs(self.encoder.config, batch)
        outputs = self.encoder(**inputs, output_hidden_states=self.head is None)
        hidden = outputs.hidden_states[-1] if self.head is None else outputs.last_hidden_state
        pooled = mean_pool(hidden, batch["attention_mask"])
        return (outputs.logits if self.head is None else self.head(pooled)), pooled

    @property
    def hidden_size(self) -> int:
        """Width d of the embeddings."""
        return int(self.encoder.config.hidden_size)

    @property
    def positions(self) -> int | None:
        """Longest sequence that it reads, in tokens; None where there is no limit."""
        return usable_positions(self.encoder)

    @property
    def parameters_count(self) -> int:
        """All parameters, embeddings and head included."""
        return sum(parameter.numel() for parameter in self.parameters())

    def word_embeddings(self) -> torch.Tensor:
        """Return the word-embedding matrix E, float32 (V, d), detached."""
        weight: torch.Tensor = self.encoder.get_input_embeddings().weight
        return weight.detach().float()

    def fingerprint(self) -> str:
        """Hash weights, class names, tokenizer and settings: the key of everything that the teacher labels."""
        weights = {name: value.cpu().float().numpy() for name, value in self.state_dict().items()}
        tokenizer = json.loads(self.tokenizer.backend_tokenizer.to_str())
        tokenizer |= {"truncation": None, "padding": None}  # these change with every call
        config = {k: v for k, v in self.encoder.config.to_dict().items() if k not in NEVER_DECIDES}
        settings = json.dumps([tokenizer, config], sort_keys=True, default=str)
        return fingerprint(weights, list(self.label_names), settings)


def mean_pool(hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Average the hidden states of the real tokens.

    Args:
        hidden: float (B, L, d).
        attention_mask: int64 (B, L), 1 for real tokens.

    Returns:
        float (B, d).
    """
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0)


def output_layer(classifier: Any) -> nn.Linear:
    """Find the last linear layer of a sequence classifier, the one that gives the logits.

    Args:
        classifier: Any ``AutoModelForSequenceClassification``.

    Returns:
        The layer, of C outputs and with a bias.

    Raises:
        UsageError: If there is none.
    """
    layers = [module for module in classifier.modules() if isinstance(module, nn.Linear)]
    classes = classifier.config.num_labels
    if not layers or layers[-1].out_features != classes or layers[-1].bias is None:
        raise UsageError(
            f"{type(classifier).__name__} has no linear output layer with a bias for {classes} classes; "
            "give an encoder such as BERT, MPNet, RoBERTa, ELECTRA, DistilBERT or ModernBERT"
        )
    return layers[-1]


def usable_positions(model: Any) -> int | None:
    """Count the tokens that a model can read at once.

    RoBERTa and its kin number positions from one above the padding's id, so that not all of their rows can be used.

    Args:
        model: Any model of transformers, also one without weights.

    Returns:
        The longest sequence, or None where there is no limit.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limit = module.num_embeddings - module.padding_idx - 1
    return None if limit is None or limit < 1 else int(limit)
