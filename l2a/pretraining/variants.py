"""Cheap variants of texts: the pretrained teacher labels whatever comes, so variety is free.

Spans, pairs, token mixes (after AugPro-Mix, arXiv 2210.11768, with the two ends as the only candidates) and light
noise.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from l2a.examples import TextInput

SHORTEST_SPAN, LONGEST_SPAN = 3, 60
Words = list[str]


def make_variants(texts: Sequence[TextInput], count: int, rng: np.random.Generator) -> tuple[TextInput, ...]:
    """Draw variants of a corpus: half spans, the rest pairs, mixes and noisy spans in equal parts.

    A text is drawn with a chance proportional to the square root of its length, so that long ones give more spans.

    Args:
        texts: The corpus, single texts and pairs.
        count: Number of variants.
        rng: Source of all draws.

    Returns:
        Single texts first, then pairs.
    """
    sides = [side.split() for text in texts for side in text]
    weights = np.sqrt([len(words) for words in sides])
    chosen = rng.choice(len(sides), size=(count, 2), p=weights / weights.sum())
    kinds = rng.choice(len(_MAKERS), size=count, p=[0.5, 1 / 6, 1 / 6, 1 / 6])
    made = (
        _MAKERS[kind](sides[first], sides[second], rng) for kind, (first, second) in zip(kinds, chosen, strict=True)
    )
    return tuple(sorted((text for text in made if text[0]), key=len))


def random_span(words: Words, rng: np.random.Generator) -> Words:
    """Cut a contiguous span whose length is log-uniform, so that short ones are common.

    Args:
        words: Words of a text.
        rng: Source of the draw.

    Returns:
        A span of 3 to 60 words, or the whole text if it is shorter.
    """
    low, high = math.log(SHORTEST_SPAN), math.log(LONGEST_SPAN + 1)
    length = min(len(words), int(math.exp(rng.uniform(low, high))))
    start = int(rng.integers(0, len(words) - length + 1))
    return words[start : start + length]


def _span(first: Words, second: Words, rng: np.random.Generator) -> TextInput:
    return (" ".join(random_span(first, rng)),)


def _pair(first: Words, second: Words, rng: np.random.Generator) -> TextInput:
    # Half of the pairs come from one text, so that related sides are as common as unrelated ones.
    partner = first if rng.random() < 0.5 else second
    return (" ".join(random_span(first, rng)), " ".join(random_span(partner, rng)))


def _mix(first: Words, second: Words, rng: np.random.Generator) -> TextInput:
    span, partner = random_span(first, rng), random_span(second, rng)
    swapped = rng.random(len(span)) < rng.uniform(0.1, 0.5)
    return (" ".join(partner[i] if i < len(partner) and swapped[i] else word for i, word in enumerate(span)),)


def _noise(first: Words, second: Words, rng: np.random.Generator) -> TextInput:
    span = random_span(first, rng)
    kept = [word for word in span if rng.random() > 0.15] or span
    position = int(rng.integers(0, len(kept)))
    other = int(rng.integers(0, len(kept)))
    kept[position], kept[other] = kept[other], kept[position]
    return (" ".join(kept),)


_MAKERS: tuple[Callable[[Words, Words, np.random.Generator], TextInput], ...] = (_span, _pair, _mix, _noise)
