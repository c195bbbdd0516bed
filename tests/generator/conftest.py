"""A small WordPiece vocabulary, its neighbour table, and a problem whose target density is known by construction."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from transformers import BertTokenizerFast

from l2a.data.examples import TextInput, normalised_hash
from l2a.generator.chain import GeneratorInputs
from l2a.generator.tokens import NeighbourTable, TokenSpace, find_neighbours, token_kinds, vocabulary
from l2a.teacher.labelling import TeacherOutputs

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused1]", "[unused2]"]
FILM = ["film", "movie", "plot", "actor", "scene", "script", "cinema", "drama", "director", "cast"]
PHONE = ["phone", "battery", "screen", "camera", "charger", "signal", "button", "speaker", "case", "cable"]
COMMON = ["the", "was", "very", "good", "bad", "and", "this", "great", "awful", "with", "my", "has", "don", "is"]
PIECES = ["##ing", "##ed", "##er", "##ly", "##ness", "##ful", "##s", "##x"]
MARKS = [".", ",", "!", "'", "#", "@", "a", "i", "t", "s", "4", "10", "é"]
WORDS = [*FILM, *PHONE, *COMMON]


@pytest.fixture(scope="session")
def word_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizerFast:
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    path.write_text("\n".join([*SPECIALS, *WORDS, *PIECES, *MARKS]) + "\n")
    return BertTokenizerFast(vocab=str(path), do_lower_case=True)


@pytest.fixture(scope="session")
def tokens(word_tokenizer: BertTokenizerFast) -> tuple[str, ...]:
    return vocabulary(word_tokenizer)


@pytest.fixture(scope="session")
def embeddings(tokens: tuple[str, ...]) -> torch.Tensor:
    return torch.randn(len(tokens), 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def table(tokens: tuple[str, ...], embeddings: torch.Tensor) -> NeighbourTable:
    word_start, allowed = token_kinds(tokens)
    return NeighbourTable(find_neighbours(embeddings, word_start, allowed, k=4), word_start, allowed)


def toy_outputs(inputs: Sequence[TextInput]) -> TeacherOutputs:
    """Embed a text by how often it names phones and films: the two domains are two clouds."""
    rows = []
    for text in inputs:
        words = " ".join(text).split()
        phones, films = sum(word in PHONE for word in words), sum(word in FILM for word in words)
        rows.append([phones - films, 0.1 * len(words), 0.05 * (int(normalised_hash(text)[:8], 16) / 2**32 - 0.5)])
    embeddings = np.array(rows, dtype=np.float32).reshape(-1, 3)
    return TeacherOutputs(np.stack([embeddings[:, 0], -embeddings[:, 0]], axis=1), embeddings)


def embed_toy(inputs: Sequence[TextInput]) -> np.ndarray:
    return toy_outputs(inputs).embeddings


class Recorder:
    """Keeps what a function is asked for."""

    def __init__(self, function: Callable[[Sequence[TextInput]], Any]) -> None:
        self.function, self.asked = function, list[TextInput]()

    def __call__(self, inputs: Sequence[TextInput]) -> Any:
        self.asked.extend(inputs)
        return self.function(inputs)


def batches_of(*words: str) -> st.SearchStrategy[list[TextInput]]:
    """Some texts of these words, all single or all pairs."""
    side = st.lists(st.sampled_from(words), max_size=12).map(" ".join)
    return st.one_of(*(st.lists(st.tuples(*text), min_size=2, max_size=5) for text in ([side], [side, side])))


def sentences(topic: list[str], count: int, seed: int) -> tuple[TextInput, ...]:
    rng = np.random.default_rng(seed)
    words = ([*rng.choice(COMMON, 3), *rng.choice(topic, 2), rng.choice(COMMON), "!"] for _ in range(2 * count))
    return tuple((sentence,) for sentence in list(dict.fromkeys(map(" ".join, words)))[:count])


@pytest.fixture(scope="session")
def space(word_tokenizer: BertTokenizerFast, embeddings: torch.Tensor, table: NeighbourTable) -> TokenSpace:
    """Reads 16 tokens of a text; the gradient is the same for every token."""

    def gradient(inputs: Sequence[TextInput]) -> list[np.ndarray]:
        rows = word_tokenizer(*map(list, zip(*inputs, strict=True)), truncation=True, max_length=16)["input_ids"]
        return [np.tile(np.arange(8, dtype=np.float32), (len(row), 1)) for row in rows]

    return TokenSpace(word_tokenizer, table, embeddings, gradient, 16)


@pytest.fixture(scope="session")
def problem(space: TokenSpace) -> GeneratorInputs:
    """Films as the source, phones as the target; one source text is a forbidden test text."""
    source, target = sentences(FILM, 60, seed=1), sentences(PHONE, 12, seed=2)
    return GeneratorInputs(source, {}, target, embed_toy, space, toy_outputs, frozenset({normalised_hash(source[0])}))
