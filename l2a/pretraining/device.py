"""What the machine computes well."""

import torch


def uses_bfloat16(device: torch.device) -> bool:
    """Tell whether bfloat16 matrix products pay on a device.

    Args:
        device: Where the model is.

    Returns:
        True on a GPU that has them, and on processors with matrix units for them (AMX).
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return device.type == "cpu" and bool(torch.cpu._is_amx_tile_supported())
