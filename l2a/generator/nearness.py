"""How near texts are to the target, cheaply: averages of word embeddings and a classifier of the two domains.

They cost little more than tokenizing, so that the teacher only reads those texts that are near.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from l2a.data.examples import TextInput
from l2a.util.errors import UsageError
from l2a.util.progress import SILENT, Progress

Floats = NDArray[np.float64]
Embed = Callable[[Sequence[TextInput]], NDArray[np.float32]]
"""Embeds N texts: float32 (N, d)."""
Choice = Literal["near", "random", "far"]
RARE = 1e-3  # weight of a token of frequency p: RARE / (RARE + p)
BACKGROUND = 5000  # texts that stand for all the others when the target's density is fitted
EMBEDDED_AT_ONCE = 16_384


@dataclass(frozen=True)
class WordAverage:
    """Embeds a text by the average of its words' embeddings, in which frequent words count little.

    Source: smooth inverse frequency (Arora et al., ICLR 2017); the embeddings are centred on the vocabulary in place of
    the removal of their first component.

    Attributes:
        tokenizer: A fast tokenizer of transformers.
        vectors: float32 (V, d), weighted rows.
        max_length: Tokens that are read of a text.
    """

    tokenizer: Any
    vectors: NDArray[np.float32]
    max_length: int

    def __call__(self, inputs: Sequence[TextInput]) -> NDArray[np.float32]:
        """Embed N texts: unit rows, float32 (N, d); a text without any word is 0."""
        rows = token_ids(self.tokenizer, inputs, self.max_length)
        ends = np.cumsum([0, *map(len, rows)])
        ids = np.fromiter((token for row in rows for token in row), np.int64, ends[-1])
        counts = csr_array((np.ones(len(ids), np.float32), ids, ends), shape=(len(rows), len(self.vectors)))
        sums = np.asarray(counts @ self.vectors, np.float32)
        units: NDArray[np.float32] = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), np.float32(1e-9))
        return units


def token_ids(tokenizer: Any, inputs: Sequence[TextInput], max_length: int) -> list[list[int]]:
    """Tokenize N texts, both sides of a pair one after the other, without special tokens."""
    sides = [[text[side] for text in inputs] for side in range(len(inputs[0]) if inputs else 0)]
    encoded = [tokenizer.backend_tokenizer.encode_batch_fast(side, add_special_tokens=False) for side in sides]
    return [[token for one in parts for token in one.ids[:max_length]] for parts in zip(*encoded, strict=True)]


def fit_word_average(
    tokenizer: Any, embeddings: torch.Tensor, texts: Sequence[TextInput], max_length: int
) -> WordAverage:
    """Weigh words by how rare they are.

    Args:
        tokenizer: A fast tokenizer of transformers.
        embeddings: float32 (V, d), the word embeddings of an encoder in its order.
        texts: Texts whose words are counted.
        max_length: Tokens that are read of a text.
    """
    vectors = embeddings.detach().cpu().float().numpy()
    counts = np.zeros(len(vectors))
    for row in token_ids(tokenizer, texts, max_length):
        np.add.at(counts, row, 1)
    weights = RARE / (RARE + counts / max(1.0, counts.sum()))
    return WordAverage(tokenizer, ((vectors - vectors.mean(0)) * weights[:, None]).astype(np.float32), max_length)


@dataclass(frozen=True)
class TargetDensity:
    """A classifier of the two domains: its log odds estimate the log ratio of the target's density to the other's.

    They grow without bound along one direction, so a small tau makes caricatures.

    Attributes:
        mean: float64 (d,), of both domains.
        weights: float64 (d,), logistic regression of target against source.
        bias: Its intercept.
        location: Median of the log odds over the source texts.
        scale: Standard deviation of the log odds over both domains, each with half of the weight.
    """

    mean: Floats
    weights: Floats
    bias: float
    location: float = 0.0
    scale: float = 1.0

    def log_odds(self, embeddings: NDArray[np.float32]) -> Floats:
        """Log odds of the target, float64 (N,), from float32 (N, d); both domains are equally likely beforehand."""
        odds: Floats = (embeddings - self.mean) @ self.weights + self.bias
        return odds

    def log_density(self, embeddings: NDArray[np.float32]) -> Floats:
        """Standardised log density: 0 for the median source text, in standard deviations over both domains.

        With half of the weight on each domain the mean target text is at most 2 above the mean source text, so the
        chain's temperature means the same whatever the domains, the embeddings' width and the number of target texts
        (our derivation).
        """
        standardised: Floats = (self.log_odds(embeddings) - self.location) / self.scale
        return standardised


def fit_target_density(source: NDArray[np.float32], target: NDArray[np.float32]) -> TargetDensity:
    """Fit the domain classifier and its scale.

    Args:
        source: float32 (S, d), embeddings of texts that are not the target's.
        target: float32 (n, d), of the few target texts.

    Raises:
        UsageError: If there are fewer than 2 texts of a domain.
    """
    if min(len(source), len(target)) < 2:
        raise UsageError(
            f"the generator has {len(source)} source and {len(target)} target texts; give at least 2 of each domain"
        )
    both = np.concatenate([source, target]).astype(np.float64)
    mean = both.mean(axis=0)
    both -= mean
    spread = max(float(np.sqrt(both.var(axis=0).mean())), 1e-12)
    model = LogisticRegression(C=0.1, class_weight="balanced", max_iter=200)
    with threadpool_limits(limits=1, user_api="blas"):  # these problems are small: more threads only get in the way
        model.fit(both / spread, np.repeat([0, 1], [len(source), len(target)]))
        raw = TargetDensity(mean, model.coef_[0] / spread, float(model.intercept_[0]))
        # At most 2,000 texts of each domain fix the zero and the unit.
        of_source, of_target = (raw.log_odds(few[:: math.ceil(len(few) / 2000)]) for few in (source, target))
    gap = of_target.mean() - of_source.mean()
    scale = float(np.sqrt((of_source.var() + of_target.var()) / 2 + gap**2 / 4))
    return replace(raw, location=float(np.median(of_source)), scale=max(scale, 1e-6))


def choose_texts(
    bank: Sequence[TextInput], target: Sequence[TextInput], count: int, choice: Choice, embed: Embed,
    rng: np.random.Generator, progress: Progress = SILENT,
) -> NDArray[np.int64]:  # fmt: skip
    """Choose texts of a bank by their nearness to the target.

    Args:
        bank: Any number of texts; they are read in order, some at a time.
        target: The labelled texts of the target.
        count: Texts to choose; the whole bank where it is smaller.
        choice: The nearest, random or the farthest ones.
        embed: Embeds texts.
        rng: Draws random texts, and those that stand for the bank where nearness is judged.
        progress: Shows the texts judged.

    Returns:
        int64, the places of the texts in the bank, in order.
    """
    if count >= len(bank):
        return np.arange(len(bank))
    if choice == "random":
        chosen = rng.choice(len(bank), count, replace=False)
    else:
        few = np.sort(rng.choice(len(bank), min(BACKGROUND, len(bank)), replace=False))
        density = fit_target_density(embed([bank[i] for i in few]), embed(target))
        with progress.stage("texts near the target", len(bank)) as advance:
            odds = np.concatenate([density.log_odds(embed(some)) for some in _parts(bank, advance)])
        chosen = np.argpartition(-odds if choice == "near" else odds, count - 1)[:count]
    return np.sort(chosen)


def _parts(bank: Sequence[TextInput], advance: Callable[[int], None]) -> Iterator[list[TextInput]]:
    for start in range(0, len(bank), EMBEDDED_AT_ONCE):
        some = [bank[i] for i in range(start, min(start + EMBEDDED_AT_ONCE, len(bank)))]
        yield some
        advance(len(some))


def max_cosine(embeddings: NDArray[np.float32], references: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the cosine of each of N embeddings to the most similar reference, float32 (N,)."""
    one, other = (
        (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)).astype(np.float32)
        for rows in (embeddings, references)
    )
    nearest: NDArray[np.float32] = (one @ other.T).max(axis=1).astype(np.float32)
    return nearest
