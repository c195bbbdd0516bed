"""Exact resume: weights and optimizer state as safetensors, the step as JSON, nothing pickled."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from l2a.errors import UsageError
from l2a.files import atomic_folder, atomic_write_text, restore_folder

FOLDER = "checkpoint"
STATES = "states.safetensors"
STEP = "step.json"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def save_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, settings: str) -> None:
    """Write a checkpoint that takes the place of the last one in one move.

    Args:
        folder: The checkpoint's folder.
        model: Its parameters and their AdamW moments are saved.
        optimizer: AdamW over the model's parameters.
        step: Steps done.
        settings: Fingerprint of everything that decides the run.

    Raises:
        RunError: If the disk is full.
    """
    tensors = {f"model.{name}": value.detach().contiguous() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        tensors |= {f"{moment}.{name}": state[moment] for moment in MOMENTS if moment in state}
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / STATES)
        atomic_write_text(temporary / STEP, json.dumps({"step": step, "settings": settings}))


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: str) -> int:
    """Continue where a checkpoint left off.

    Args:
        folder: The checkpoint's folder.
        model: Filled in place.
        optimizer: Filled in place.
        settings: Fingerprint of this run, which must equal the checkpoint's.

    Returns:
        Steps done; 0 if there is no checkpoint.

    Raises:
        UsageError: If the checkpoint belongs to a run with other settings.
    """
    restore_folder(folder)
    if not folder.is_dir():
        return 0
    saved = json.loads((folder / STEP).read_text("utf-8"))
    if saved["settings"] != settings:
        raise UsageError(
            f"output_dir: the checkpoint in {folder} belongs to a run with other text, seed or settings; "
            "repeat that run's options to resume it, or give another --output-dir"
        )
    tensors = load_file(folder / STATES)
    model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
    for name, parameter in model.named_parameters():
        state = {moment: tensors[f"{moment}.{name}"] for moment in MOMENTS if f"{moment}.{name}" in tensors}
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
    return int(saved["step"])
