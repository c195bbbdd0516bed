"""EDA, a foil of AugPro: synonyms, random insertion, swap and deletion (Wei and Zou, EMNLP 2019, arXiv 1901.11196).

The four operations, the choice of one of them for each new text and the number n = max(1, degree * words) of changes
are stated by the paper. The paper's code strips case and marks from all text; here these stay, which is ours, as it is
that the sides of a pair are changed one by one.
"""

from collections.abc import Callable, Sequence

import numpy as np
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from l2a.examples import TextInput
from l2a.generator.lexicons import Synonyms
from l2a.generator.rewrite import Rewrite
from l2a.generator.words import Span, count_words, find_words, in_the_case_of, replace_spans

SideChange = tuple[str, int]
"""A changed side and the number of its words that were replaced, inserted, moved or deleted."""


class Eda:
    """Changes texts by one of the four operations, drawn for each text."""

    def __init__(self, synonyms: Synonyms) -> None:
        """Keep the synonyms.

        Args:
            synonyms: Of lower-case words.
        """
        self._synonyms = synonyms
        self._operations: tuple[Callable[[str, list[Span], float, np.random.Generator], SideChange], ...] = (
            self._replace, self._insert, _swap, _delete,
        )  # fmt: skip

    def __call__(
        self, bases: Sequence[TextInput], partners: Sequence[TextInput], degree: float, rng: np.random.Generator
    ) -> list[Rewrite]:
        """Change each base; see ``TextOperator``."""
        return [self._rewrite(base, degree, rng) for base in bases]

    def _rewrite(self, base: TextInput, degree: float, rng: np.random.Generator) -> Rewrite:
        operation = self._operations[rng.integers(len(self._operations))]
        sides, changed = [], 0
        for side in base:
            spans = find_words(side)
            new, count = operation(side, spans, degree, rng) if spans else (side, 0)
            sides.append(new)
            changed += count
        return Rewrite(tuple(sides), min(1.0, changed / count_words(base)))

    def _replace(self, side: str, spans: list[Span], degree: float, rng: np.random.Generator) -> SideChange:
        chosen = self._draw_known(side, spans, _changes(spans, degree), rng)
        new = [in_the_case_of(side[start:end], self._draw_synonym(side[start:end], rng)) for start, end in chosen]
        return replace_spans(side, chosen, new), len(chosen)

    def _insert(self, side: str, spans: list[Span], degree: float, rng: np.random.Generator) -> SideChange:
        count = 0
        for _ in range(_changes(spans, degree)):
            known = self._draw_known(side, find_words(side), 1, rng)
            if known:
                synonym, words = self._draw_synonym(side[slice(*known[0])], rng), find_words(side)
                place = words[rng.integers(len(words))][0]
                side, count = f"{side[:place]}{synonym} {side[place:]}", count + 1
        return side, count

    def _draw_known(self, side: str, spans: list[Span], count: int, rng: np.random.Generator) -> list[Span]:
        """Draw words that have synonyms and are no stop words, in the order of the text."""
        lower = [side[start:end].lower() for start, end in spans]
        known = [i for i, word in enumerate(lower) if word not in ENGLISH_STOP_WORDS and word in self._synonyms]
        return [spans[i] for i in sorted(rng.permutation(known)[:count].tolist())]

    def _draw_synonym(self, word: str, rng: np.random.Generator) -> str:
        synonyms = self._synonyms[word.lower()]
        return synonyms[int(rng.integers(len(synonyms)))]


def _changes(spans: list[Span], degree: float) -> int:
    return max(1, int(degree * len(spans)))


def _swap(side: str, spans: list[Span], degree: float, rng: np.random.Generator) -> SideChange:
    words = [side[start:end] for start, end in spans]
    swapped = list(words)
    for _ in range(_changes(spans, degree) if len(words) > 1 else 0):
        one, other = rng.choice(len(words), size=2, replace=False)
        swapped[one], swapped[other] = swapped[other], swapped[one]
    moved = sum(old != new for old, new in zip(words, swapped, strict=True))
    return replace_spans(side, spans, swapped), moved


def _delete(side: str, spans: list[Span], degree: float, rng: np.random.Generator) -> SideChange:
    gone = rng.random(len(spans)) < degree
    if gone.all():
        gone[rng.integers(len(spans))] = False
    cut = [_with_blank(side, span) for span, is_gone in zip(spans, gone, strict=True) if is_gone]
    return replace_spans(side, cut, [""] * len(cut)), len(cut)


def _with_blank(side: str, span: Span) -> Span:
    """Widen a span by the blank before it, or after it at the start: what a deletion takes away."""
    start, end = span
    if side[start - 1 : start] == " ":
        return start - 1, end
    return start, end + (side[end : end + 1] == " ")
