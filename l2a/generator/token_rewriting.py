"""The token operators as operators on texts: tokenize, change tokens, write them back into the text."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from l2a.errors import UsageError
from l2a.examples import TextInput
from l2a.generator import operators
from l2a.generator.corpus import FROZEN
from l2a.generator.flat_texts import FlatTexts, Ints, TokenChanges, flatten_texts
from l2a.generator.neighbours import NeighbourTable
from l2a.generator.problem import Gradient, vocabulary
from l2a.generator.rewrite import Rewrite
from l2a.generator.tokens import splice


@dataclass(frozen=True)
class TokenSpace:
    """What the token operators read.

    Attributes:
        tokenizer: A fast WordPiece tokenizer.
        neighbours: Which tokens may change, and their neighbours; augpro_mix reads no neighbours.
        word_embeddings: float32 (V, d), on the CPU, in the tokenizer's order.
        gradient: For augpro_fgsm, with respect to ``word_embeddings``; None leaves that operator out.
        max_length: Tokens read of a text; what lies beyond them stays.
    """

    tokenizer: Any
    neighbours: NeighbourTable
    word_embeddings: Tensor
    gradient: Gradient | None
    max_length: int


class TokenRewriting:
    """augpro_mix, augpro_fgsm or knn on texts."""

    def __init__(self, name: str, space: TokenSpace) -> None:
        """Choose the operator.

        Args:
            name: "augpro_mix", "augpro_fgsm" or "knn".
            space: Tokens, neighbours and gradients.

        Raises:
            UsageError: If augpro_fgsm came without gradients.
        """
        if name == "augpro_fgsm" and space.gradient is None:
            raise UsageError(
                "operator 'augpro_fgsm': it needs the gradient of a teacher and a student; name both, or use knn"
            )
        self._name, self._space = name, space

    @cached_property
    def surfaces(self) -> tuple[str, ...]:
        """What each token writes into a text, by id."""
        return tuple(token.removeprefix("##") for token in vocabulary(self._space.tokenizer))

    def tokenize(self, inputs: Sequence[TextInput]) -> FlatTexts:
        """Tokenize texts, so that many batches can be drawn from them.

        Args:
            inputs: One or more texts; what comes twice is kept once.

        Returns:
            The texts.
        """
        return flatten_texts(inputs, self._space.tokenizer, self._space.max_length, self._space.neighbours)

    def __call__(
        self, bases: Sequence[TextInput], partners: Sequence[TextInput], degree: float, rng: np.random.Generator
    ) -> list[Rewrite]:
        """Change each base; see ``TextOperator``."""
        if not bases:
            return []
        texts = self.tokenize([*bases, *partners] if self._name == "augpro_mix" else bases)
        others = texts.numbers(partners if self._name == "augpro_mix" else ())
        changes = self.changes(texts, texts.numbers(bases), others, degree, rng)
        written = _write(bases, changes, self.surfaces)
        return [Rewrite(text, share) for text, share in zip(written, changes.shares.tolist(), strict=True)]

    def changes(
        self, texts: FlatTexts, rows: Ints, partners: Ints, degree: float, rng: np.random.Generator
    ) -> TokenChanges:
        """Choose the tokens to change, each open one with probability ``degree``, and their replacements.

        Args:
            texts: Made by ``tokenize``.
            rows: int64 (B,), numbers of the texts to change, at least one.
            partners: int64 (B,), numbers of their partners; only augpro_mix reads them.
            degree: In (0, 1].
            rng: Source of all randomness.

        Returns:
            The changes.
        """
        read = np.concatenate([rows, partners]) if self._name == "augpro_mix" else rows
        u = rng.random((len(rows), int(texts.lengths[read].max()), 2), dtype=np.float32)
        owners, positions = np.divmod(np.flatnonzero(u[..., 0] < degree), u.shape[1])
        chosen = rows[owners]
        places = np.minimum(texts.starts[chosen] + positions, len(texts.ids) - 1)
        is_open = (positions < texts.lengths[chosen]) & (texts.slots[places] != FROZEN)
        owners, positions, places = owners[is_open], positions[is_open], places[is_open]
        if self._name == "augpro_mix":
            tokens = texts.offered(places, partners[owners])
        elif self._name == "knn":
            tokens = self._random_neighbours(texts.ids[places], u[owners, positions, 1])
        else:
            tokens = self._steepest_neighbours(texts, rows, owners, positions)
        new = tokens != texts.ids[places]
        return TokenChanges(texts, rows, owners[new], places[new], tokens[new])

    def _random_neighbours(self, ids: Ints, u: NDArray[np.float32]) -> Ints:
        table = self._space.neighbours
        found: Ints = operators.random_neighbours(torch.from_numpy(ids), torch.from_numpy(u), table).numpy()
        return found

    def _steepest_neighbours(self, texts: FlatTexts, rows: Ints, owners: Ints, positions: Ints) -> Ints:
        space = self._space
        assert space.gradient is not None  # checked when the operator was chosen
        gradients = [torch.as_tensor(gradient) for gradient in space.gradient([texts.inputs[row] for row in rows])]
        firsts = np.cumsum([0, *map(len, gradients)])[:-1]
        slopes = torch.cat(gradients)[torch.from_numpy(firsts[owners] + positions)]
        ids = torch.from_numpy(texts.ids[texts.starts[rows[owners]] + positions])
        found: Ints = operators.steepest_neighbours(ids, slopes, space.neighbours, space.word_embeddings).numpy()
        return found


def _write(bases: Sequence[TextInput], changes: TokenChanges, surfaces: Sequence[str]) -> list[TextInput]:
    texts, places = changes.texts, changes.places
    segments, spans = texts.segments[places].tolist(), texts.spans[places].tolist()
    pieces = list(zip(segments, spans, [surfaces[token] for token in changes.tokens.tolist()], strict=True))
    bounds = itertools.pairwise([0, *np.cumsum(changes.counts).tolist()])
    return [splice(base, pieces[start:end]) for base, (start, end) in zip(bases, bounds, strict=True)]
