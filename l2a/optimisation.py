"""The optimiser and the learning-rate schedule that teachers and students share."""

from collections.abc import Sequence

import torch
from torch import nn

STEPS_AHEAD = 2.5
"""Middle of the few steps that ``update_slopes`` speaks of."""


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


def carry_second_moments(source: torch.optim.Optimizer, target: torch.optim.Optimizer) -> None:
    """Give an AdamW another's second moments and number of steps, but no momentum.

    Args:
        source: Has taken some steps; without any, nothing is carried.
        target: Of parameters of the same shapes in the same order.
    """
    groups = zip(source.param_groups, target.param_groups, strict=True)
    pairs = [pair for old, new in groups for pair in zip(old["params"], new["params"], strict=True)]
    for old, new in pairs:
        if state := source.state.get(old):
            carried = {name: value.clone() for name, value in state.items()}
            target.state[new] = carried | {"exp_avg": torch.zeros_like(state["exp_avg"])}


def update_slopes(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, torch.Tensor]:
    """Differentiate the next few updates of an AdamW by the gradient, weight by weight.

    With a gradient g that stays the same, an update is g / sqrt((1 - c) v + c g^2), v the second moment so far and c
    the weight that some steps give to g^2; its derivative is (1 - c) v / ((1 - c) v + c g^2)^(3/2). A weight that was
    never used, v = 0, only follows the sign of its gradient: the derivative is 0.

    Args:
        optimizer: Under a schedule; its parameters hold g as their gradients. Where it has taken no step yet, v is g^2.

    Returns:
        By parameter, tensors of its shape, at least 0: the peak rate of its group times the derivative.
    """
    slopes = {}
    for group in optimizer.param_groups:
        beta, eps = group["betas"][1], group["eps"]
        share = 1 - beta**STEPS_AHEAD
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            squared, state = parameter.grad.square(), optimizer.state.get(parameter)
            moment = state["exp_avg_sq"] / (1 - beta ** float(state["step"])) if state else squared
            root = ((1 - share) * moment + share * squared).sqrt() + eps
            slopes[parameter] = group["initial_lr"] * (1 - share) * moment / root**3
    return slopes
