"""The optimiser and the learning-rate schedule that teachers and students share."""

from collections.abc import Sequence

import torch
from torch import nn


def adamw(groups: Sequence[tuple[Sequence[nn.Parameter], float]], weight_decay: float = 0.01) -> torch.optim.AdamW:
    """Build bias-corrected AdamW, fused, without decay on biases and norms.

    Args:
        groups: Parameters with their peak learning rates.
        weight_decay: Decoupled decay of matrices (Loshchilov and Hutter, 2019).

    Returns:
        The optimiser.
    """
    options = [
        {"params": [p for p in parameters if p.requires_grad and (p.ndim > 1) == decayed], "lr": rate,
         "weight_decay": weight_decay if decayed else 0.0}
        for parameters, rate in groups
        for decayed in (True, False)
    ]  # fmt: skip
    return torch.optim.AdamW([option for option in options if option["params"]], betas=(0.9, 0.98), fused=True)


def linear_schedule(
    optimizer: torch.optim.Optimizer, total_steps: int, warmup_share: float = 0.1, floor: float = 0.0
) -> torch.optim.lr_scheduler.LambdaLR:
    """Warm up linearly, then decay linearly.

    Args:
        optimizer: Its peak rates are scaled.
        total_steps: Steps until the floor.
        warmup_share: Share of the steps that warm up.
        floor: Share of the peak rate that remains at the end.

    Returns:
        The scheduler, to step after each update.
    """
    warmup = max(1, round(total_steps * warmup_share))

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return max(floor, (total_steps - step) / max(1, total_steps - warmup))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
