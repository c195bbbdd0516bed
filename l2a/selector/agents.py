"""Agent cards: which algorithm learns the policy, or which rule stands in for it."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from l2a.cards import build, find_card, load_yaml
from l2a.errors import UsageError


@dataclass(frozen=True)
class AgentCard:
    """How candidates are chosen.

    Attributes:
        description: One sentence for people.
        algorithm: "rule: NAME" for a rule of ``l2a.selector.rules``, else a Stable-Baselines3 on-policy class by its
            import path, such as "stable_baselines3.PPO".
        environments: Environments that run side by side during training.
        hidden: Widths of the shared network's hidden layers.
        hyperparameters: Keyword arguments of the class.
    """

    description: str
    algorithm: str
    environments: int = 16
    hidden: tuple[int, ...] = (32, 32)
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rule(self) -> str | None:
        """Name of the rule, or None when a policy is learned."""
        kind, _, name = self.algorithm.partition(":")
        return name.strip() if kind == "rule" else None


def load_agent(name: str) -> AgentCard:
    """Read an agent's card.

    Args:
        name: The card's name in ``agents/``.

    Returns:
        The card.

    Raises:
        UsageError: If there is no such card, or it is wrong; every wrong key is named.
    """
    path = find_card("agents", name)
    return build(AgentCard, load_yaml(path), f"agent card {path}")


def algorithm_class(card: AgentCard) -> Any:
    """Import the class that learns the policy.

    Args:
        card: A card whose ``rule`` is None.

    Returns:
        A subclass of Stable-Baselines3's OnPolicyAlgorithm.

    Raises:
        UsageError: If there is no such class or it cannot take MultiBinary actions.
    """
    from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

    module, _, name = card.algorithm.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"algorithm: {card.algorithm!r} cannot be imported; write stable_baselines3.PPO, stable_baselines3.A2C, "
            "the import path of another on-policy class, or 'rule: NAME'"
        ) from error
    if not (isinstance(found, type) and issubclass(found, OnPolicyAlgorithm)):
        raise UsageError(
            f"algorithm: {card.algorithm} does not learn from MultiBinary actions with an actor and a critic; "
            "use a subclass of stable_baselines3's OnPolicyAlgorithm, such as PPO or A2C"
        )
    return found
