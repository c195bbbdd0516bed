from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from l2a.data.encoding import EncodedTexts
from l2a.kd.data import compact_embeddings
from l2a.util.training import adamw

VOCABULARY = 40


class TableOnly:
    """A stand-in for a student: an embedding table and what the context asks of it."""

    def __init__(self) -> None:
        self.layer = nn.Embedding(VOCABULARY, 3, padding_idx=0)
        nn.init.normal_(self.layer.weight, generator=torch.Generator().manual_seed(0))
        self.model = self

    def get_input_embeddings(self) -> nn.Embedding:
        return self.layer


def encoded_of(ids: list[int]) -> EncodedTexts:
    return EncodedTexts(np.array(ids, np.int32), np.zeros(len(ids), np.int8), np.array([0, len(ids)]), 0)


def descend(table: TableOnly, optimizer: torch.optim.Optimizer, ids: list[int], steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        table.layer(torch.tensor(ids)).pow(2).sum().backward()
        optimizer.step()


def train(rounds: list[list[int]], compact: bool) -> tuple[torch.Tensor, torch.optim.Optimizer, TableOnly]:
    table = TableOnly()
    optimizer = adamw([([table.layer.weight], 1e-2)], weight_decay=0.0)
    for ids in rounds:
        if compact:
            with compact_embeddings(table, optimizer, [encoded_of(ids)]) as (texts, *_):
                descend(table, optimizer, texts[0].ids.tolist(), 3)
        else:
            descend(table, optimizer, ids, 3)
    return table.layer.weight.detach(), optimizer, table


tokens = st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=12)


@given(ids=tokens)
@settings(max_examples=25, deadline=None)
def test_training_the_occurring_rows_is_training_the_whole_table(ids):
    dense, *_ = train([ids, ids], compact=False)
    compact, *_ = train([ids, ids], compact=True)
    torch.testing.assert_close(dense, compact)


@given(first=tokens, second=tokens)
@settings(max_examples=25, deadline=None)
def test_rows_that_do_not_occur_keep_their_values_to_the_bit(first, second):
    start = TableOnly().layer.weight.detach()
    end, *_ = train([first, second], compact=True)
    absent = sorted(set(range(VOCABULARY)) - set(first) - set(second))
    assert torch.equal(start[absent], end[absent])
    assert not torch.equal(start[first], end[first])


def test_table_padding_and_moments_return_to_their_places():
    end, optimizer, table = train([[3, 5], [5, 7]], compact=True)
    weight = table.layer.weight
    assert end.shape == (VOCABULARY, 3)
    assert table.layer.padding_idx == 0
    assert optimizer.param_groups[0]["params"] == [weight]
    moments = optimizer.state[weight]["exp_avg"]
    assert moments.shape == weight.shape
    assert set(moments.abs().sum(1).nonzero().flatten().tolist()) == {3, 5, 7}


def test_the_table_returns_after_a_failure():
    table = TableOnly()
    optimizer = adamw([([table.layer.weight], 1e-2)])
    with pytest.raises(KeyboardInterrupt), compact_embeddings(table, optimizer, [encoded_of([4])]):
        raise KeyboardInterrupt
    assert table.layer.weight.shape == (VOCABULARY, 3)


@given(ids=tokens, pad=st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_renumbered_texts_read_the_same_rows_and_the_padding_keeps_its_number(ids, pad):
    table, encoded = TableOnly(), replace(encoded_of(ids), pad_id=pad)
    with compact_embeddings(table, adamw([([table.layer.weight], 1e-2)]), [encoded]) as ((renumbered,), rows, full):
        assert torch.equal(table.layer.weight[renumbered.ids], full[ids])
        assert rows[renumbered.ids].tolist() == ids
        assert renumbered.pad_id == rows[renumbered.pad_id] == pad
