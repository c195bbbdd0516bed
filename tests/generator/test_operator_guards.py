import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from l2a.generator import operators
from l2a.generator.tokens import align_partners, tokenize_corpus, unit_rows

from .conftest import COMMON, FILM, MARKS, PHONE

OPERATORS = ("mix", "between", "fgsm", "knn")
words = st.lists(st.sampled_from([*FILM, *PHONE, *COMMON, *MARKS, "filming", "phoned", "goodness", "qq"]), max_size=12)
sides = words.map(" ".join)
batches = st.one_of(
    st.lists(st.tuples(sides), min_size=2, max_size=5), st.lists(st.tuples(sides, sides), min_size=2, max_size=5)
)


def apply(name, corpus, u, degree, table, embeddings, gradients):
    ids, slots = corpus.ids, corpus.slots
    partners = align_partners(ids, slots, ids.flip(0), slots.flip(0))
    if name == "mix":
        return operators.mix_tokens(ids, slots, partners, u, degree)
    if name == "between":
        return operators.mix_tokens_between(ids, slots, partners, u, degree, table, unit_rows(embeddings))
    if name == "knn":
        return operators.knn_tokens(ids, slots, u, degree, table)
    replacements = operators.fgsm_replacements(ids, slots, gradients, table, embeddings)
    return operators.fgsm_tokens(ids, slots, replacements, u, degree)


def random_inputs(corpus, seed, width):
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(*corpus.ids.shape, 2, generator=generator)
    return u, torch.randn(*corpus.ids.shape, width, generator=generator)


@pytest.mark.parametrize("name", OPERATORS)
@settings(max_examples=40, deadline=None)
@given(batch=batches, seed=st.integers(0, 10_000), degree=st.floats(0.05, 1.0))
def test_guards(word_tokenizer, tokens, table, embeddings, name, batch, seed, degree):
    corpus = tokenize_corpus(batch, word_tokenizer, 14, table)
    u, gradients = random_inputs(corpus, seed, embeddings.shape[1])
    new = apply(name, corpus, u, degree, table, embeddings, gradients)
    changed = new != corpus.ids
    segments = torch.full(corpus.ids.shape, -1)
    for row, text in enumerate(corpus.texts):
        segments[row, : len(text.ids)] = torch.from_numpy(text.segments).long()
    assert not changed[segments == -1].any(), "a special token or padding changed"
    assert table.allowed[corpus.ids[changed]].all(), "a number, a mark or a single letter changed"
    assert table.allowed[new[changed]].all(), "a token that is not allowed was emitted"
    assert (table.word_start[new] == table.word_start[corpus.ids])[changed].all(), "## and word starts were mixed"
    assert (u[..., 0] < degree)[changed].all(), "more than the chosen share changed"
    assert new.shape == corpus.ids.shape
    if name == "mix":
        for row, segment in zip(*[part.tolist() for part in changed.nonzero(as_tuple=True)], strict=True):
            side = segments[row, segment]
            partner = corpus.ids.flip(0)[row][segments.flip(0)[row] == side]
            assert new[row, segment] in partner, "the token is not from the same side of the partner"


@pytest.mark.parametrize("name", OPERATORS)
def test_the_same_randomness_gives_the_same_tokens(word_tokenizer, table, embeddings, name):
    corpus = tokenize_corpus([("the film was good",), ("my phone is bad",)], word_tokenizer, 16, table)
    u, gradients = random_inputs(corpus, 0, embeddings.shape[1])
    before = corpus.ids.clone()
    first = apply(name, corpus, u, 0.7, table, embeddings, gradients)
    assert torch.equal(first, apply(name, corpus, u, 0.7, table, embeddings, gradients))
    assert torch.equal(corpus.ids, before), "the operator changed its input"


@pytest.mark.parametrize("name", OPERATORS)
def test_a_text_does_not_depend_on_its_batch(word_tokenizer, table, embeddings, name):
    first, second, other = ("the film was good",), ("my phone is bad",), (" ".join([*FILM, *PHONE]),)
    pair = tokenize_corpus([first, second], word_tokenizer, 32, table)
    four = tokenize_corpus([first, other, other, second], word_tokenizer, 32, table)  # the partners stay the same
    u, gradients = random_inputs(four, 0, embeddings.shape[1])
    width = pair.ids.shape[1]
    alone = apply(name, pair, u[::3, :width], 0.7, table, embeddings, gradients[::3, :width])
    among = apply(name, four, u, 0.7, table, embeddings, gradients)
    assert torch.equal(among[::3, :width], alone)


def test_the_share_of_changed_slots_is_the_degree(word_tokenizer, table):
    corpus = tokenize_corpus([(" ".join(FILM),)] * 400, word_tokenizer, 16, table)
    u = torch.from_numpy(np.random.default_rng(0).random((*corpus.ids.shape, 2), dtype=np.float32))
    new = operators.knn_tokens(corpus.ids, corpus.slots, u, 0.3, table)
    assert float((new != corpus.ids).sum() / (corpus.slots >= 0).sum()) == pytest.approx(0.3, abs=0.02)


def test_partners_meet_by_rank_within_side_and_kind(word_tokenizer, tokens, table):
    texts = [("the filming, was good", "my movie"), ("screened battery", "signal camera")]
    corpus = tokenize_corpus(texts, word_tokenizer, 32, table)
    ids, slots = corpus.ids, corpus.slots
    aligned = align_partners(ids[:1], slots[:1], ids[1:], slots[1:])
    assert [tokens[i] for i in aligned[0]] == [
        "[CLS]", "screen", "battery", "##ed", ",", "screen", "battery", "[SEP]", "signal", "camera", "[SEP]",
    ]  # fmt: skip


def test_a_partner_with_nothing_to_offer_leaves_the_text(word_tokenizer, table):
    corpus = tokenize_corpus([("the film",), ("! 4",)], word_tokenizer, 16, table)
    aligned = align_partners(corpus.ids[:1], corpus.slots[:1], corpus.ids[1:], corpus.slots[1:])
    assert torch.equal(aligned, corpus.ids[:1])
