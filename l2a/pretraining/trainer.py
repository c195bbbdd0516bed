"""Trains the general student on the teacher's cached states."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from l2a.cache import fingerprint
from l2a.errors import RunError
from l2a.precision import mixed_precision
from l2a.pretraining.batches import batch_stream
from l2a.pretraining.checkpoint import load_checkpoint, save_checkpoint
from l2a.pretraining.config import PretrainConfig
from l2a.pretraining.losses import sentence_loss, similarity_loss, token_loss
from l2a.pretraining.model import GeneralStudent
from l2a.pretraining.targets import TeacherTargets
from l2a.progress import SILENT, Progress
from l2a.teacher.model import mean_pool

WARM_UP = 0.05
LOG_EVERY = 50
SIMILARITY_WEIGHT = 0.05
WORD_RATE = 3.0
"""Rate of the word vectors relative to the rest: most words are seen in few steps."""


@dataclass(frozen=True)
class StepLosses:
    """The three losses of a step.

    Attributes:
        sentence: Scalar.
        similarity: Scalar.
        token: Scalar.
    """

    sentence: torch.Tensor
    similarity: torch.Tensor
    token: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        """Their weighted sum; the similarity's gradient is the largest by far at equal weights."""
        return self.sentence + SIMILARITY_WEIGHT * self.similarity + self.token


def train(
    model: GeneralStudent,
    targets: TeacherTargets,
    config: PretrainConfig,
    checkpoint: Path,
    progress: Progress = SILENT,
) -> None:
    """Train in place, from the checkpoint if there is one.

    Args:
        model: On the device to train on.
        targets: The labelled corpus.
        config: Steps, rate, batch and seed.
        checkpoint: Folder of the checkpoint.
        progress: Shows the steps and records the losses.

    Raises:
        RunError: If a loss is not finite.
        UsageError: If the checkpoint belongs to another run.
    """
    optimizer, settings = _optimizer(model, config), _settings(config, targets)
    first = load_checkpoint(checkpoint, model, optimizer, settings)
    stream = batch_stream(targets.encoded.lengths, config.tokens_per_batch, config.seed, first, config.steps)
    with progress.stage("general stage", config.steps) as advance:
        advance(first)
        for step, batch in enumerate(stream, start=first):
            inputs = targets.encoded.padded(batch)
            hidden = targets.padded_hidden(batch, inputs["input_ids"].shape[1])
            losses = _step(model, optimizer, inputs, hidden, learning_rate(step, config))
            _check_and_log(losses, step, progress)
            advance(1)
            if (step + 1) % config.checkpoint_every == 0:
                save_checkpoint(checkpoint, model, optimizer, step + 1, settings)


def learning_rate(step: int, config: PretrainConfig) -> float:
    """Rate of a step: linear warm-up over 5 % of the steps, then linear decay to zero.

    Args:
        step: Steps done before it.
        config: Steps and peak rate.

    Returns:
        The rate.
    """
    warm_up = max(1, math.ceil(WARM_UP * config.steps))
    rising = (step + 1) / warm_up
    falling = (config.steps - step) / max(1, config.steps - warm_up)
    return config.learning_rate * min(rising, falling, 1.0)


def _settings(config: PretrainConfig, targets: TeacherTargets) -> str:
    choices = dataclasses.asdict(config)
    # Neither changes the student, so a resumed run may change them.
    del choices["output_dir"], choices["checkpoint_every"]
    encoded = targets.encoded
    return fingerprint(choices, encoded.ids, encoded.types, encoded.offsets, targets.states(0))


def _optimizer(model: GeneralStudent, config: PretrainConfig) -> torch.optim.AdamW:
    words = model.classifier.get_input_embeddings().weight  # type: ignore[operator]
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1 and parameter is not words]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [
        {"params": [words], "weight_decay": 0.0, "relative_rate": WORD_RATE},
        {"params": matrices, "weight_decay": 0.01, "relative_rate": 1.0},
        {"params": vectors, "weight_decay": 0.0, "relative_rate": 1.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)


def _step(
    model: GeneralStudent,
    optimizer: torch.optim.Optimizer,
    inputs: dict[str, torch.Tensor],
    hidden: torch.Tensor,
    rate: float,
) -> StepLosses:
    device = next(model.parameters()).device
    inputs = {name: value.to(device, non_blocking=True) for name, value in inputs.items()}
    for group in optimizer.param_groups:
        group["lr"] = rate * group["relative_rate"]
    losses = step_losses(model, inputs, hidden.to(device, non_blocking=True))
    optimizer.zero_grad()
    losses.total.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return losses


def step_losses(model: GeneralStudent, inputs: dict[str, torch.Tensor], hidden: torch.Tensor) -> StepLosses:
    """Compare the student's states with the teacher's.

    Args:
        model: The student.
        inputs: input_ids, attention_mask and token_type_ids, int64 (B, L).
        hidden: float (B, L, d), the teacher's last hidden states.

    Returns:
        The three losses.
    """
    mask = inputs["attention_mask"]
    with mixed_precision(mask.device):
        states = model(inputs)
    sentence, tokens, pooled = states.sentence.float(), states.tokens.float(), mean_pool(hidden.float(), mask)
    return StepLosses(
        sentence_loss(sentence, pooled),
        similarity_loss(sentence, pooled),
        token_loss(tokens, hidden.float(), mask),
    )


def _check_and_log(losses: StepLosses, step: int, progress: Progress) -> None:
    finite = bool(losses.total.isfinite())
    if finite and step % LOG_EVERY:
        return
    values = {name: getattr(losses, name).item() for name in ("sentence", "similarity", "token")}
    if not finite:
        raise RunError(f"general stage: the loss of step {step} is not finite {values}; lower --learning-rate")
    progress.event("general stage", step=step, **values)
