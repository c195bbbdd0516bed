"""The size of a general student."""

from dataclasses import dataclass

from l2a.errors import UsageError


@dataclass(frozen=True)
class StudentShape:
    """Size of the student; the ELECTRA architecture has factorised embeddings natively.

    Attributes:
        embedding_size: Width of the word embeddings.
        hidden_size: Width of the layers.
        layers: Number of layers.
        intermediate_size: Width of the feed-forward blocks.
        heads: Attention heads in a layer.
        positions: Longest input in tokens.
    """

    embedding_size: int = 80
    hidden_size: int = 128
    layers: int = 2
    intermediate_size: int = 512
    heads: int = 4
    positions: int = 256

    def __post_init__(self) -> None:
        """Check the sizes once."""
        for name, value in vars(self).items():
            if value < 1:
                raise UsageError(f"student {name}: {value} came; a number of at least 1 is needed")
        if self.hidden_size % self.heads:
            raise UsageError(
                f"student heads: {self.heads} heads do not divide hidden_size {self.hidden_size}; choose a divisor"
            )
