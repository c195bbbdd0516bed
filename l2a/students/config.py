"""Which student is built and how large it may be."""

from dataclasses import dataclass
from typing import Literal

from l2a.errors import UsageError


@dataclass(frozen=True)
class StudentConfig:
    """The student.

    Attributes:
        preset: "narrow" is a fresh narrow BERT whose embeddings are read from the teacher; "auto" takes the preset
            that is known to do best, at present this one.
        model: A folder or Hub id to start from instead of a preset.
        max_share: Largest allowed share of the teacher's parameters.
    """

    preset: Literal["auto", "narrow"] = "auto"
    model: str | None = None
    max_share: float = 0.133

    def __post_init__(self) -> None:
        """Check the share once."""
        if not 0 < self.max_share <= 1:
            raise UsageError(f"student.max_share: {self.max_share} came; a share above 0 and at most 1 is needed")
