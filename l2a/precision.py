"""Where arithmetic runs: a GPU if there is one, and bfloat16 where the hardware multiplies it natively."""

import os

import torch

CPU = torch.device("cpu")


def best_device() -> torch.device:
    """Choose a GPU where there is one.

    Returns:
        The device that models are trained on.
    """
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if uses_gpu() else CPU


def uses_gpu() -> bool:
    """Tell whether there is a GPU that ``accelerate launch --cpu`` has not ruled out.

    Returns:
        True where models are trained on it.
    """
    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"


def has_fast_bfloat16(device: torch.device) -> bool:
    """Tell whether matrix products in bfloat16 are much faster than in float32 on a device.

    Args:
        device: Where a model is.

    Returns:
        True on GPUs that support it and on CPUs with AMX tiles.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def mixed_precision(device: torch.device, on_cpu: bool = True) -> torch.autocast:
    """Run matrix products in bfloat16 where that pays; weights, sums and losses stay float32.

    Args:
        device: Where the model is.
        on_cpu: Also on CPUs with the tiles for it; matrices as narrow as a student's do not gain there.

    Returns:
        A context, without effect on other hardware.
    """
    pays = has_fast_bfloat16(device) and (on_cpu or device.type != "cpu")
    return torch.autocast(device.type, torch.bfloat16, enabled=pays)
