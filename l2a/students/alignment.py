"""Starts a student of sentence pairs by aligning them: each word is compared with its match in the other sentence.

The mean over words that a fresh student starts with cannot relate two sentences. Here the first layer starts as the
decomposable attention of Parikh et al. (2016, arXiv 1606.01933): attend to alike words of the other sentence, compare,
and let the next layer average the comparisons. All of it are first weights of an ordinary BERT, free to change.
"""

from typing import Any

import torch
from torch import nn

TYPE_SIZE = 0.15
"""Entry that tells the sentences apart, beside word entries of deviation 0.1."""
TYPE_CONTRAST = 4.0
"""Strength with which a token looks away from its own sentence."""
SHARPNESS = 2.0
"""At 2, gelu(z) + gelu(-z) is close to |z|."""


def aligned_size(body: Any) -> int:
    """Tell how many entries of a state can hold a word beside what it is compared with.

    Args:
        body: A model without its head.

    Returns:
        The width of half of the attention heads, at most half the state; 0 where there is a single head or the model
        is no BERT, and nothing can be aligned.
    """
    if body.config.model_type != "bert":
        return 0
    heads = int(body.config.num_attention_heads)
    return heads // 2 * (int(body.config.hidden_size) // heads)


def start_by_aligning(body: Any) -> None:
    """Let the first layer add to every word how it differs from its match in the other sentence.

    The words must fill the first ``aligned_size`` - 1 entries of the embeddings, the others must be 0.

    Args:
        body: A BERT model without its head, of two attention heads or more, changed in place.
    """
    size, layer = aligned_size(body), body.encoder.layer[0]
    with torch.no_grad():
        _mark_sentences(body.embeddings.token_type_embeddings.weight, size - 1)
        _attend_to_matches(layer.attention, size)
        _compare(layer.intermediate.dense, layer.output.dense, size)


def _mark_sentences(types: torch.Tensor, entry: int) -> None:
    types.zero_()
    types[0, entry], types[1, entry] = TYPE_SIZE, -TYPE_SIZE


def _attend_to_matches(attention: Any, size: int) -> None:
    query, key, value = attention.self.query.weight, attention.self.key.weight, attention.self.value.weight
    width, heads = attention.self.attention_head_size, size // attention.self.attention_head_size
    for weight in (query, key, value):
        weight[:size] = 0
    for head in range(heads):
        start = head * width
        for weight, sign in ((query, -1.0), (key, 1.0)):
            nn.init.eye_(weight[start : start + width - 1, : width - 1])
            weight[start + width - 1, size - 1] = sign * TYPE_CONTRAST
    nn.init.eye_(value[:size, :size])
    output = attention.output.dense.weight
    output[:, :size] = 0
    nn.init.eye_(output[size : 2 * size, :size])


def _compare(inner: nn.Linear, outer: nn.Linear, size: int) -> None:
    """Replace the match y beside each word x by |x - y|, out of gelu(z) + gelu(-z) = |z| and gelu(z) - gelu(-z) = z."""
    identity = torch.eye(size)
    inner.weight[: 4 * size] = 0
    for block, (word, match) in enumerate(((1, -1), (-1, 1), (0, 1), (0, -1))):
        rows = inner.weight[block * size : (block + 1) * size]
        rows[:, :size], rows[:, size : 2 * size] = word * SHARPNESS * identity, match * SHARPNESS * identity
    outer.weight[:, : 4 * size] = 0
    for block, sign in enumerate((1, 1, -1, 1)):
        outer.weight[size : 2 * size, block * size : (block + 1) * size] = sign / SHARPNESS * identity
