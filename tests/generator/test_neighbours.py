import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import l2a.generator.tokens as neighbours
from l2a.generator.tokens import build_neighbour_table, find_neighbours, token_kinds
from l2a.util.errors import UsageError


def test_only_pieces_of_two_letters_or_more_may_change():
    tokens = ["[CLS]", "[unused3]", "film", "##ing", "##s", "a", "10", "!", "don't", "für", "##"]
    word_start, allowed = token_kinds(tokens)
    assert [tokens[i] for i in allowed.nonzero()] == ["film", "##ing", "für"]
    assert [tokens[i] for i in (~word_start).nonzero()] == ["##ing", "##s", "##"]


@pytest.mark.parametrize("token", ["\u0120film", "\u2581film"])
def test_other_vocabularies_are_refused(token):
    with pytest.raises(UsageError, match="not WordPiece"):
        token_kinds(["[CLS]", token])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(2, 40), k=st.integers(1, 6))
def test_neighbours_are_the_nearest_compatible_tokens(seed, size, k):
    rng = np.random.default_rng(seed)
    embeddings = torch.from_numpy(rng.normal(size=(size, 5)).astype(np.float32))
    word_start, allowed = (torch.from_numpy(rng.random(size) < share) for share in (0.6, 0.7))
    ids = find_neighbours(embeddings, word_start, allowed, k)
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
    everything = torch.ones(51, dtype=torch.bool)
    ids = find_neighbours(embeddings, everything, everything, k=3)
    raw = torch.cdist(trained, embeddings).topk(4, largest=False).indices
    assert (raw == 50).any(dim=1).float().mean() > 0.9
    assert (ids[:50] == 50).any(dim=1).float().mean() < 0.3


def test_a_matrix_is_searched_once(tokens, embeddings, monkeypatch):
    first = build_neighbour_table(embeddings, tokens, k=4)
    monkeypatch.setattr(neighbours, "find_neighbours", lambda *_: pytest.fail("searched again"))
    second = build_neighbour_table(embeddings, tokens, k=4)
    assert torch.equal(first.ids, second.ids)
    monkeypatch.undo()
    assert not torch.equal(first.ids, build_neighbour_table(embeddings.flip(0), tokens, k=4).ids)
    assert not second.allowed[tokens.index("[unused1]")] and second.allowed[tokens.index("film")]


def test_the_size_of_a_block_changes_no_neighbour(embeddings, table, monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", 5)
    assert torch.equal(find_neighbours(embeddings, table.word_start, table.allowed, k=4), table.ids)


def test_a_token_that_is_the_only_one_of_its_kind_stays():
    words = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    names = ["film", "movie", "##ing"]
    assert build_neighbour_table(words, names, k=1).allowed.tolist() == [True, True, False]
    assert build_neighbour_table(words, names, k=0).ids.shape == (3, 0)
