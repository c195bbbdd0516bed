"""Fine-tunes a teacher on labelled examples: full sentences, few shots, no tricks that need a validation split."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from l2a.encoding import encode, training_batches
from l2a.errors import RunError
from l2a.examples import Examples
from l2a.optimisation import adamw, linear_schedule
from l2a.precision import mixed_precision
from l2a.progress import SILENT, Progress
from l2a.randomness import seeded
from l2a.teacher.config import TeacherConfig
from l2a.teacher.model import Teacher

LEAST_UPDATES = 16
"""Made however few the examples are: with fewer steps few-shot fine-tuning often fails (Mosbach et al., 2021)."""


def fine_tune(
    teacher: Teacher,
    examples: Examples,
    config: TeacherConfig,
    epochs: float,
    max_length: int,
    seed: int,
    stage: str,
    progress: Progress = SILENT,
) -> Teacher:
    """Train encoder and head in place with cross-entropy.

    Bias-corrected AdamW, a linear schedule with warm-up and enough steps are what make few-shot fine-tuning stable
    (Mosbach et al., 2021; Zhang et al., 2021). The embeddings and the lowest layers stay frozen.

    Args:
        teacher: Changed in place; left in eval mode.
        examples: Labelled texts; batches smaller than the batch size are trained on as well.
        config: Rates, batch size and frozen layers.
        epochs: Passes over the examples; more where these are fewer than 16 updates.
        max_length: Longest sequence in tokens.
        seed: Order of the examples and dropout.
        stage: Name shown to the user.
        progress: Shows the steps.

    Returns:
        The same teacher.

    Raises:
        RunError: If the loss is not finite; the batch is named.
    """
    if config.frozen_layers is not None:
        freeze_lower_layers(teacher, config.frozen_layers)
    encoded = encode(teacher.tokenizer, examples.inputs, max_length)
    total = max(LEAST_UPDATES, round(epochs * math.ceil(len(examples) / config.batch_size)))
    head = list(teacher.head.parameters()) if teacher.head is not None else []
    optimizer = adamw([(list(teacher.encoder.parameters()), config.learning_rate), (head, config.head_learning_rate)])
    schedule, rng = linear_schedule(optimizer, total), np.random.default_rng(seed)
    labels = torch.from_numpy(examples.labels)
    device = next(teacher.parameters()).device
    step = 0
    teacher.train()
    with seeded(seed), progress.stage(stage, total) as advance:  # dropout
        while step < total:
            for indices in training_batches(encoded.lengths, config.batch_size, rng):
                batch = encoded.padded(indices, device)
                with mixed_precision(device):
                    logits = teacher(batch)[0]
                loss = functional.cross_entropy(logits.float(), labels[indices].to(device))
                _check_finite(loss, stage, step, examples, indices)
                _update(teacher, optimizer, schedule, loss)
                step += 1
                advance(1)
                if step == total:
                    break
    return teacher.eval()


def freeze_lower_layers(teacher: Teacher, layers: int) -> None:
    """Stop the gradient below a layer: the embeddings and the lowest layers keep their weights.

    Args:
        teacher: Changed in place.
        layers: How many encoder layers to freeze; 0 freezes only the embeddings.
    """
    teacher.encoder.get_input_embeddings().requires_grad_(False)
    for name, module in teacher.encoder.named_modules():
        if name.split(".")[-1] == "embeddings":
            module.requires_grad_(False)
        if isinstance(module, nn.ModuleList) and name.split(".")[-1] in ("layer", "layers"):
            for layer in list(module)[: min(layers, len(module) - 1)]:
                layer.requires_grad_(False)


def _update(
    teacher: Teacher,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    loss: torch.Tensor,
) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_([p for p in teacher.parameters() if p.grad is not None], 1.0)
    optimizer.step()
    schedule.step()


def _check_finite(loss: torch.Tensor, stage: str, step: int, examples: Examples, indices: NDArray[np.int64]) -> None:
    if not torch.isfinite(loss):
        first = examples.inputs[indices[0]][0][:60]
        raise RunError(
            f"{stage}: the loss is {loss.item()} at step {step}, batch starting with {first!r}; lower the learning rate"
        )
