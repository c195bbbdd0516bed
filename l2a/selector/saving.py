"""Policies on disk: weights as safetensors, the rest as JSON; nothing is unpickled when one is read."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from l2a.errors import RunError
from l2a.files import atomic_folder
from l2a.selector.episodes import CHANGING_FEATURES, STATE_FEATURES
from l2a.selector.network import CandidateNetwork
from l2a.selector.policy import TrainedPolicy

WEIGHTS, DESCRIPTION = "policy.safetensors", "policy.json"
FORMAT = 1


def save_policy(policy: TrainedPolicy, folder: Path) -> None:
    """Write a policy.

    Args:
        policy: The policy.
        folder: Made or replaced in one step.
    """
    description = {
        "format": FORMAT,
        "agent": policy.agent,
        "feature_names": list(policy.feature_names),
        "changing_features": list(CHANGING_FEATURES),
        "state_features": list(STATE_FEATURES),
        "hidden": list(policy.network.hidden),
    }
    with atomic_folder(folder) as temporary:
        (temporary / WEIGHTS).write_bytes(
            save({name: value.contiguous() for name, value in policy.network.state_dict().items()})
        )
        (temporary / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", "utf-8")


def load_policy(folder: Path) -> TrainedPolicy:
    """Read a policy.

    Args:
        folder: What ``save_policy`` wrote.

    Returns:
        The policy, ready to score.

    Raises:
        RunError: If a file is missing, damaged or from another version.
    """
    try:
        description = json.loads((folder / DESCRIPTION).read_text("utf-8"))
        names, network = _rebuild(description)
        network.load_state_dict(load((folder / WEIGHTS).read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"policy {folder}: not a readable policy ({reason}); train it again") from error
    return TrainedPolicy(network.eval().requires_grad_(False), names, description["agent"])


def _rebuild(description: dict[str, Any]) -> tuple[tuple[str, ...], CandidateNetwork]:
    expected = {"format": FORMAT, "changing_features": [*CHANGING_FEATURES], "state_features": [*STATE_FEATURES]}
    for field, value in expected.items():
        if description[field] != value:
            raise ValueError(f"{field} is {description[field]}, {value} is read")
    names = tuple(description["feature_names"])
    hidden = tuple(description["hidden"])
    return names, CandidateNetwork(len(names) + len(CHANGING_FEATURES), len(STATE_FEATURES), hidden)
