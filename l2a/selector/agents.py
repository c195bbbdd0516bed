"""Agent cards: which algorithm learns the policy, which trained policy is used, or which rule stands in for it."""

import contextlib
import json
import pkgutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from l2a.config import Count
from l2a.util import Checked, UsageError, build, find_card, fingerprint, list_cards, load_yaml, sha256_file

DESCRIPTION = "policy.json"  # the file by which the folder of a saved policy is known
WEIGHTS = "policy.safetensors"

# Where a card that is found by its name may take its algorithm from: a folder ``agents`` that happens to lie in the
# working directory shall not run code of its own. A card that is given by its path may name any module.
PACKAGES = ("stable_baselines3", "sb3_contrib", "l2a")
BANDIT = "l2a.selector.arms.thompson"  # the one algorithm that is no class of Stable-Baselines3


@dataclass(frozen=True)
class AgentCard(Checked):
    """How candidates are chosen.

    Attributes:
        description: One sentence for people.
        algorithm: "rule: NAME" for a rule of ``l2a.selector.problem``, else a Stable-Baselines3 on-policy class by its
            import path, such as "stable_baselines3.PPO".
        policy: Folder of a trained policy, beside the card; it is used as it is, and nothing is trained.
        environments: Environments that run side by side during training.
        hidden: Widths of the shared network's hidden layers.
        activation: Of those layers.
        hyperparameters: Keyword arguments of the class.
        scale_rewards: Divide rewards by their running spread; off for an algorithm that needs them in nats.
        acts_on: What it chooses: each candidate, or the shares of arms (``l2a.selector.arms``), for which it is trained
            in the run, with rewards in nats and tanh.
    """

    description: str
    algorithm: str
    policy: str | None = None
    environments: Count = 16
    hidden: tuple[Count, ...] = (32, 32)
    activation: Literal["tanh", "relu"] = "tanh"
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    scale_rewards: bool = True
    acts_on: Literal["candidates", "arms"] = "candidates"

    def __post_init__(self) -> None:
        """Check the fields, and whether they go together."""
        super().__post_init__()
        object.__setattr__(self, "hyperparameters", {k: _as_number(v) for k, v in self.hyperparameters.items()})
        if not self.hidden:
            raise UsageError("hidden is []; give one width or more, each at least 1")
        of_arms = self.algorithm == BANDIT or self.algorithm.startswith("stable_baselines3.")
        of_arms = of_arms and self.policy is None
        if (self.acts_on == "arms" and not of_arms) or (self.algorithm == BANDIT and self.acts_on != "arms"):
            given = f"acts_on is {self.acts_on!r} with the algorithm {self.algorithm!r}"
            allowed = f"'arms' goes with {BANDIT} or a class of stable_baselines3, without policy"
            raise UsageError(f"{given}; {allowed}")

    @property
    def rule(self) -> str | None:
        """Name of the rule, or None when a policy is learned."""
        kind, _, name = self.algorithm.partition(":")
        return name.strip() if kind == "rule" else None

    @property
    def learns(self) -> bool:
        """Whether a policy is trained that other pools can use."""
        return self.rule is None and self.policy is None and self.acts_on == "candidates"


def _as_number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value  # YAML reads 3e-4 as text
    except ValueError:
        return value


def load_agent(name: str) -> AgentCard:
    """Read an agent's card, or make one for the folder of a saved policy.

    Args:
        name: A card's name in ``agents/``, the path of a card (``.yaml``), or the folder of a saved policy.

    Returns:
        The card; a policy's folder in it is a path that can be opened.

    Raises:
        UsageError: If there is neither card nor policy, or the card is wrong; every wrong key is named.
    """
    is_file, path = name.endswith((".yaml", ".yml")), Path(name).expanduser()
    if not is_file and name not in list_cards("agents") and (path.is_dir() or "/" in name or "\\" in name):
        return _with_policy(AgentCard("A saved policy.", "saved policy"), path)
    path = path if is_file else find_card("agents", name)
    card = build(AgentCard, load_yaml(path), f"agent card {path}")
    if card.rule is not None:
        from l2a.selector.problem import RULES

        if card.rule not in RULES:
            raise UsageError(f"agent card {path}: there is no rule {card.rule!r}; give one of {', '.join(RULES)}")
    elif not is_file and card.algorithm.split(".")[0] not in PACKAGES:
        given = f"agent card {path}: algorithm is {card.algorithm!r}, outside {', '.join(PACKAGES)}"
        raise UsageError(f"{given}; if you trust that module, give the card by its path, such as --selector {path}")
    return card if card.policy is None else _with_policy(card, path.parent / card.policy)


def _with_policy(card: AgentCard, folder: Path) -> AgentCard:
    if not (folder / DESCRIPTION).is_file():
        fix = "give the folder that 'l2a selector train' wrote, or a card in agents/"
        raise UsageError(f"selector.agent: {folder} holds no {DESCRIPTION}; {fix}: {', '.join(list_cards('agents'))}")
    return replace(card, policy=str(folder))


def check_agent(name: str) -> None:
    """Refuse an agent before anything is trained: a damaged policy should not cost the hours before it is asked.

    Raises:
        UsageError: If there is none, or its algorithm cannot be imported or is of no use.
        RunError: If its policy is damaged.
    """
    card = load_agent(name)
    if card.policy is not None:
        from l2a.selector.algorithms import load_policy  # here, as it imports torch, which rules can do without

        load_policy(card.policy)
    elif card.rule is None and card.algorithm != BANDIT:
        algorithm_class(card)


def agent_parts(name: str) -> dict[str, Any]:
    """Collect what decides an agent's choices, so that a result can tell when it was changed.

    Args:
        name: As ``load_agent`` takes it.

    Returns:
        The card's fields that differ from their defaults, without its description, and a hash of each of its policy's
        files; a missing agent has none.
    """
    try:
        card = load_agent(name)
    except UsageError:  # whoever runs the agent says what is wrong; whoever reports old results can go on
        return {}
    defaults = {**asdict(AgentCard("", "")), "description": card.description, "policy": card.policy}
    parts = {key: value for key, value in asdict(card).items() if value != defaults[key]}
    if card.policy is not None:
        with contextlib.suppress(OSError, ValueError, TypeError):  # as above
            description = dict(json.loads(Path(card.policy, DESCRIPTION).read_text("utf-8")))
            description.pop("facts", None)  # how it was trained changes no choice
            parts |= {DESCRIPTION: fingerprint(description), WEIGHTS: sha256_file(Path(card.policy, WEIGHTS))}
    return parts


def algorithm_class(card: AgentCard) -> Any:
    """Import the class that learns a card's policy, a subclass of Stable-Baselines3's OnPolicyAlgorithm.

    Raises:
        UsageError: If there is no such class or it cannot take MultiBinary actions.
    """
    from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

    try:
        found = pkgutil.resolve_name(card.algorithm)
    except (ImportError, AttributeError, ValueError) as error:
        known = "stable_baselines3.PPO, stable_baselines3.A2C, the import path of another on-policy class"
        raise UsageError(f"algorithm: {card.algorithm!r} cannot be imported; write {known}, or 'rule: NAME'") from error
    if not (isinstance(found, type) and issubclass(found, OnPolicyAlgorithm)):
        lack = f"{card.algorithm} does not learn from MultiBinary actions with an actor and a critic"
        fix = "use a subclass of stable_baselines3's OnPolicyAlgorithm, such as PPO or A2C"
        raise UsageError(f"algorithm: {lack}; {fix}")
    return found
