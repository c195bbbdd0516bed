"""The token operators as operators on texts: tokenize, change tokens, write them back into the text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l2a.errors import UsageError
from l2a.examples import TextInput
from l2a.generator import operators
from l2a.generator.corpus import TokenCorpus, align_partners, pad_corpus
from l2a.generator.neighbours import NeighbourTable
from l2a.generator.problem import Gradient, vocabulary
from l2a.generator.rewrite import Rewrite
from l2a.generator.tokens import TokenizedText, substitute, tokenize_texts

REMEMBERED = 65_536
"""Tokenized texts that are kept."""


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
        self._name, self._space, self._tokens = name, space, vocabulary(space.tokenizer)
        self._known: dict[TextInput, TokenizedText] = {}

    def __call__(
        self, bases: Sequence[TextInput], partners: Sequence[TextInput], degree: float, rng: np.random.Generator
    ) -> list[Rewrite]:
        """Change each base; see ``TextOperator``."""
        if not bases:
            return []
        space, count = self._space, len(bases)
        texts = [*bases, *partners] if self._name == "augpro_mix" else list(bases)
        corpus = pad_corpus(texts, self._tokenize(texts), space.neighbours)
        u = torch.from_numpy(rng.random((count, corpus.ids.shape[1], 2), dtype=np.float32))
        new = self._operate(corpus, count, u, degree)
        changed = (new != corpus.ids[:count]).sum(dim=1).numpy() / np.maximum(corpus.words[:count], 1)
        rows = zip(bases, corpus.texts[:count], new.numpy().astype(np.int32), changed.tolist(), strict=True)
        return [
            Rewrite(substitute(base, text, ids[: len(text.ids)], self._tokens) if share else base, share)
            for base, text, ids, share in rows
        ]

    def _tokenize(self, texts: Sequence[TextInput]) -> list[TokenizedText]:
        """Tokenize what was not tokenized before: partners and further copies come again and again."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if len(self._known) + len(new) > REMEMBERED:
            self._known, new = {}, list(dict.fromkeys(texts))
        made = tokenize_texts(new, self._space.tokenizer, self._space.max_length)
        self._known |= zip(new, made, strict=True)
        return [self._known[text] for text in texts]

    def _operate(self, corpus: TokenCorpus, count: int, u: Tensor, degree: float) -> Tensor:
        ids, slots = corpus.ids[:count], corpus.slots[:count]
        table, embeddings = self._space.neighbours, self._space.word_embeddings
        if self._name == "augpro_mix":
            partners = align_partners(ids, slots, corpus.ids[count:], corpus.slots[count:])
            return operators.mix_tokens(ids, slots, partners, u, degree)
        if self._name == "knn":
            return operators.knn_tokens(ids, slots, u, degree, table)
        gradients = self._padded_gradients(corpus, ids.shape[1])
        best = operators.fgsm_replacements(ids, slots, gradients, table, embeddings)
        return operators.fgsm_tokens(ids, slots, best, u, degree)

    def _padded_gradients(self, corpus: TokenCorpus, width: int) -> Tensor:
        assert self._space.gradient is not None  # checked when the operator was chosen
        padded = torch.zeros(len(corpus.inputs), width, self._space.word_embeddings.shape[1])
        for row, gradient in enumerate(self._space.gradient(corpus.inputs)):
            padded[row, : len(gradient)] = torch.as_tensor(gradient)
        return padded
