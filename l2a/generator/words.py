"""The words of a text, for operators that replace, insert, swap or delete whole words.

Only runs of two letters or more count. Numbers, marks, user names, bracketed tokens such as "[SEP]" and what an
apostrophe or a hyphen joins stay as they are, so that no operator touches what a model reads as a special token.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from l2a.data.encoding import encode, inference_batches, model_inputs
from l2a.data.examples import TextInput
from l2a.generator.lexicons import Candidates, Synonyms
from l2a.generator.tokens import token_kinds, vocabulary

WORD = re.compile(r"(?<![\w'\u2019@#/\[\-])[^\W\d_]{2,}(?![\w'\u2019@/\]\-])")

Span = tuple[int, int]
"""First and past-the-last character of a word in its side of the text."""


def find_words(side: str) -> list[Span]:
    """Find the words of one side that may change.

    Args:
        side: The text.

    Returns:
        Their places, in order.
    """
    return [match.span() for match in WORD.finditer(side)]


def replace_spans(side: str, spans: Sequence[Span], replacements: Sequence[str]) -> str:
    """Write new words into their places; every other character stays.

    Args:
        side: The text.
        spans: Places that do not overlap, in order.
        replacements: One text for each.

    Returns:
        The changed text.
    """
    parts, end = [], 0
    for (start, stop), replacement in zip(spans, replacements, strict=True):
        parts += [side[end:start], replacement]
        end = stop
    return "".join([*parts, side[end:]])


def in_the_case_of(word: str, replacement: str) -> str:
    """Give a replacement the capitals of the word that it replaces.

    Args:
        word: The word in the text.
        replacement: In any case.

    Returns:
        The replacement, in capitals or with a first capital as the word has them.
    """
    if word.isupper():
        return replacement.upper()
    return replacement[:1].upper() + replacement[1:] if word[:1].isupper() else replacement


def count_words(text_input: TextInput) -> int:
    """Count what blanks separate: the base of the share of words that an operator changed.

    Args:
        text_input: One or two strings.

    Returns:
        Words of all sides, at least 1.
    """
    return max(1, sum(len(side.split()) for side in text_input))


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


CANDIDATES = 15
REMEMBERED = 4096

Place = tuple[int, Span]
"""A side of a text and a word in it."""
MaskedCandidates = Callable[[Sequence[TextInput], Sequence[Place]], Sequence[Sequence[str]]]
"""Texts, and one place in each, to what a masked language model offers there; none for words of several tokens."""


class TinyBertAugmentation:
    """Replaces words by candidates; those of a text are found once and kept for its further copies."""

    def __init__(self, nearest: Candidates, masked: MaskedCandidates | None = None) -> None:
        """Keep the sources of candidates.

        Args:
            nearest: The nearest words of a word.
            masked: What a masked language model offers; None without one.
        """
        self._nearest, self._masked = nearest, masked
        self._known: dict[TextInput, list[tuple[Place, Sequence[str]]]] = {}

    def __call__(
        self, bases: Sequence[TextInput], partners: Sequence[TextInput], degree: float, rng: np.random.Generator
    ) -> list[Rewrite]:
        """Change each base; see ``TextOperator``."""
        new = list(dict.fromkeys(base for base in bases if base not in self._known))
        if len(self._known) + len(new) > REMEMBERED:
            self._known, new = {}, list(dict.fromkeys(bases))
        self._known |= self._find(new)
        return [_rewrite(base, self._known[base], degree, rng) for base in bases]

    def _find(self, texts: Sequence[TextInput]) -> dict[TextInput, list[tuple[Place, Sequence[str]]]]:
        places = [(text, place) for text in texts for place in _open_places(text)]
        words = [text[side][start:end] for text, (side, (start, end)) in places]
        offers: list[Sequence[str]] = [()] * len(places)
        if self._masked is not None and places:
            offers = list(self._masked([text for text, _ in places], [place for _, place in places]))
        rest = [i for i, offer in enumerate(offers) if not offer]
        for i, offer in zip(rest, self._nearest([words[i].lower() for i in rest]), strict=True):
            offers[i] = offer
        found: dict[TextInput, list[tuple[Place, Sequence[str]]]] = {text: [] for text in texts}
        for (text, place), offer in zip(places, offers, strict=True):
            if offer:
                found[text].append((place, offer))
        return found


def _open_places(text: TextInput) -> list[Place]:
    return [
        (number, (start, end))
        for number, side in enumerate(text)
        for start, end in find_words(side)
        if side[start:end].lower() not in ENGLISH_STOP_WORDS
    ]


def _rewrite(
    base: TextInput, candidates: Sequence[tuple[Place, Sequence[str]]], degree: float, rng: np.random.Generator
) -> Rewrite:
    decide = rng.random((len(candidates), 2))
    changes: list[list[tuple[Span, str]]] = [[] for _ in base]
    for (change, choice), ((side, span), offer) in zip(decide, candidates, strict=True):
        if change < degree:
            word = base[side][slice(*span)]
            changes[side].append((span, in_the_case_of(word, offer[int(choice * len(offer))])))
    sides = [
        replace_spans(side, [span for span, _ in done], [word for _, word in done])
        for side, done in zip(base, changes, strict=True)
    ]
    return Rewrite(tuple(sides), min(1.0, sum(map(len, changes)) / count_words(base)))


class MaskedLanguageModel:
    """Asks a masked language model for the words of masked places, many at once."""

    def __init__(self, model: Any, tokenizer: Any, max_length: int, count: int = CANDIDATES) -> None:
        """Keep the model.

        Args:
            model: ``AutoModelForMaskedLM``, in eval mode.
            tokenizer: Its fast WordPiece tokenizer.
            max_length: Longest sequence in tokens; words beyond it get no candidates.
            count: Candidates of a place.
        """
        self._model, self._tokenizer = model, tokenizer
        self._max_length, self._count = max_length, count
        self._tokens = vocabulary(tokenizer)
        word_start, allowed = token_kinds(self._tokens)
        self._barred = ~(word_start & allowed)

    def __call__(self, texts: Sequence[TextInput], places: Sequence[Place]) -> list[list[str]]:
        """Ask for candidates.

        Args:
            texts: N texts.
            places: The word to mask in each.

        Returns:
            N lists of whole words without the masked one, likeliest first; empty where the word is several tokens.
        """
        words = [text[side][start:end] for text, (side, (start, end)) in zip(texts, places, strict=True)]
        pieces = self._tokenizer(words, add_special_tokens=False)["input_ids"] if words else []
        single = [i for i, ids in enumerate(pieces) if len(ids) == 1]
        own = np.array([pieces[i][0] for i in single], dtype=np.int64)
        offers: list[list[str]] = [[] for _ in texts]
        masked = [_mask(texts[i], places[i], self._tokenizer.mask_token) for i in single]
        for i, ids in zip(single, self._predict(masked, own), strict=True):
            offers[i] = [self._tokens[index] for index in ids]
        return offers

    def _predict(self, masked: Sequence[TextInput], own: NDArray[np.int64]) -> list[list[int]]:
        encoded = encode(self._tokenizer, masked, self._max_length)
        found: list[list[int]] = [[] for _ in masked]
        with torch.inference_mode():
            for indices in inference_batches(encoded):
                batch = encoded.padded(indices)
                rows, columns = (batch["input_ids"] == self._tokenizer.mask_token_id).nonzero(as_tuple=True)
                logits = self._model(**model_inputs(self._model.config, batch)).logits
                logits = logits[rows, columns, : len(self._tokens)].float()
                logits = logits.masked_fill(self._barred, -torch.inf)
                logits[torch.arange(len(rows)), torch.from_numpy(own[indices])[rows]] = -torch.inf
                best = logits.topk(min(self._count, logits.shape[1]))
                for row, ids, scores in zip(rows.tolist(), best.indices.tolist(), best.values.tolist(), strict=True):
                    found[indices[row]] = [i for i, score in zip(ids, scores, strict=True) if score > -np.inf]
        return found


def _mask(text: TextInput, place: Place, mask: str) -> TextInput:
    side, span = place
    return tuple(replace_spans(part, [span], [mask]) if i == side else part for i, part in enumerate(text))
