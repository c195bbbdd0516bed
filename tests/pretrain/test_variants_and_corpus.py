from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l2a.data.domains import load_domain
from l2a.data.examples import normalised_hash
from l2a.pretrain.trainer import clean_corpus, make_variants, protected_hashes, random_span
from l2a.util.errors import UsageError
from tests.conftest import write_domain

TEXTS = (("one two three four five six seven",), ("eight nine",), ("a b c d", "e f g h i"))
WORDS = {word for text in TEXTS for side in text for word in side.split()}


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_variants_hold_only_words_of_the_corpus(seed: int) -> None:
    variants = make_variants(TEXTS, 40, np.random.default_rng(seed))
    assert len(variants) == 40
    assert all(side and set(side.split()) <= WORDS for text in variants for side in text)
    assert [len(text) for text in variants] == sorted(len(text) for text in variants)


def test_variants_repeat_with_the_seed_and_differ_without() -> None:
    first, again, other = (make_variants(TEXTS, 50, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_variants_include_pairs_and_mixed_sentences() -> None:
    variants = make_variants((("a a a a a a a a",), ("b b b b b b b b",)), 300, np.random.default_rng(0))
    assert any(len(text) == 2 for text in variants)
    assert any(len(text) == 1 and {"a", "b"} <= set(text[0].split()) for text in variants)


@given(st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=90), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_a_span_is_contiguous_and_within_its_limits(words: list[str], seed: int) -> None:
    span = random_span(words, np.random.default_rng(seed))
    assert min(3, len(words)) <= len(span) <= min(60, len(words))
    assert any(words[i : i + len(span)] == span for i in range(len(words)))


def test_no_text_of_protected_splits_enters_the_corpus(tmp_path: Path) -> None:
    read = load_domain(str(write_domain(tmp_path / "read.jsonl", 40, seed=0, prefix="source ")))
    tried = load_domain(str(write_domain(tmp_path / "tried.jsonl", 40, seed=1, prefix="target ")))
    unseen = [*read.dev.inputs, *tried.train.inputs, *tried.dev.inputs]
    leaked = [(text[0].upper() + " ",) for text in unseen]
    protected = protected_hashes([read], [tried])
    assert protected >= read.test.hashes | tried.test.hashes
    assert clean_corpus([read.train.inputs, leaked], protected) == read.train.inputs


def test_a_pair_goes_when_one_side_is_protected() -> None:
    corpus = [(("kept", "too"), ("Secret", "side"), ("single",))]
    assert clean_corpus(corpus, {normalised_hash(("secret",))}) == (("single",), ("kept", "too"))


def test_an_empty_corpus_is_refused() -> None:
    with pytest.raises(UsageError, match="no text is left"):
        clean_corpus([[("a",)]], {normalised_hash(("A",))})
