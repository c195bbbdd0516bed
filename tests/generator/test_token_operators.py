"""The token operators on a store of texts: what they may touch, how partners meet, what comes back as text."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from l2a.generator.operators import OPERATORS
from l2a.generator.tokens import FROZEN, SPECIAL, choose_slots, shares_characters, write_texts

from .conftest import COMMON, FILM, MARKS, PHONE

TOKEN_OPERATORS = [name for name, operator in OPERATORS.items() if operator.works_on == "tokens"]
words = st.lists(st.sampled_from([*FILM, *PHONE, *COMMON, *MARKS, "filming", "phoned", "goodness", "qq"]), max_size=12)
sides = words.map(" ".join)
batches = st.one_of(
    st.lists(st.tuples(sides), min_size=2, max_size=5), st.lists(st.tuples(sides, sides), min_size=2, max_size=5)
)
texts = st.text(st.sampled_from("filmphoneTHE don't!,.#@ é4\u00a0\u4e2d\U0001f600"), max_size=40)


def change(name, space, batch, u, degree):
    """The store, the slots and the new tokens of a batch whose texts have one another as partners."""
    store, rows = space.tokenize(batch), np.arange(len(batch))
    slots = choose_slots(store, rows, rows[::-1].copy(), u, degree)
    return store, slots, OPERATORS[name].rewrite(slots)


def drawn(batch, seed):
    return np.random.default_rng(seed).random((len(batch), 16, 2), dtype=np.float32)


@pytest.mark.parametrize("name", TOKEN_OPERATORS)
@settings(max_examples=25)
@given(batch=batches, seed=st.integers(0, 10_000), degree=st.floats(0.05, 1.0))
def test_guards(space, table, name, batch, seed, degree):
    u = drawn(batch, seed)
    store, slots, tokens = change(name, space, batch, u, degree)
    old, places = store.ids[slots.places], slots.places
    assert (store.segments[places] != SPECIAL).all(), "a special token changes"
    assert table.allowed[old].all(), "a number, a mark or a single letter changes"
    assert table.allowed[tokens].all(), "a token that is not allowed is emitted"
    assert (table.word_start[tokens] == table.word_start[old]).all(), "## and word starts are mixed"
    positions = places - store.starts[slots.rows[slots.owners]]
    assert ((positions >= 0) & (positions < store.lengths[slots.owners])).all()
    assert (u[slots.owners, positions, 0] < degree).all(), "more than the chosen share changes"
    for owner, place, token in zip(slots.owners, places, tokens, strict=True):
        if name == "augpro_mix" and token != store.ids[place]:
            partner = slice(*store.starts[[slots.partners[owner], slots.partners[owner] + 1]])
            same_side = store.segments[partner] == store.segments[place]
            assert token in store.ids[partner][same_side], "the token is not from the same side of the partner"


@pytest.mark.parametrize("name", TOKEN_OPERATORS)
def test_a_text_does_not_depend_on_its_batch(space, name):
    first, second, other = ("the film was good",), ("my phone is bad",), (" ".join([*FILM, *PHONE]),)
    u = drawn([first] * 4, 0)
    _, slots, tokens = change(name, space, [first, other, other, second], u, 0.7)  # the partners stay the same
    among = write_texts(slots, tokens)
    _, slots, tokens = change(name, space, [first, second], u[::3], 0.7)
    assert write_texts(slots, tokens) == among[::3]


def test_partners_meet_by_rank_within_side_and_kind(space, tokens):
    batch = [("the filming, was good", "my movie"), ("screened battery", "signal camera")]
    store, slots, found = change("augpro_mix", space, batch, np.zeros((2, 16, 2), np.float32), 1.0)
    assert [tokens[i] for i in found[slots.owners == 0]] == [
        "screen", "battery", "##ed", "screen", "battery", "signal", "camera",
    ]  # fmt: skip
    assert store.segments.tolist()[:11] == [-1, 0, 0, 0, 0, 0, 0, -1, 1, 1, -1]


def test_a_partner_with_nothing_to_offer_leaves_the_text(space):
    _, slots, found = change("augpro_mix", space, [("the film",), ("! 4",)], np.zeros((2, 16, 2), np.float32), 1.0)
    assert [made.text for made in write_texts(slots, found)] == [("the film",), ("! 4",)]


@given(text=st.one_of(st.tuples(texts), st.tuples(texts, texts)), seed=st.integers(0, 10_000))
def test_only_the_changed_spans_change(space, word_tokenizer, tokens, text, seed):
    store = space.tokenize([text])
    read = word_tokenizer(*([side] for side in text), truncation=True, max_length=16)
    assert [store.ids.tolist()] == read["input_ids"], "not the tokens that models read"
    u, row = drawn([text], seed), np.zeros(1, np.int64)
    slots = choose_slots(store, row, row, u, 0.5)
    (same,) = write_texts(slots, store.ids[slots.places])
    assert same == (text, 0.0), "unchanged tokens give another text"
    expected, movie = list(text), tokens.index("movie")
    for place in slots.places[::-1]:
        side, (start, end) = store.segments[place], store.spans[place]
        if store.ids[place] != movie:
            expected[side] = expected[side][:start] + "movie" + expected[side][end:]
    (made,) = write_texts(slots, np.full(len(slots.places), movie))
    assert made.text == tuple(expected)


def test_case_marks_and_what_lies_beyond_the_maximum_length_stay(space, tokens):
    text = (f"The FILMing, it's  #Great! {'film ' * 20}",)
    store, row = space.tokenize([text]), np.zeros(1, np.int64)
    slots = choose_slots(store, row, row, np.zeros((1, 16, 2), np.float32), 1.0)
    pieces = [tokens.index("##ed" if tokens[token].startswith("##") else "phone") for token in store.ids[slots.places]]
    (made,) = write_texts(slots, np.array(pieces))
    assert made.text[0].startswith("phone phoneed, it's  #phone! phone ") and made.text[0].endswith("film film film ")
    assert made.changed_share == len(pieces) / 14


def test_tokens_that_share_a_character_stay(space):
    spans = np.array([[0, 0], [0, 1], [0, 2], [1, 2], [3, 5], [0, 0], [0, 4], [0, 0]], np.int32)
    segments = np.array([-1, 0, 0, 0, 0, -1, 1, -1], np.int8)
    assert shares_characters(spans, segments).tolist() == [False, True, True, True, False, False, False, False]
    assert (space.tokenize([("4 !",)]).slots == FROZEN).all()
