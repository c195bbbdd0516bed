"""Mixtures, sets whose texts in use are chosen again as the student learns, and tables of the tokens that occur."""

import copy
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from l2a.data.encoding import EncodedTexts, encode
from l2a.generator.tokens import token_kinds, vocabulary
from l2a.kd import data as kd_data
from l2a.kd.losses import soft_label_loss
from l2a.teacher.labelling import TeacherOutputs, run_teacher
from l2a.util import RunError
from l2a.util.training import adamw
from tests.conftest import make_examples

from .test_trainer import CONFIG, make_set, make_trainer


def cycles_of(sizes, rng):
    return [kd_data.cycle(part, rng) for part in np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=4).filter(any), st.integers(1, 12), st.integers(1, 40))
def test_every_step_gives_a_whole_batch_of_existing_texts(sizes, batch_size, steps):
    lengths, rng = np.arange(sum(sizes)) % 7 + 1, np.random.default_rng(0)
    shares = [1.0 if size else 0.0 for size in sizes]
    batches = list(kd_data.mixture_batches(cycles_of(sizes, rng), shares, lengths, batch_size, steps, rng))
    assert [len(batch) for batch in batches] == [batch_size] * steps
    assert all(0 <= i < sum(sizes) for batch in batches for i in batch)


def test_shares_hold_over_the_run_and_a_small_set_repeats_evenly():
    rng = np.random.default_rng(0)
    batches = kd_data.mixture_batches(cycles_of([4, 1000], rng), [0.25, 0.75], np.ones(1004), 32, 64, rng)
    counts = np.bincount(np.concatenate(list(batches)), minlength=1004)
    assert counts[:4].sum() == pytest.approx(0.25 * 32 * 64, abs=2)
    assert np.ptp(counts[:4]) <= 1


def test_joining_and_taking_keep_texts_with_their_labels(student):
    second = make_set(student, 7, seed=1)
    back = kd_data.join([make_set(student, 5), second]).take(np.arange(5, 12))
    assert (back.labels == second.labels).all()
    assert (back.encoded.ids == second.encoded.ids).all()
    assert (back.teacher.logits == second.teacher.logits).all()
    assert (back.encoded.padded(np.array([3]))["input_ids"] == second.encoded.padded(np.array([3]))["input_ids"]).all()


def test_constant_teacher_labels_are_refused(student):
    data = make_set(student, 6)
    constant = replace(data, teacher=TeacherOutputs(np.ones((6, 2), np.float32), data.teacher.embeddings))
    with pytest.raises(RunError, match="same probabilities"):
        kd_data.refuse_constant_targets(constant.take(np.arange(2)))
    kd_data.refuse_constant_targets(constant.take(np.arange(1)))
    kd_data.refuse_constant_targets(data)


VOCABULARY = 40


class TableOnly:
    """A stand-in for a student: an embedding table, its optimiser and what the context asks of it."""

    def __init__(self) -> None:
        self.layer = nn.Embedding(VOCABULARY, 3, padding_idx=0)
        nn.init.normal_(self.layer.weight, generator=torch.Generator().manual_seed(0))
        self.model, self.optimizer = self, adamw([([self.layer.weight], 1e-2)], weight_decay=0.0)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.layer

    def descend(self, ids: list[int]) -> None:
        for _ in range(3):
            self.optimizer.zero_grad()
            self.layer(torch.tensor(ids)).pow(2).sum().backward()
            self.optimizer.step()


def encoded_of(ids: list[int]) -> EncodedTexts:
    return EncodedTexts(np.array(ids, np.int32), np.zeros(len(ids), np.int8), np.array([0, len(ids)]), 0)


def train_table(rounds: list[list[int]], compact: bool = True) -> TableOnly:
    table = TableOnly()
    for ids in rounds:
        with kd_data.compact_embeddings(table, table.optimizer, [encoded_of(ids)]) if compact else nullcontext():
            table.descend(ids)
    return table


tokens = st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=12)


