"""What every text operator takes and gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from l2a.examples import TextInput


@dataclass(frozen=True)
class Rewrite:
    """A text that an operator made.

    Attributes:
        text: The new text; equal to the base where nothing could change.
        changed_share: Share of the base's tokens (token operators) or words (word operators) that it changed.
    """

    text: TextInput
    changed_share: float


class TextOperator(Protocol):
    """Makes one new text of each base, for a whole batch at once."""

    def __call__(
        self, bases: Sequence[TextInput], partners: Sequence[TextInput], degree: float, rng: np.random.Generator
    ) -> list[Rewrite]:
        """Change a batch of texts.

        Args:
            bases: B texts.
            partners: B texts, one of the other domain for each base; read by operators that mix.
            degree: Share of the tokens to change, in (0, 1].
            rng: Source of all randomness.

        Returns:
            B new texts, in order.
        """


def copy_partners(
    bases: Sequence[TextInput], partners: Sequence[TextInput], degree: float, rng: np.random.Generator
) -> list[Rewrite]:
    """The operator "source": the partner as it is; see ``TextOperator``."""
    return [Rewrite(partner, 0.0) for partner in partners]


def copy_bases(
    bases: Sequence[TextInput], partners: Sequence[TextInput], degree: float, rng: np.random.Generator
) -> list[Rewrite]:
    """The operator "target_only": the base as it is; see ``TextOperator``."""
    return [Rewrite(base, 0.0) for base in bases]
