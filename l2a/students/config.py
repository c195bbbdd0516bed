"""Which student is built and how large it may be."""

from dataclasses import dataclass
from typing import Literal

from l2a.errors import UsageError

Preset = Literal["auto", "narrow", "scratch", "pruned", "pruned_narrow", "factorised", "mean_pooled"]


@dataclass(frozen=True)
class StudentConfig:
    """The student.

    Attributes:
        preset: What is built. "narrow": a fresh narrow BERT over word vectors read from the teacher. "scratch": the
            same with random weights, a control. "pruned": the teacher's first layers over the tokens that the domains
            use. "pruned_narrow": a fresh BERT over those tokens, wider and deeper than "narrow". "factorised": an
            ELECTRA whose word vectors are narrower than its layers. "mean_pooled": a ModernBERT that classifies the
            mean of its states. "auto": the preset that is known to do best, at present "narrow".
        model: A folder or Hub id to start from instead of a preset.
        max_share: Largest allowed share of the teacher's parameters.
    """

    preset: Preset = "auto"
    model: str | None = None
    max_share: float = 0.133

    def __post_init__(self) -> None:
        """Check the share once."""
        if not 0 < self.max_share <= 1:
            raise UsageError(f"student.max_share: {self.max_share} came; a share above 0 and at most 1 is needed")