@given(ids=tokens)
def test_training_the_occurring_rows_is_training_the_whole_table(ids):
    dense, compact = (train_table([ids, ids], compact=compact).layer.weight for compact in (False, True))
    torch.testing.assert_close(dense, compact)


@given(first=tokens, second=tokens)
def test_rows_that_do_not_occur_keep_their_values_to_the_bit(first, second):
    start, end = TableOnly().layer.weight, train_table([first, second]).layer.weight
    absent = sorted(set(range(VOCABULARY)) - set(first) - set(second))
    assert torch.equal(start[absent], end[absent])
    assert not torch.equal(start[first], end[first])


def test_table_padding_and_moments_return_to_their_places():
    table = train_table([[3, 5], [5, 7]])
    weight = table.layer.weight
    assert weight.shape == (VOCABULARY, 3) and table.layer.padding_idx == 0
    assert table.optimizer.param_groups[0]["params"] == [weight]
    moments = table.optimizer.state[weight]["exp_avg"]
    assert moments.shape == weight.shape
    assert set(moments.abs().sum(1).nonzero().flatten().tolist()) == {3, 5, 7}


def test_the_table_returns_after_a_failure():
    table = TableOnly()
    with pytest.raises(KeyboardInterrupt), kd_data.compact_embeddings(table, table.optimizer, [encoded_of([4])]):
        raise KeyboardInterrupt
    assert table.layer.weight.shape == (VOCABULARY, 3)


@given(ids=tokens, pad=st.integers(0, 5))
def test_texts_and_their_padding_read_the_same_rows_and_the_whole_table_can_be_had(ids, pad):
    table, full = TableOnly(), TableOnly().layer.weight
    with kd_data.compact_embeddings(table, table.optimizer, [replace(encoded_of(ids), pad_id=pad)]) as whole:
        assert torch.equal(table.layer(torch.tensor([*ids, pad])), full[[*ids, pad]])
        table.descend(ids)
        changed = (whole() != full).any(1).nonzero().flatten().tolist()
        assert len(table.layer.weight) == len({0, *ids, pad}) and set(changed) == set(ids)


def texts(count, seed):
    return make_examples(count, seed).inputs


def test_a_weight_of_one_or_zero_gives_one_of_the_two_texts_in_a_mix_as_long_as_the_longer(teacher):
    first, second = texts(6, 0), texts(6, 1)
    pairs, six = encode(teacher.tokenizer, (*first, *second), 32), np.arange(6)
    for weight, alone in ((1.0, first), (0.0, second)):
        batch = kd_data.mix_pairs(teacher.encoder, pairs, six, six + 6, np.full(6, weight, np.float32))
        assert batch["attention_mask"].sum(1).tolist() == np.maximum(pairs.lengths[:6], pairs.lengths[6:]).tolist()
        encoded = encode(teacher.tokenizer, alone, 32)
        plain = teacher.encoder.get_input_embeddings()(encoded.padded(six)["input_ids"])
        for row, length in enumerate(encoded.lengths):
            assert torch.allclose(batch["inputs_embeds"][row, :length], plain[row, :length], atol=1e-6)


def test_mixing_a_text_with_itself_gives_the_teachers_plain_outputs(teacher):
    inputs, weights = texts(9, 0), np.random.default_rng(0).random(9).astype(np.float32)
    mixed = kd_data.mixed_outputs(teacher, encode(teacher.tokenizer, (*inputs, *inputs), 32), weights)
    plain = run_teacher(teacher, encode(teacher.tokenizer, inputs, 32))
    assert mixed.logits == pytest.approx(plain.logits, abs=5e-3)
    assert mixed.embeddings == pytest.approx(plain.embeddings, abs=5e-3)


