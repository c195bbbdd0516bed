import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from l2a.generator.tokens import shares_characters, substitute, tokenize_texts

texts = st.text(st.sampled_from("filmphoneTHE don't!,.#@ é4\u00a0\u4e2d\U0001f600"), max_size=40)
inputs = st.one_of(st.tuples(texts), st.tuples(texts, texts))


@settings(max_examples=60, deadline=None)
@given(text=inputs)
def test_unchanged_tokens_give_the_identical_text(word_tokenizer, tokens, text):
    (tokenized,) = tokenize_texts([text], word_tokenizer, 16)
    assert substitute(text, tokenized, tokenized.ids.copy(), tokens) == text


@settings(max_examples=60, deadline=None)
@given(text=inputs, seed=st.integers(0, 10_000))
def test_only_the_changed_spans_change(word_tokenizer, tokens, text, seed):
    (tokenized,) = tokenize_texts([text], word_tokenizer, 12)
    rng = np.random.default_rng(seed)
    new_ids = np.where(rng.random(len(tokenized.ids)) < 0.5, tokens.index("movie"), tokenized.ids).astype(np.int32)
    expected = list(text)
    for place in range(len(new_ids) - 1, -1, -1):
        segment, (start, end) = tokenized.segments[place], tokenized.spans[place]
        if segment >= 0 and new_ids[place] != tokenized.ids[place]:
            expected[segment] = expected[segment][:start] + "movie" + expected[segment][end:]
    assert substitute(text, tokenized, new_ids, tokens) == tuple(expected)


def test_the_tokens_are_those_that_models_read(word_tokenizer):
    pair = ("The filming was GOOD!", "my phone")
    (tokenized,) = tokenize_texts([pair], word_tokenizer, 32)
    assert tokenized.ids.tolist() == word_tokenizer(*pair)["input_ids"]
    assert tokenized.segments.tolist() == [-1, 0, 0, 0, 0, 0, 0, -1, 1, 1, -1]


def test_case_and_punctuation_of_everything_else_stay(word_tokenizer, tokens):
    text = ("The FILM, it's  #Great!",)
    (tokenized,) = tokenize_texts([text], word_tokenizer, 32)
    new_ids = np.where(tokenized.ids == tokens.index("film"), tokens.index("phone"), tokenized.ids).astype(np.int32)
    assert substitute(text, tokenized, new_ids, tokens) == ("The phone, it's  #Great!",)


def test_a_continuation_is_written_without_its_mark(word_tokenizer, tokens):
    text = ("filming",)
    (tokenized,) = tokenize_texts([text], word_tokenizer, 32)
    new_ids = np.where(tokenized.ids == tokens.index("##ing"), tokens.index("##ed"), tokenized.ids).astype(np.int32)
    assert substitute(text, tokenized, new_ids, tokens) == ("filmed",)


def test_text_beyond_the_maximum_length_stays(word_tokenizer, tokens):
    text = ("film film film phone phone",)
    (tokenized,) = tokenize_texts([text], word_tokenizer, 5)
    new_ids = np.full(len(tokenized.ids), tokens.index("movie"), dtype=np.int32)
    assert substitute(text, tokenized, new_ids, tokens) == ("movie movie movie phone phone",)


def test_the_sides_of_a_pair_are_isolated(word_tokenizer, tokens):
    text = ("film was good", "film was good")
    (tokenized,) = tokenize_texts([text], word_tokenizer, 32)
    new_ids = np.where(tokenized.segments == 1, tokens.index("phone"), tokenized.ids).astype(np.int32)
    assert substitute(text, tokenized, new_ids, tokens) == ("film was good", "phone phone phone")


def test_tokens_that_share_a_character_are_found():
    spans = np.array([[0, 0], [0, 1], [0, 2], [1, 2], [3, 5], [0, 0], [0, 4], [0, 0]], np.int32)
    segments = np.array([-1, 0, 0, 0, 0, -1, 1, -1], np.int8)
    assert shares_characters(spans, segments).tolist() == [False, True, True, True, False, False, False, False]
