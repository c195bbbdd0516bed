"""How the student is distilled."""

from dataclasses import dataclass
from typing import Literal

from l2a.errors import UsageError

COUNTS = (
    "batch_size",
    "gradient_accumulation",
    "subclasses",
    "rounds",
    "round_steps",
    "pool_size",
    "unlabelled_size",
    "evaluate_every",
)


@dataclass(frozen=True)
class KDConfig:
    """Loss, optimiser and budget of knowledge distillation.

    Attributes:
        temperature: T of the soft labels.
        alpha: Weight of the soft-label term on examples with a real label; the rest goes to cross-entropy. Subclasses
            are learned from the teacher alone.
        hidden_weight: Weight of the hidden-state term (pooled student state against the teacher's embedding).
        attention_weight: Weight of the attention term (the last layers' maps); above 0 the teacher reads every batch.
        folds: Label each source text by a teacher that was not trained on it, one of so many; None labels all with the
            main teacher.
        objective: What the student learns from: the teacher's soft labels, LELP's pseudo-subclasses or one of the
            controls of LELP.
        subclasses: Pseudo-subclasses of each class, S.
        subclass_temperature: beta, the softness inside a class.
        learning_rate: Peak rate of the student.
        embedding_rate: Rate of the word embeddings as a share of it. Only rows whose tokens occur are ever changed; at
            0 none is, so that words which no text shows keep their place among those that do.
        average: Decay of the running average of the weights that is judged and kept; 0 for none.
        batch_size: Texts in a step, over all processes.
        gradient_accumulation: Parts that a batch is computed in; the loss is that of the whole batch.
        warmup_steps: Steps on target and source before the first round.
        rounds: How often a pool is drawn and selected from.
        round_steps: Steps in each round.
        pool_size: Candidates drawn in each round.
        target_share: Share of the texts of a few batches that is target text.
        augmented_share: Share that is kept candidates.
        unlabelled_share: Share that is unlabelled text, where a run has some; the rest is source text.
        unlabelled_size: Unlabelled texts used at most; of more, as many are drawn by the seed.
        evaluate_every: Steps between looks at the model-choice split.
        patience: Looks without a better score after which a stage of training, the warm-up too, ends early; None never
            does. With it the number of updates, and the student that a selector sees, depend on the choice split.
        compile: Compile the student with torch.compile; pays on a GPU with thousands of steps.
    """

    temperature: float = 2.0
    alpha: float = 0.9
    hidden_weight: float = 0.1
    attention_weight: float = 0.0
    folds: int | None = None
    objective: Literal["soft_labels", "lelp", "lelp_random_directions", "lelp_random_partitions"] = "soft_labels"
    subclasses: int = 4
    subclass_temperature: float = 1.0
    learning_rate: float = 8e-4
    embedding_rate: float = 1.0
    average: float = 0.98
    batch_size: int = 32
    gradient_accumulation: int = 1
    warmup_steps: int = 200
    rounds: int = 2
    round_steps: int = 200
    pool_size: int = 1600
    target_share: float = 0.25
    augmented_share: float = 0.25
    unlabelled_share: float = 0.4
    unlabelled_size: int = 20_000
    evaluate_every: int = 20
    patience: int | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        """Check the numbers once."""
        for name in ("temperature", "learning_rate", "subclass_temperature"):
            if getattr(self, name) <= 0:
                raise UsageError(f"kd.{name}: {getattr(self, name)} came; a number above 0 is needed")
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"kd.alpha: {self.alpha} came; a weight from 0 to 1 is needed")
        if self.attention_weight < 0:
            raise UsageError(f"kd.attention_weight: {self.attention_weight} came; 0 (none) or more is needed")
        if self.embedding_rate < 0 or not 0 <= self.average < 1:
            raise UsageError("kd.embedding_rate must be 0 or more, kd.average 0 or more and below 1")
        shares = (self.target_share, self.augmented_share, self.unlabelled_share)
        if min(shares) < 0 or sum(shares) > 1:
            names = "kd.target_share, kd.augmented_share and kd.unlabelled_share"
            raise UsageError(f"{names}: {shares} came; each must be 0 or more and their sum at most 1")
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise UsageError(f"kd.{name}: {getattr(self, name)} came; at least 1 is needed")
        if self.folds is not None and self.folds < 2:
            raise UsageError(f"kd.folds: {self.folds} came; at least 2 teachers, or null for the main one, are needed")
        if self.patience is not None and self.patience < 1:
            raise UsageError(f"kd.patience: {self.patience} came; at least 1 look, or null for none, is needed")

    @property
    def total_steps(self) -> int:
        """Student updates in a whole run, the same for every method."""
        return self.warmup_steps + self.rounds * self.round_steps
