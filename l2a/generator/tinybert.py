"""TinyBERT's data augmentation, a foil of AugPro (Jiao et al., Findings of EMNLP 2020, algorithm 1), batched.

Stated by the paper: each word is replaced with probability p = 0.4 by one of 15 candidates; candidates of a word that
is one token come from a masked language model that sees the text with the word masked, those of other words are the
nearest in GloVe. The paper's code leaves stop words alone, and so does this. Without a masked-LM head all candidates
come from GloVe.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from l2a.encoding import encode, inference_batches
from l2a.examples import TextInput
from l2a.generator.lexicons import Candidates
from l2a.generator.neighbours import token_kinds
from l2a.generator.problem import vocabulary
from l2a.generator.rewrite import Rewrite
from l2a.generator.words import Span, count_words, find_words, in_the_case_of, replace_spans

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
                if not getattr(self._model.config, "type_vocab_size", 0):
                    del batch["token_type_ids"]
                rows, columns = (batch["input_ids"] == self._tokenizer.mask_token_id).nonzero(as_tuple=True)
                logits = self._model(**batch).logits[rows, columns, : len(self._tokens)].float()
                logits = logits.masked_fill(self._barred, -torch.inf)
                logits[torch.arange(len(rows)), torch.from_numpy(own[indices])[rows]] = -torch.inf
                best = logits.topk(min(self._count, logits.shape[1]))
                for row, ids, scores in zip(rows.tolist(), best.indices.tolist(), best.values.tolist(), strict=True):
                    found[indices[row]] = [i for i, score in zip(ids, scores, strict=True) if score > -np.inf]
        return found


def _mask(text: TextInput, place: Place, mask: str) -> TextInput:
    side, span = place
    return tuple(replace_spans(part, [span], [mask]) if i == side else part for i, part in enumerate(text))
