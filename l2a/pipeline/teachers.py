"""Trains the teachers of a run, each once: they are kept by the content of their data, weights and settings."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from l2a.cache import cached_folder, fingerprint
from l2a.errors import RunError
from l2a.examples import Examples
from l2a.progress import SILENT, Progress
from l2a.teacher.config import TeacherConfig
from l2a.teacher.finetune import fine_tune
from l2a.teacher.model import Teacher
from l2a.teacher.outputs import Labeller

WEIGHTS = "trained.safetensors"
logger = logging.getLogger(__name__)


def fine_tuned(
    base: Teacher,
    examples: Examples,
    config: TeacherConfig,
    epochs: float,
    max_length: int,
    seed: int,
    stage: str,
    progress: Progress = SILENT,
) -> Teacher:
    """Fine-tune a teacher, or read the result of the same training from the cache.

    Args:
        base: Where training starts; changed in place.
        examples: Labelled texts.
        config: Rates, batch size and frozen layers.
        epochs: Passes over the examples.
        max_length: Longest sequence in tokens.
        seed: Order of the examples and dropout.
        stage: Name shown to the user.
        progress: Shows the steps.

    Returns:
        The base, now fine-tuned, in eval mode.

    Raises:
        RunError: If the loss is not finite or the disk is full.
    """
    rates = dataclasses.asdict(config)
    settings = [rates[name] for name in ("frozen_layers", "learning_rate", "head_learning_rate", "batch_size")]
    texts = [list(text) for text in examples.inputs]
    key = fingerprint(base.fingerprint(), texts, examples.labels, settings, epochs, max_length, seed)

    def build(folder: Path) -> None:
        before = {name: value.clone() for name, value in base.state_dict().items()}
        fine_tune(base, examples, config, epochs, max_length, seed, stage, progress)
        changed = {name: v.contiguous() for name, v in base.state_dict().items() if not torch.equal(v, before[name])}
        save_file(changed, folder / WEIGHTS)

    folder = cached_folder("teachers", key, build)
    base.load_state_dict(load_file(folder / WEIGHTS), strict=False)
    return base.eval()


def refuse_useless_teacher(labeller: Labeller, reward: Examples, progress: Progress = SILENT) -> float:
    """Stop before distilling a teacher that knows nothing of the target.

    Args:
        labeller: The teacher.
        reward: Labelled target examples that it was not trained on.
        progress: Gets the accuracy.

    Returns:
        Its accuracy on them.

    Raises:
        RunError: If it is below chance by more than a standard error; near chance it is a warning.
    """
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
