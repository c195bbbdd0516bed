"""Several processes that train one student together, as started by ``accelerate launch`` or ``torchrun``.

Every process draws the same batches, computes its share of each and adds the gradients up, so that the result is that
of one process with the same global batch. Everything else is computed by all alike or read from the shared cache.
"""

import os
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed

from l2a.precision import best_device, uses_gpu


def process_rank() -> int:
    """Return this process's number, 0 for the one that writes the results."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """Return how many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_processes() -> None:
    """Connect the processes of one launch; without a launcher nothing happens."""
    if process_count() > 1 and not distributed.is_initialized():
        distributed.init_process_group("nccl" if uses_gpu() else "gloo")


def agree(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Take the first process's numbers in all: kernels of GPUs may differ in the last digits.

    Args:
        values: float32, of the same shape in every process.

    Returns:
        The first process's.
    """
    if process_count() == 1:
        return values
    sent = torch.from_numpy(values).to(best_device())
    distributed.broadcast(sent, src=0)
    agreed: NDArray[np.float32] = sent.cpu().numpy()
    return agreed


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Add up the gradients of all processes, in one message.

    Args:
        parameters: Those with gradients, in the same order in every process.
    """
    if process_count() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    distributed.all_reduce(flat)
    for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
