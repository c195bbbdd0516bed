"""Settings of the generator."""

from dataclasses import dataclass, field

from l2a.errors import UsageError

OPERATORS = ("source", "augpro_mix", "augpro_fgsm", "knn")
"""The operators of a lifted state, in the order of their integer codes."""


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
    """

    tau: float = 1.0
    beta: float = 10.0
    degree: str | float = "auto"
    max_degree: float = 0.5
    operators: OperatorWeights = field(default_factory=OperatorWeights)
    mix_variant: str = "reference"
    target_share: float = 0.5
    chains: int = 64
    burn_in: int = 5
    neighbours: int = 16

    def __post_init__(self) -> None:
        """Check every field, naming the first that is wrong."""
        _require("tau", self.tau, self.tau > 0, "a number above 0 (inf for the plain proposals)")
        _require("beta", self.beta, self.beta >= 0, "0 or more")
        named = self.degree == "auto" if isinstance(self.degree, str) else 0 < self.degree <= 1
        _require("degree", self.degree, named, '"auto" or a share above 0 and up to 1')
        _require("max_degree", self.max_degree, 0 <= self.max_degree <= 1, "a share from 0 to 1")
        _require("mix_variant", self.mix_variant, self.mix_variant in ("reference", "between"), "reference or between")
        _require("target_share", self.target_share, 0 <= self.target_share <= 1, "a share from 0 to 1")
        _require("chains", self.chains, self.chains >= 1, "1 or more")
        _require("burn_in", self.burn_in, self.burn_in >= 0, "0 or more")
        _require("neighbours", self.neighbours, self.neighbours >= 1, "1 or more")


def _require(name: str, value: object, is_valid: bool, allowed: str) -> None:
    if not is_valid:
        raise UsageError(f"generator.{name}: got {value!r}; give {allowed}")


def resolve_degree(degree: str | float, labelled_inputs: int) -> float:
    """Choose the share of tokens to change.

    Args:
        degree: A share, or "auto" for the shares that arXiv 2305.12565 found best for distillation: half of the
            tokens below 10,000 inputs, 30 % up to 100,000, 10 % above (stated by the paper).
        labelled_inputs: Labelled texts in use, source and target together.

    Returns:
        The share of tokens to change, in (0, 1].
    """
    if not isinstance(degree, str):
        return degree
    if labelled_inputs < 10_000:
        return 0.5
    return 0.3 if labelled_inputs <= 100_000 else 0.1
