"""Starts attention as a mean over the words: what a student can tell at first is what a bag of words can tell."""

from typing import Any

import torch
from torch import nn

QUERIES = ("query", "q_lin", "q")
"""What the architectures call the layer that makes the queries."""


def start_by_averaging(body: Any) -> None:
    """Let every attention block start as the mean over all tokens.

    Small random queries and keys attend to all tokens alike; identity values and outputs pass the mean on. With the
    usual small random values the first token, which the classifier reads, sees nothing of the text for long.

    Args:
        body: A BERT, ELECTRA or ModernBERT model without its head, changed in place.
    """
    with torch.no_grad():
        for values, outputs in _values_and_outputs(body):
            nn.init.eye_(values)
            nn.init.eye_(outputs)


def _values_and_outputs(body: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    if body.config.model_type == "modernbert":  # one matrix holds queries, keys and values, in this order
        width = body.config.hidden_size
        return [(layer.attn.Wqkv.weight[2 * width :], layer.attn.Wo.weight) for layer in body.layers]
    blocks = [layer.attention for layer in body.encoder.layer]
    return [(block.self.value.weight, block.output.dense.weight) for block in blocks]


def let_last_layer_average(body: Any) -> None:
    """Let the last of some trained layers attend to all tokens alike; its values and everything below stay.

    In the middle of a trained encoder the first token has hardly looked at the others yet, but a classifier that is cut
    off there reads it alone.

    Args:
        body: A BERT, ELECTRA, DistilBERT or MPNet model without its head, changed in place.
    """
    queries = [module for name, module in body.named_modules() if name.rpartition(".")[2] in QUERIES]
    for parameter in queries[-1].parameters():
        nn.init.zeros_(parameter)
