"""Where arithmetic runs: a GPU if there is one, and bfloat16 where the hardware multiplies it natively."""

import torch


def best_device() -> torch.device:
    """Choose a GPU where there is one.

    Returns:
        The device that models are trained on.
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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


def mixed_precision(device: torch.device) -> torch.autocast:
    """Run matrix products in bfloat16 where that pays; weights, sums and losses stay float32.

    Args:
        device: Where the model is.

    Returns:
        A context, without effect on other hardware.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bfloat16(device))
