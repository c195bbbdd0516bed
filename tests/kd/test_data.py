"""Mixtures, sets whose texts in use are chosen again as the student learns, and tables of the tokens that occur."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from l2a.data.encoding import EncodedTexts, encode
from l2a.kd.data import (
    DistillationSet,
    Renewal,
    compact_embeddings,
    cycle,
    join,
    mixture_batches,
    refuse_constant_targets,
)
from l2a.kd.trainer import run_student
from l2a.teacher.labelling import TeacherOutputs
from l2a.util.errors import RunError
from l2a.util.progress import Progress
from l2a.util.training import adamw
from tests.kd.test_trainer import make_set, make_trainer


def weights_after(student, train):
    start = student.snapshot()
    train(make_trainer(student))
    after = student.snapshot()
    student.restore(start)
    return after


def test_a_renewal_that_never_comes_and_keeps_all_changes_nothing(student):
    known, pool = make_set(student, 24), make_set(student, 16, seed=3)
    never = Renewal(pool, np.arange(16), 20, lambda logits: pytest.fail("it was not time"))
    plain = weights_after(student, lambda trainer: trainer.train([known, pool], [0.5, 0.5], 12))
    renewed = weights_after(student, lambda trainer: trainer.train([known, pool], [0.5, 0.5], 12, renewal=never))
    assert all(torch.equal(plain[name], renewed[name]) for name in plain)


def test_only_texts_in_use_are_learnt_from(student, monkeypatch):
    known, pool = make_set(student, 24), make_set(student, 16, seed=3)
    trainer, batches = make_trainer(student), []
    step = type(trainer)._step
    monkeypatch.setattr(type(trainer), "_step", lambda self, data, i: batches.append(set(i)) or step(self, data, i))
    chosen = iter([np.array([4, 5]), np.array([9])])
    renewal = Renewal(pool, np.array([0, 1, 2]), 5, lambda logits: next(chosen))
    trainer.train([known, pool], [0.5, 0.5], 12, renewal=renewal)
    in_use = [set().union(*batches[start : start + 5]) - set(range(24)) for start in (0, 5, 10)]
    assert in_use == [{24, 25, 26}, {28, 29}, {33}]
    assert len(batches) == trainer.steps_done == 12


def test_the_choice_sees_the_student_as_it_is_now(student, monkeypatch):
    known, pool = make_set(student, 24), make_set(student, 16, seed=3)
    trainer, seen = make_trainer(student), []

    def choose(logits):
        seen.append(logits)
        monkeypatch.setattr(type(trainer), "_step", lambda *_: setattr(trainer, "steps_done", trainer.steps_done + 1))
        return np.arange(16)

    trainer.train([known, pool], [0.5, 0.5], 8, renewal=Renewal(pool, np.arange(4), 4, choose))
    logits, _ = run_student(student, pool.encoded)  # no update came after the choice
    np.testing.assert_allclose(seen[0], logits, atol=1e-5)


def test_looks_at_the_choice_split_do_not_grow_in_number(student, tmp_path):
    known, pool = make_set(student, 24), make_set(student, 16, seed=3)

    def looks(name, renewal):
        with Progress(tmp_path / name, -1) as progress:
            weights_after(student, lambda t: t.train([known, pool], [0.5, 0.5], 20, progress, renewal=renewal))
        return (tmp_path / name).read_text().count("validation")

    often = Renewal(pool, np.arange(8), 3, lambda logits: np.arange(8))
    assert looks("often", often) == looks("never", None) == 4


def test_the_other_sets_go_on_where_they_were(student, monkeypatch):
    known, pool = make_set(student, 96), make_set(student, 16, seed=3)
    trainer, batches = make_trainer(student), []
    step = type(trainer)._step
    monkeypatch.setattr(type(trainer), "_step", lambda self, data, i: batches.append(i) or step(self, data, i))
    renewal = Renewal(pool, np.arange(8), 2, lambda logits: np.arange(8))
    trainer.train([known, pool], [0.5, 0.5], 12, renewal=renewal)
    seen = np.bincount(np.concatenate(batches), minlength=112)
    assert np.ptp(seen[:96]) <= 1, "a text came again before all had come"
    assert np.ptp(seen[96:104]) <= 1, "of those in use, the ones used least come first"


def make_random_set(tokenizer, count: int, seed: int = 0) -> DistillationSet:
    rng = np.random.default_rng(seed)
    encoded = encode(tokenizer, [("good " * int(n),) for n in rng.integers(1, 9, count)], 16)
    outputs = TeacherOutputs(
        rng.normal(size=(count, 2)).astype(np.float32), rng.normal(size=(count, 4)).astype(np.float32)
    )
    return DistillationSet(encoded, outputs, rng.integers(0, 2, count))


def cycles_of(sizes, rng):
    parts = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    return [cycle(part, rng) for part in parts]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=4).filter(any), st.integers(1, 12), st.integers(1, 40))
def test_every_step_gives_a_whole_batch_of_existing_texts(sizes, batch_size, steps):
    lengths, rng = np.arange(sum(sizes)) % 7 + 1, np.random.default_rng(0)
    shares = [1.0 if size else 0.0 for size in sizes]
    batches = list(mixture_batches(cycles_of(sizes, rng), shares, lengths, batch_size, steps, rng))
    assert len(batches) == steps
    assert all(len(batch) == batch_size for batch in batches)
    assert all(0 <= i < sum(sizes) for batch in batches for i in batch)


def test_shares_hold_over_the_run_and_a_small_set_repeats_evenly():
    rng = np.random.default_rng(0)
    batches = mixture_batches(cycles_of([4, 1000], rng), [0.25, 0.75], np.ones(1004), 32, 64, rng)
    counts = np.bincount(np.concatenate(list(batches)), minlength=1004)
    assert counts[:4].sum() == pytest.approx(0.25 * 32 * 64, abs=2)
    assert np.ptp(counts[:4]) <= 1


def test_joining_and_taking_keep_texts_with_their_labels(tokenizer):
    first, second = make_random_set(tokenizer, 5, 0), make_random_set(tokenizer, 7, 1)
    both = join([first, second])
    back = both.take(np.arange(5, 12))
    assert (back.labels == second.labels).all()
    assert (back.encoded.ids == second.encoded.ids).all()
    assert (back.teacher.logits == second.teacher.logits).all()
    assert (back.encoded.padded(np.array([3]))["input_ids"] == second.encoded.padded(np.array([3]))["input_ids"]).all()


def test_constant_teacher_labels_are_refused(tokenizer):
    data = make_random_set(tokenizer, 6)
    constant = replace(data, teacher=TeacherOutputs(np.ones((6, 2), np.float32), data.teacher.embeddings))
    with pytest.raises(RunError, match="same probabilities"):
        refuse_constant_targets(constant.take(np.arange(2)))
    refuse_constant_targets(constant.take(np.arange(1)))
    refuse_constant_targets(data)


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


def train_table(rounds: list[list[int]], compact: bool) -> tuple[torch.Tensor, torch.optim.Optimizer, TableOnly]:
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
    dense, *_ = train_table([ids, ids], compact=False)
    compact, *_ = train_table([ids, ids], compact=True)
    torch.testing.assert_close(dense, compact)


@given(first=tokens, second=tokens)
@settings(max_examples=25, deadline=None)
def test_rows_that_do_not_occur_keep_their_values_to_the_bit(first, second):
    start = TableOnly().layer.weight.detach()
    end, *_ = train_table([first, second], compact=True)
    absent = sorted(set(range(VOCABULARY)) - set(first) - set(second))
    assert torch.equal(start[absent], end[absent])
    assert not torch.equal(start[first], end[first])


def test_table_padding_and_moments_return_to_their_places():
    end, optimizer, table = train_table([[3, 5], [5, 7]], compact=True)
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
