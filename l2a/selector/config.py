"""What a user can set about the selection of candidates."""

from dataclasses import dataclass

from l2a.errors import UsageError


@dataclass(frozen=True)
class SelectorConfig:
    """Options of one selection.

    Attributes:
        agent: Name of a card in ``agents/`` (an algorithm that learns a policy, a trained policy or a rule), or the
            folder of a saved policy.
        keep_rate: Share of the candidates that is kept, in (0, 1]; the same for every agent and rule.
        batch: Candidates that the policy decides on in one environment step.
        episode_steps: Environment steps in an episode.
        training_steps: Environment steps that a policy is trained for.
        snapshots: Moments of the training at which the policy is kept for the real reward to compare.
        real_evaluations: Selections that are scored with real distillation steps; 0 switches the second tier off.
        tier_correlation: Spearman correlation of surrogate and real reward below which the run does not trust its
            policies alone, warns and lets random ones compete.
        tensorboard: Folder for the course of a policy's training, for TensorBoard; None writes none.
    """

    agent: str = "pretrained"
    keep_rate: float = 0.5
    batch: int = 32
    episode_steps: int = 16
    training_steps: int = 20_000
    snapshots: int = 3
    real_evaluations: int = 8
    tier_correlation: float = 0.3
    tensorboard: str | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.keep_rate <= 1.0:
            raise UsageError(
                f"selector.keep_rate: {self.keep_rate} is outside (0, 1]; 0.5 keeps half of the candidates"
            )
        for name in ("batch", "episode_steps", "training_steps", "snapshots"):
            if getattr(self, name) < 1:
                raise UsageError(f"selector.{name}: {getattr(self, name)} is too small; it must be at least 1")
        if self.real_evaluations < 0:
            raise UsageError(f"selector.real_evaluations: {self.real_evaluations} is negative; 0 switches them off")
        if not -1.0 <= self.tier_correlation <= 1.0:
            raise UsageError(f"selector.tier_correlation: {self.tier_correlation} is outside [-1, 1]; try 0.3")