def test_only_the_augmented_examples_are_mixed_and_gradients_reach_the_embeddings(student):
    data = kd_data.join([make_set(student, 5), make_set(student, 4, 1), make_set(student, 4, 2)])
    indices, table = np.array([0, 6, 3]), student.model.get_input_embeddings()
    batch, taught = kd_data.read_mixed(student, data, indices, start=5, partners=9, weights=np.full(4, 0.5, "f4"))
    expected, _ = kd_data.read_tokens(student, data, indices)
    plain = table(expected["input_ids"])
    for row, is_same in enumerate([True, False, True]):
        length = int(expected["attention_mask"][row].sum())
        assert torch.allclose(batch["inputs_embeds"][row, :length], plain[row, :length], atol=1e-6) == is_same
    assert np.array_equal(taught.logits, data.teacher.logits[indices])
    batch["inputs_embeds"].sum().backward()
    assert table.weight.grad is not None and table.weight.grad.abs().sum() > 0


def perturbed(teacher, bases, teacher_step=0.007, student_step=0.007):
    may_move, texts = token_kinds(vocabulary(teacher.tokenizer))[1], encode(teacher.tokenizer, bases, 32)
    steps = {"teacher_steps": may_move * teacher_step, "student_steps": may_move * student_step}
    return partial(kd_data.read_perturbed, start=5, teacher=teacher, texts=texts, **steps)


def test_each_step_raises_the_divergence_and_spares_special_tokens(student, teacher):
    data, indices = kd_data.join([make_set(student, 5), make_set(student, 8, 1)]), np.array([0, *range(5, 13)])
    student.model.eval()
    (clean, _), divergences = kd_data.read_tokens(student, data, indices), []
    for steps in ((0.0, 0.0), (0.0125, 0.0), (0.0, 0.07)):
        batch, taught = perturbed(teacher, texts(8, 1), *steps)(student, data, indices)
        with torch.no_grad():
            logits, _ = student(batch)
        divergences.append(float(soft_label_loss(logits[1:], torch.from_numpy(taught.logits[1:]), 1.0).mean()))
    assert min(divergences[1:]) > divergences[0]
    moved = (batch["inputs_embeds"] - student.model.get_input_embeddings()(clean["input_ids"])).abs().amax(2)
    special = torch.isin(clean["input_ids"], torch.tensor(student.tokenizer.all_special_ids))
    assert moved[special].max() < 1e-6 and moved[0].max() < 1e-6
    assert float(moved[~special].detach().max()) == pytest.approx(0.07, rel=1e-3)
    assert np.array_equal(taught.logits[0], data.teacher.logits[0])
    batch, _ = perturbed(teacher, texts(8, 1))(student, data, np.array([0, 4]))
    assert "input_ids" in batch, "a batch without augmented examples is read plainly"


@pytest.mark.parametrize(("kind", "rate"), [("mixed", 0.0), ("perturbed", 1.0)])
def test_students_train_on_augmented_embeddings_and_repeat(teacher, built_student, kind, rate):
    scores = []
    for _ in range(2):
        student = copy.deepcopy(built_student)
        trainer = make_trainer(student, replace(CONFIG, embedding_rate=rate))
        sets = [make_set(student, 5), make_set(student, 8, 1), make_set(student, 8, 2)]
        mixed = partial(kd_data.read_mixed, start=5, partners=13, weights=np.linspace(0, 1, 8, dtype="f4"))
        trainer.read_batch = mixed if kind == "mixed" else perturbed(teacher, texts(8, 1))
        trainer.train(sets, [0.5, 0.5, 0.0], 5)
        scores.append(trainer.best.log_likelihood)
    assert trainer.steps_done == 5 and np.isfinite(scores[0])
    assert scores[0] == scores[1]


def test_the_step_is_as_long_as_the_way_to_the_nearest_word(monkeypatch):
    monkeypatch.setattr(kd_data, "vocabulary", lambda _: ("[CLS]", "film", "movie", "##ing", "phone"))
    embeddings = torch.tensor([0.0, 1, 2, 4, 7])[:, None].repeat(1, 4)  # neighbours are 2, 2, 4 and 6 apart
    model = SimpleNamespace(tokenizer=None, word_embeddings=lambda: embeddings)
    assert kd_data.token_steps(model, np.random.default_rng(0)).tolist() == [0, 1, 1, 1, 1]
