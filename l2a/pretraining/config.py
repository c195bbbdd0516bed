"""What decides a general student."""

from dataclasses import dataclass, field
from pathlib import Path

from l2a.encoding import bucket_of
from l2a.errors import UsageError
from l2a.pretraining.shape import StudentShape


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of the general stage.

    Attributes:
        output_dir: Folder of the finished student; a checkpoint stands in it until then.
        text: Text files (one text a line) and domains, whose train splits are read without labels.
        protect: Domains whose texts the student must never see, whatever their split.
        teacher: "minilm-l6", a folder, or a Hub id: a pretrained encoder.
        steps: Optimizer steps.
        seed: Of the student's first weights, the variants and the order of the batches.
        max_length: Longest input in tokens.
        variants: Variants of the texts (spans, pairs, mixes, noise) that are labelled as well.
        tokens_per_batch: Padded tokens in a step, at most.
        learning_rate: Peak rate; 5 % of the steps warm up, then it falls linearly to zero.
        checkpoint_every: Steps between checkpoints.
        student: Size of the student.
    """

    output_dir: Path
    text: tuple[str, ...]
    protect: tuple[str, ...] = ()
    teacher: str = "minilm-l6"
    steps: int = 4000
    seed: int = 0
    max_length: int = 128
    variants: int = 200_000
    tokens_per_batch: int = 4096
    learning_rate: float = 8e-4
    checkpoint_every: int = 500
    student: StudentShape = field(default_factory=StudentShape)

    def __post_init__(self) -> None:
        """Check the settings once."""
        for name in ("steps", "tokens_per_batch", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: {getattr(self, name)} came; a number of at least 1 is needed")
        if self.variants < 0 or self.learning_rate <= 0:
            raise UsageError("variants must be at least 0 and learning_rate above 0")
        if self.max_length < 8 or bucket_of(self.max_length) > self.student.positions:
            padded, most = bucket_of(self.max_length), self.student.positions
            raise UsageError(
                f"max_length: {self.max_length} came, padded to {padded}; at least 8 and, once padded, at most the "
                f"student's positions ({most}) are allowed"
            )
        if not self.text:
            raise UsageError("text: nothing to read; give --text with a .txt file or a domain, once or more")
