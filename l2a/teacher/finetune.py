"""Fine-tunes a teacher on labelled examples: full sentences, few shots, no tricks that need a validation split."""

import itertools
import logging
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from l2a.config import TeacherConfig
from l2a.data.encoding import encode, training_batches
from l2a.data.examples import Examples
from l2a.teacher.labelling import Labeller
from l2a.teacher.model import Teacher
from l2a.teacher.states import encoder_layers, frozen_layers, lower_states, upper_layers
from l2a.util.errors import RunError
from l2a.util.files import cached_folder, fingerprint
from l2a.util.progress import SILENT, Progress
from l2a.util.training import Loop, adamw, arithmetic, linear_schedule, mixed_precision, seeded

RECIPE = 4
"""Raise it whenever ``fine_tune`` gives other weights than before: cached teachers are then trained again."""
logger = logging.getLogger(__name__)


def fine_tuned(
    base: Teacher, examples: Examples, config: TeacherConfig, epochs: float, max_length: int, seed: int,
    stage: str, progress: Progress = SILENT,
) -> Teacher:  # fmt: skip
    """Fine-tune a teacher by ``fine_tune``, or read the result of the same training from the cache.

    Args:
        base: Where training starts; changed in place.
        examples: Labelled texts.
        config: Rates, batch size and frozen layers.
        epochs: Passes over the examples; more where these are fewer than 16 updates.
        max_length: Longest sequence in tokens.
        seed: Order of the examples and dropout.
        stage: Name shown to the user.
        progress: Shows the steps.

    Returns:
        The base, now fine-tuned, in eval mode.

    Raises:
        RunError: If the loss is not finite or the disk is full.
    """
    settings = [config.frozen_layers, config.learning_rate, config.head_learning_rate, config.batch_size]
    texts, device = [list(text) for text in examples.inputs], next(base.parameters()).device
    how = [RECIPE, arithmetic(device)]
    key = fingerprint(base.fingerprint(), texts, examples.labels, settings, epochs, max_length, seed, how)

    def build(folder: Path) -> None:
        before = {name: value.clone() for name, value in base.state_dict().items()}
        fine_tune(base, examples, config, epochs, max_length, seed, stage, progress, key)
        changed = {name: v.contiguous() for name, v in base.state_dict().items() if not torch.equal(v, before[name])}
        save_file(changed, folder / "trained.safetensors")

    folder = cached_folder("teachers", key, build)
    if progress.checkpoint is not None:
        progress.checkpoint.drop(key)
    base.load_state_dict(load_file(folder / "trained.safetensors"), strict=False)
    return base.eval()


def fine_tune(
    teacher: Teacher, examples: Examples, config: TeacherConfig, epochs: float, max_length: int, seed: int,
    stage: str, progress: Progress = SILENT, key: str = "",
) -> Teacher:  # fmt: skip
    """Train encoder and head in place with cross-entropy; the arguments are those of ``fine_tuned``, and its key.

    Bias-corrected AdamW, a linear schedule with warm-up and enough steps are what make few-shot fine-tuning stable
    (Mosbach et al., 2021; Zhang et al., 2021).

    Raises:
        RunError: If the loss is not finite; the batch is named.
    """
    frozen = frozen_layers(teacher, config.frozen_layers)
    if frozen is not None:
        freeze_lower_layers(teacher, frozen)
    states = lower_states(teacher, frozen, examples.inputs, max_length, progress) if frozen else None
    model = upper_layers(teacher, frozen) if frozen and states else teacher
    read = states or encode(teacher.tokenizer, examples.inputs, max_length)
    total = max(16, round(epochs * math.ceil(len(examples) / config.batch_size)))
    head = list(teacher.head.parameters()) if teacher.head is not None else []
    optimizer = adamw([(list(teacher.encoder.parameters()), config.learning_rate), (head, config.head_learning_rate)])
    schedule, rng = linear_schedule(optimizer, total), np.random.default_rng(seed)
    epoch_batches = (training_batches(read.lengths, config.batch_size, rng) for _ in itertools.count())
    batches = itertools.islice(itertools.chain.from_iterable(epoch_batches), total)
    labels, device = torch.from_numpy(examples.labels), next(teacher.parameters()).device
    teacher.train()
    model.train()
    with seeded(seed), progress.stage(stage, total) as advance:  # dropout
        loop = Loop(progress.checkpoint, key, schedule, total)
        advance(loop.done)
        for step, indices in enumerate(itertools.islice(batches, loop.done, None), loop.done):
            with mixed_precision(device):
                logits = model(read.padded(indices, device))[0]
            loss = functional.cross_entropy(logits.float(), labels[indices].to(device))
            if not torch.isfinite(loss):
                first = f"batch starting with {examples.inputs[indices[0]][0][:60]!r}"
                raise RunError(f"{stage}: the loss is {loss.item()} at step {step}, {first}; lower the learning rate")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_([p for p in teacher.parameters() if p.grad is not None], 1.0)
            optimizer.step()
            schedule.step()
            loop.update_done()
            advance(1)
    return teacher.eval()


def freeze_lower_layers(teacher: Teacher, layers: int) -> None:
    """Let so many of the lowest layers, and all that lies below or is shared by layers, keep their weights, in place.

    MPNet and DeBERTa-v2 share one table of relative positions: trained, it would change what the frozen layers give.
    """
    teacher.encoder.requires_grad_(False)
    upper = list(encoder_layers(teacher.encoder)[1])[layers:]
    for module in upper or [teacher.encoder]:
        module.requires_grad_(True)
    teacher.encoder.get_input_embeddings().requires_grad_(False)


def refuse_useless_teacher(labeller: Labeller, reward: Examples, progress: Progress = SILENT) -> float:
    """Stop before distilling a teacher that knows nothing of the target; return its accuracy, if it can be told.

    Args:
        labeller: The teacher.
        reward: Labelled target examples that it was not trained on.
        progress: Gets the accuracy.

    Raises:
        RunError: If it is below chance by more than a standard error; near chance it is a warning.
    """
    if not len(reward):
        return float("nan")
    chance = 1 / len(reward.label_names)
    accuracy = float(np.mean(labeller(reward.inputs).logits.argmax(axis=1) == reward.labels))
    progress.event("teacher_on_reward_split", accuracy=accuracy, chance=chance)
    message = (
        f"teacher: it is right on {accuracy:.0%} of {len(reward)} held-out target examples, chance is {chance:.0%}; "
        "check that the labels of source and target mean the same, give more --shots, or choose another --teacher"
    )
    standard_error = (chance * (1 - chance) / len(reward)) ** 0.5
    if accuracy < chance - standard_error:
        raise RunError(message)
    if accuracy < chance + 2 * standard_error:
        logger.warning(message)
    return accuracy
