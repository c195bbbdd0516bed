"""Settings of the generator."""

from dataclasses import dataclass, field
from typing import Literal

from l2a.cards import did_you_mean
from l2a.errors import UsageError

OPERATORS = ("source", "augpro_mix", "augpro_fgsm", "knn")
"""The operators of a lifted state, in the order of their integer codes."""
TEXT_OPERATORS = (*OPERATORS, "eda", "tinybert", "target_only")
"""The operators that make texts, each of which can run alone."""
EMBEDDING_OPERATORS = ("mixkd", "unprojected_fgsm")
"""Augmentation of the models' inputs, which no text can show: only while a student is distilled."""


@dataclass(frozen=True)
class OperatorWeights:
    """How often each operator is proposed; only the proportions count.

    Attributes:
        source: An unchanged text of the source domain.
        augpro_mix: Tokens of a text of the other domain, by token interpolation and projection.
        augpro_fgsm: Tokens that raise the student's disagreement with the teacher, by projection.
        knn: Random near neighbours of the tokens in the embedding matrix.
    """

    source: float = 1.0
    augpro_mix: float = 1.0
    augpro_fgsm: float = 1.0
    knn: float = 1.0

    def __post_init__(self) -> None:
        """Check that the weights make a distribution."""
        weights = self.as_tuple()
        if min(weights) < 0 or sum(weights) <= 0:
            raise UsageError(f"generator.operators: got {weights}; give weights of 0 or more, at least one above 0")

    def as_tuple(self) -> tuple[float, ...]:
        """Return the weights in the order of ``OPERATORS``."""
        return (self.source, self.augpro_mix, self.augpro_fgsm, self.knn)


@dataclass(frozen=True)
class GeneratorConfig:
    """Settings of the generator.

    Attributes:
        density: "ratio" for a domain classifier's log odds, "kde" for a kernel density of the target's embeddings.
        tau: Temperature of the target density; small seeks the target's modes, infinity gives the plain proposals.
        beta: Cost of each unit of degree beyond ``max_degree``.
        degree: Share of the tokens that an operator changes, or "auto" to choose it by the amount of labelled data.
        max_degree: Realised share of changed tokens up to which ``beta`` costs nothing.
        operators: How often each operator is proposed.
        mix_variant: "reference" takes the partner's token, "between" a third word near the segment that joins both.
        target_share: Probability that an operator starts from a target text rather than a source text.
        chains: Chains that run side by side; the number of texts in one call of the teacher.
        burn_in: First steps of each chain that give no candidates.
        neighbours: Nearest neighbours kept for each token.
        operator: What the row "augmented_kd_student" augments by: a name of ``TEXT_OPERATORS`` or
            ``EMBEDDING_OPERATORS``; None for the chain with all its operators. No other row reads it.
        copies: Augmented texts of that row in each round, as a multiple of ``kd.pool_size``. No other row reads it.
    """

    density: Literal["ratio", "kde"] = "ratio"
    tau: float = 1.0
    beta: float = 10.0
    degree: Literal["auto"] | float = 0.15
    max_degree: float = 0.5
    operators: OperatorWeights = field(default_factory=OperatorWeights)
    mix_variant: Literal["reference", "between"] = "reference"
    target_share: float = 0.5
    chains: int = 64
    burn_in: int = 5
    neighbours: int = 16
    operator: str | None = None
    copies: int = 1

    def __post_init__(self) -> None:
        """Check the numbers, naming the first that is wrong."""
        _require("tau", self.tau, self.tau > 0, "a number above 0 (inf for the plain proposals)")
        _require("beta", self.beta, self.beta >= 0, "0 or more")
        _require("degree", self.degree, self.degree == "auto" or 0 < self.degree <= 1, '"auto" or a share in (0, 1]')
        _require("max_degree", self.max_degree, 0 <= self.max_degree <= 1, "a share from 0 to 1")
        _require("target_share", self.target_share, 0 <= self.target_share <= 1, "a share from 0 to 1")
        for name, least in (("chains", 1), ("burn_in", 0), ("neighbours", 1), ("copies", 1)):
            _require(name, getattr(self, name), getattr(self, name) >= least, f"{least} or more")
        known = (*TEXT_OPERATORS, *EMBEDDING_OPERATORS)
        if self.operator is not None:
            hint = did_you_mean(self.operator, known)
            _require("operator", self.operator, self.operator in known, f"one of {', '.join(known)}{hint}")


def _require(name: str, value: object, is_valid: bool, allowed: str) -> None:
    if not is_valid:
        raise UsageError(f"generator.{name}: got {value!r}; give {allowed}")


def resolve_degree(degree: Literal["auto"] | float, labelled_inputs: int) -> float:
    """Choose the share of tokens to change.

    Args:
        degree: A share, or "auto" for the shares that arXiv 2305.12565 found best for distillation: half of the
            tokens below 10,000 inputs, 30 % up to 100,000, 10 % above (stated by the paper).
        labelled_inputs: Labelled texts in use, source and target together.

    Returns:
        The share of tokens to change, in (0, 1].
    """
    if degree != "auto":
        return degree
    if labelled_inputs < 10_000:
        return 0.5
    return 0.3 if labelled_inputs <= 100_000 else 0.1
