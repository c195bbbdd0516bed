"""The token operators on a store of texts, and their neighbours against an exhaustive search."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from tokenizers import Tokenizer, models

from l2a.generator import tokens as module
from l2a.generator.operators import OPERATORS
from l2a.util import UsageError

from .conftest import COMMON, FILM, MARKS, PHONE, batches_of

TOKEN_OPERATORS = [name for name, operator in OPERATORS.items() if operator.works_on == "tokens"]
batches = batches_of(*FILM, *PHONE, *COMMON, *MARKS, "filming", "phoned", "goodness", "qq")
texts = st.text(st.sampled_from("filmphoneTHE don't!,.#@ é4\u00a0\u4e2d\U0001f600"), max_size=40)


def change(name, space, batch, u, degree):
    """The store, the slots and the new tokens of a batch whose texts have one another as partners."""
    store, rows = space.tokenize(batch), np.arange(len(batch))
    slots = module.choose_slots(store, rows, rows[::-1].copy(), u, degree)
    return store, slots, OPERATORS[name].rewrite(slots)


def drawn(batch, seed):
    return np.random.default_rng(seed).random((len(batch), 16, 2), dtype=np.float32)


@pytest.mark.parametrize("name", TOKEN_OPERATORS)
@given(batch=batches, seed=st.integers(0, 10_000), degree=st.floats(0.05, 1.0))
def test_guards(space, table, name, batch, seed, degree):
    u = drawn(batch, seed)
    store, slots, tokens = change(name, space, batch, u, degree)
    old, places = store.ids[slots.places], slots.places
    assert (store.segments[places] != module.SPECIAL).all(), "a special token changes"
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
    among = module.write_texts(slots, tokens)
    _, slots, tokens = change(name, space, [first, second], u[::3], 0.7)
    assert module.write_texts(slots, tokens) == among[::3]


def test_partners_meet_by_rank_within_side_and_kind(space, tokens):
    batch = [("the filming, was good", "my movie"), ("screened battery", "signal camera")]
    store, slots, found = change("augpro_mix", space, batch, np.zeros((2, 16, 2), np.float32), 1.0)
    assert " ".join(tokens[i] for i in found[slots.owners == 0]) == "screen battery ##ed screen battery signal camera"
    assert store.segments.tolist()[:11] == [-1, 0, 0, 0, 0, 0, 0, -1, 1, 1, -1]


def test_a_partner_with_nothing_to_offer_leaves_the_text(space):
    _, slots, found = change("augpro_mix", space, [("the film",), ("! 4",)], np.zeros((2, 16, 2), np.float32), 1.0)
    assert [made.text for made in module.write_texts(slots, found)] == [("the film",), ("! 4",)]


@given(text=st.one_of(st.tuples(texts), st.tuples(texts, texts)), seed=st.integers(0, 10_000))
def test_only_the_changed_spans_change(space, word_tokenizer, tokens, text, seed):
    store = space.tokenize([text])
    read = word_tokenizer(*([side] for side in text), truncation=True, max_length=16)
    assert [store.ids.tolist()] == read["input_ids"], "not the tokens that models read"
    u, row = drawn([text], seed), np.zeros(1, np.int64)
    slots = module.choose_slots(store, row, row, u, 0.5)
    (same,) = module.write_texts(slots, store.ids[slots.places])
    assert same == (text, 0.0), "unchanged tokens give another text"
    expected, movie = list(text), tokens.index("movie")
    for place in slots.places[::-1]:
        side, (start, end) = store.segments[place], store.spans[place]
        if store.ids[place] != movie:
            expected[side] = expected[side][:start] + "movie" + expected[side][end:]
    (made,) = module.write_texts(slots, np.full(len(slots.places), movie))
    assert made.text == tuple(expected)


def test_case_marks_and_what_lies_beyond_the_maximum_length_stay(space, tokens):
    text = (f"The FILMing, it's  #Great! {'film ' * 20}",)
    store, row = space.tokenize([text]), np.zeros(1, np.int64)
    slots = module.choose_slots(store, row, row, np.zeros((1, 16, 2), np.float32), 1.0)
    pieces = [tokens.index("##ed" if tokens[token].startswith("##") else "phone") for token in store.ids[slots.places]]
    (made,) = module.write_texts(slots, np.array(pieces))
    assert made.text[0].startswith("phone phoneed, it's  #phone! phone ") and made.text[0].endswith("film film film ")
    assert made.changed_share == len(pieces) / 14


def test_tokens_that_share_a_character_stay(space):
    spans = np.array([[0, 0], [0, 1], [0, 2], [1, 2], [3, 5], [0, 0], [0, 4], [0, 0]], np.int32)
    segments = np.array([-1, 0, 0, 0, 0, -1, 1, -1], np.int8)
    assert module.shares_characters(spans, segments).tolist() == [False, True, True, True, False, False, False, False]
    assert (space.tokenize([("4 !",)]).slots == module.FROZEN).all()


V, D, COUNT = 300, 48, 64
EVERYTHING = torch.ones(V, dtype=torch.bool)
IDS = torch.randint(0, V, (COUNT,), generator=torch.Generator().manual_seed(6))
MATRIX = torch.randn(V, D, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def full_table() -> module.NeighbourTable:
    return module.NeighbourTable(module.find_neighbours(MATRIX, EVERYTHING, EVERYTHING, V - 1), EVERYTHING, EVERYTHING)


def test_fgsm_takes_the_neighbour_with_the_largest_first_order_gain(full_table):
    gradients = torch.randn(COUNT, D, generator=torch.Generator().manual_seed(1))
    few = full_table.ids[:, :5]
    found = module.steepest_neighbours(IDS, gradients, few, MATRIX)
    for place, token in enumerate(IDS.tolist()):
        gains = {w: float((MATRIX[w] - MATRIX[token]) @ gradients[place]) for w in few[token].tolist()}
        assert found[place] == max(gains, key=gains.__getitem__)


def test_fgsm_over_all_rows_is_a_long_step_projected_exhaustively(full_table, monkeypatch):
    gradients = torch.nn.functional.normalize(torch.randn(COUNT, D, generator=torch.Generator().manual_seed(2)), dim=-1)
    rows = torch.nn.functional.normalize(MATRIX, dim=-1)
    distances = torch.cdist(rows[IDS] + 1e3 * gradients, rows).scatter(1, IDS[:, None], torch.inf)
    for at_once in (module.POSITIONS_AT_ONCE, 7):
        monkeypatch.setattr(module, "POSITIONS_AT_ONCE", at_once)
        assert torch.equal(module.steepest_neighbours(IDS, gradients, full_table.ids, rows), distances.argmin(dim=1))


def test_knn_draws_each_neighbour_alike(full_table):
    few = module.NeighbourTable(full_table.ids[:, :4], EVERYTHING, EVERYTHING)
    places = np.arange(COUNT).repeat(400)
    choice = np.random.default_rng(0).random(len(places), dtype=np.float32)
    store = SimpleNamespace(ids=IDS.numpy(), space=SimpleNamespace(neighbours=few))
    found = module.knn(module.Slots(store, places, places, places, places, choice))
    ranks = (few.ids.numpy()[store.ids[places]] == found[:, None]).mean(axis=0)
    assert ranks == pytest.approx(0.25, abs=0.02) and ranks.sum() == 1


def test_only_pieces_of_two_letters_or_more_may_change():
    tokens = ["[CLS]", "[unused3]", "film", "##ing", "##s", "a", "10", "!", "don't", "für", "##"]
    word_start, allowed = module.token_kinds(tokens)
    assert [tokens[i] for i in allowed.nonzero()] == ["film", "##ing", "für"]
    assert [tokens[i] for i in (~word_start).nonzero()] == ["##ing", "##s", "##"]


def test_other_vocabularies_are_refused():
    with pytest.raises(UsageError, match="needs a WordPiece vocabulary, and this one is BPE"):
        module.vocabulary(SimpleNamespace(backend_tokenizer=Tokenizer(models.BPE())))


@given(seed=st.integers(0, 10_000), size=st.integers(2, 40), k=st.integers(1, 6))
def test_neighbours_are_the_nearest_compatible_tokens(seed, size, k):
    rng = np.random.default_rng(seed)
    embeddings = torch.from_numpy(rng.normal(size=(size, 5)).astype(np.float32))
    word_start, allowed = (torch.from_numpy(rng.random(size) < share) for share in (0.6, 0.7))
    ids = module.find_neighbours(embeddings, word_start, allowed, k)
    rows = torch.nn.functional.normalize(embeddings, dim=-1)
    exact = torch.cdist(rows, rows)
    for token in range(size):
        others = [w for w in range(size) if allowed[w] and word_start[w] == word_start[token] and w != token]
        if not allowed[token] or not others:
            assert ids[token].tolist() == [token] * k
            continue
        assert set(ids[token].tolist()) <= set(others)
        expected = sorted(exact[token, others].tolist())[:k]
        assert exact[token, ids[token]][: len(expected)].tolist() == pytest.approx(expected, abs=1e-3)


def test_short_untrained_rows_are_not_near_everything():
    trained = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    embeddings = torch.cat([trained, 1e-3 * torch.ones(1, 64)])
    ids = module.find_neighbours(embeddings, EVERYTHING[:51], EVERYTHING[:51], k=3)
    raw = torch.cdist(trained, embeddings).topk(4, largest=False).indices
    assert (raw == 50).any(dim=1).float().mean() > 0.9
    assert (ids[:50] == 50).any(dim=1).float().mean() < 0.3


def test_a_matrix_is_searched_once(tokens, embeddings, monkeypatch):
    first = module.build_neighbour_table(embeddings, tokens, k=4)
    monkeypatch.setattr(module, "find_neighbours", lambda *_: pytest.fail("searched again"))
    second = module.build_neighbour_table(embeddings, tokens, k=4)
    assert torch.equal(first.ids, second.ids)
    monkeypatch.undo()
    assert not torch.equal(first.ids, module.build_neighbour_table(embeddings.flip(0), tokens, k=4).ids)
    assert not second.allowed[tokens.index("[unused1]")] and second.allowed[tokens.index("film")]


def test_the_size_of_a_block_changes_no_neighbour(embeddings, table, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 5)
    assert torch.equal(module.find_neighbours(embeddings, table.word_start, table.allowed, k=4), table.ids)


def test_a_token_that_is_the_only_one_of_its_kind_stays():
    words = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    names = ["film", "movie", "##ing"]
    assert module.build_neighbour_table(words, names, k=1).allowed.tolist() == [True, True, False]
    assert module.build_neighbour_table(words, names, k=0).ids.shape == (3, 0)
