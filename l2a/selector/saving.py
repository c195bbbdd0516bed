"""Policies on disk: weights as safetensors, the rest as JSON; nothing is unpickled when one is read."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from l2a.selector.agents import DESCRIPTION, WEIGHTS
from l2a.selector.environment import CHANGING_FEATURES, STATE_FEATURES
from l2a.selector.network import ACTIVATIONS, CandidateNetwork, TrainedPolicy
from l2a.util.errors import RunError
from l2a.util.files import atomic_folder, to_json
from l2a.util.training import seeded

FORMAT = 1


def save_policy(policy: TrainedPolicy, folder: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Write a policy.

    Args:
        policy: The policy.
        folder: Made or replaced in one step.
        facts: How it was trained, such as pairs and reward curve; values that JSON can hold.
    """
    description = {
        "format": FORMAT,
        "agent": policy.agent,
        "feature_names": list(policy.feature_names),
        "changing_features": list(CHANGING_FEATURES),
        "state_features": list(STATE_FEATURES),
        "hidden": list(policy.network.hidden),
        "activation": policy.network.activation,
        "facts": dict(facts or {}),
    }
    with atomic_folder(folder) as temporary:
        (temporary / WEIGHTS).write_bytes(
            save({name: value.contiguous() for name, value in policy.network.state_dict().items()})
        )
        (temporary / DESCRIPTION).write_text(to_json(description, indent=2) + "\n", "utf-8")


def load_policy(folder: Path) -> TrainedPolicy:
    """Read a policy.

    Args:
        folder: What ``save_policy`` wrote.

    Returns:
        The policy, ready to score.

    Raises:
        RunError: If a file is missing, damaged or from another version.
    """
    with _damage_as_run_error(folder):
        description = json.loads((folder / DESCRIPTION).read_text("utf-8"))
        names, network = _rebuild(description)
        network.load_state_dict(load((folder / WEIGHTS).read_bytes()))
        return TrainedPolicy(network.eval().requires_grad_(False), names, str(description["agent"]))


def load_facts(folder: Path) -> dict[str, Any]:
    """Read how a saved policy was trained.

    Args:
        folder: What ``save_policy`` wrote.

    Returns:
        The facts; empty if none were saved.

    Raises:
        RunError: If the description is missing or damaged.
    """
    with _damage_as_run_error(folder):
        return dict(json.loads((folder / DESCRIPTION).read_text("utf-8")).get("facts", {}))


@contextlib.contextmanager
def _damage_as_run_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"policy {folder}: not a readable policy ({reason}); train it again") from error


def _rebuild(description: dict[str, Any]) -> tuple[tuple[str, ...], CandidateNetwork]:
    expected = {"format": FORMAT, "changing_features": [*CHANGING_FEATURES], "state_features": [*STATE_FEATURES]}
    for field, value in expected.items():
        if description[field] != value:
            raise ValueError(f"{field} is {description[field]}, {value} is read")
    names = tuple(description["feature_names"])
    hidden, activation = tuple(description["hidden"]), description.get("activation", "tanh")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation}, one of {', '.join(ACTIVATIONS)} is read")
    width = len(names) + len(CHANGING_FEATURES)
    with seeded(0):  # the first weights are drawn, then replaced
        return names, CandidateNetwork(width, len(STATE_FEATURES), hidden, activation=activation)
