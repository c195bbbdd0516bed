"""How a policy was trained, for the folder that it is saved in."""

from collections.abc import Sequence
from typing import Any

from l2a.config import DistillConfig
from l2a.report.metrics_file import versions


def pair_name(config: DistillConfig) -> str:
    """Name a pair as it stands in a saved policy, "source:target"."""
    return f"{config.source}:{config.target}"


def training_facts(
    configs: Sequence[DistillConfig], steps: int, steps_per_second: float, reward_curve: Sequence[float]
) -> dict[str, Any]:
    """Say how a policy was trained, for its folder.

    Args:
        configs: One a pair and seed.
        steps: Environment steps.
        steps_per_second: Of the training.
        reward_curve: Of the training, in nats.

    Returns:
        Values that JSON can hold.
    """
    return {
        "pairs": list(dict.fromkeys(pair_name(config) for config in configs)),
        "seeds": sorted({config.seed for config in configs}),
        "shots": configs[0].shots,
        "dev_shots": configs[0].dev_shots,
        "keep_rate": configs[0].selector.keep_rate,
        "steps": steps,
        "steps_per_second": round(steps_per_second, 1),
        "reward_curve": list(reward_curve),
        "versions": versions(),
    }
