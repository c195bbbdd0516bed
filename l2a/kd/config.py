"""How the student is distilled."""

from dataclasses import dataclass

from l2a.errors import UsageError


@dataclass(frozen=True)
class KDConfig:
    """Loss, optimiser and budget of knowledge distillation.

    Attributes:
        temperature: T of the soft labels.
        alpha: Weight of the soft-label term on examples with a real label; the rest goes to cross-entropy.
        hidden_weight: Weight of the hidden-state term (pooled student state against the teacher's embedding).
        learning_rate: Peak rate of the student.
        batch_size: Texts in a step.
        warmup_steps: Steps on target and source before the first round.
        rounds: How often a pool is drawn and selected from.
        round_steps: Steps in each round.
        pool_size: Candidates drawn in each round.
        target_share: Share of the texts of a few batches that is target text.
        augmented_share: Share that is kept candidates; the rest is source text.
        evaluate_every: Steps between looks at the model-choice split.
    """

    temperature: float = 2.0
    alpha: float = 0.9
    hidden_weight: float = 0.1
    learning_rate: float = 3e-4
    batch_size: int = 32
    warmup_steps: int = 200
    rounds: int = 2
    round_steps: int = 200
    pool_size: int = 1600
    target_share: float = 0.25
    augmented_share: float = 0.5
    evaluate_every: int = 20

    def __post_init__(self) -> None:
        """Check the numbers once."""
        if self.temperature <= 0 or self.learning_rate <= 0:
            raise UsageError("kd.temperature and kd.learning_rate must be above 0")
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"kd.alpha: {self.alpha} came; a weight from 0 to 1 is needed")
        if self.target_share < 0 or self.augmented_share < 0 or self.target_share + self.augmented_share > 1:
            raise UsageError("kd.target_share and kd.augmented_share must be 0 or more and sum to at most 1")
        for name in ("batch_size", "rounds", "round_steps", "pool_size", "evaluate_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"kd.{name}: {getattr(self, name)} came; at least 1 is needed")

    @property
    def total_steps(self) -> int:
        """Student updates in a whole run, the same for every method."""
        return self.warmup_steps + self.rounds * self.round_steps
