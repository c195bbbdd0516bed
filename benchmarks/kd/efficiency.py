"""How near training and labelling come to the speed at which the machine multiplies matrices."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from material import MAX_LENGTH, Material
from timing import Seconds, timed
from torch import nn
from torch.profiler import ProfilerActivity, profile

from l2a.data.encoding import encode, inference_batches
from l2a.teacher.labelling import cached_labeller
from l2a.util.training import CPU, mixed_precision

COUNTED = (
    "multiply-adds of every linear layer, the output layer among them, and of the two attention products (queries with "
    "keys, weights with values) of every layer, on the padded batches that are computed; a training step counts three "
    "times its forward pass. Not counted: embeddings, layer norms, softmax, GELU, dropout, losses, the projection of "
    "the hidden-state loss, clipping, optimiser, averaging, tokenisation, reading and writing. The time is that of the "
    "whole call, the last look at the validation split included; the rate is that of products of two square matrices"
)


@dataclass(frozen=True)
class ForwardCost:
    """Multiply-adds of a forward pass.

    Attributes:
        per_token: In linear layers that read every token.
        per_text: In linear layers that read one vector a text.
        per_pair: In the attention products, for each pair of tokens of a text.
    """

    per_token: int
    per_text: int
    per_pair: int

    def of(self, shapes: Sequence[tuple[int, int]]) -> int:
        """Count for padded batches of B texts of L tokens."""
        return sum(b * (length * self.per_token + self.per_text + length**2 * self.per_pair) for b, length in shapes)


def forward_cost(model: nn.Module, config: Any, call: Callable[[dict[str, torch.Tensor]], Any]) -> ForwardCost:
    """Find a model's cost by watching its linear layers on a batch of two texts of eight tokens."""
    rows: dict[int, int] = {16: 0, 2: 0}

    def watch(layer: nn.Linear, arguments: tuple[torch.Tensor, ...]) -> None:
        rows[arguments[0].numel() // layer.in_features] += layer.in_features * layer.out_features

    hooks = [m.register_forward_pre_hook(watch) for m in model.modules() if isinstance(m, nn.Linear)]
    names = ("input_ids", "attention_mask", "token_type_ids")
    with torch.inference_mode():
        call({name: torch.ones(2, 8, dtype=torch.int64) for name in names})
    for hook in hooks:
        hook.remove()
    return ForwardCost(rows[16], rows[2], 2 * config.num_hidden_layers * config.hidden_size)


def matmul_seconds(size: int, dtype: torch.dtype) -> Seconds:
    """Time a product of two square matrices, at torch's number of threads.

    Args:
        size: Rows and columns.
        dtype: Number format.

    Returns:
        Mean of one product.
    """
    left, right = (torch.randn(size, size, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (0, 1))
    return _mean_seconds(lambda: left @ right)


def products_alone(model: nn.Module, rows: int, dtype: torch.dtype) -> tuple[int, Seconds]:
    """Time the products of a training step's linear layers, one after the other and nothing between them.

    Args:
        model: A student.
        rows: Tokens in a batch.
        dtype: Number format.

    Returns:
        Multiply-adds, and the mean of all the products: outputs, and gradients of inputs and weights.
    """
    weights = [layer.weight.detach().to(dtype) for layer in model.modules() if isinstance(layer, nn.Linear)]
    inputs = [torch.randn(rows, weight.shape[1], dtype=dtype) for weight in weights]
    slopes = [torch.randn(rows, weight.shape[0], dtype=dtype) for weight in weights]

    def multiply() -> None:
        for weight, x, slope in zip(weights, inputs, slopes, strict=True):
            x @ weight.T, slope @ weight, slope.T @ x

    return 3 * rows * sum(weight.numel() for weight in weights), _mean_seconds(multiply)


def _mean_seconds(work: Callable[[], Any], least: float = 1.0) -> Seconds:
    """Time some work again and again: over a span as long as what it is compared with, other load slows both alike."""
    work()
    count, deadline = 0, time.perf_counter() + least

    def repeat() -> None:
        nonlocal count
        while time.perf_counter() < deadline:
            work()
            count += 1

    spent = timed(repeat)
    return Seconds(spent.wall / count, spent.cpu / count)


@contextmanager
def fresh_cache() -> Iterator[None]:
    """Let l2a cache in a folder that is gone afterwards."""
    before = os.environ.get("L2A_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["L2A_CACHE"] = folder
        try:
            yield
        finally:
            os.environ.pop("L2A_CACHE")
            if before is not None:
                os.environ["L2A_CACHE"] = before


def label(material: Material) -> Seconds:
    """Label all texts through l2a's labeller with nothing cached, and return how long it took."""
    with fresh_cache():
        labeller = cached_labeller(material.teacher, MAX_LENGTH)
        return timed(lambda: labeller(material.texts.inputs))


def arithmetic_dtype() -> torch.dtype:
    """Number format in which l2a's teacher and this student multiply on this machine."""
    with mixed_precision(CPU):
        return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32


def labelling_shapes(material: Material) -> list[tuple[int, int]]:
    """Shapes of the padded batches that the teacher labels."""
    encoded = encode(material.teacher.tokenizer, list(dict.fromkeys(material.texts.inputs)), MAX_LENGTH)
    return [tuple(encoded.padded(indices)["input_ids"].shape) for indices in inference_batches(encoded)]


def top_operations(work: Callable[[], Any], count: int = 10) -> list[dict[str, Any]]:
    """Profile a piece of work and list the operations with most CPU time of their own."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        work()
    table = sorted(recorded.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in table)
    return [
        {"operation": row.key, "share": round(row.self_cpu_time_total / total, 4), "calls": row.count}
        for row in table[:count]
    ]
