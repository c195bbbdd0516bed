import copy

import numpy as np
import pytest
import torch

from l2a.data.encoding import encode
from l2a.generator.tokens import vocabulary
from l2a.kd.data import (
    MixedBatches,
    PerturbedBatches,
    join,
    median_neighbour_distance,
    mix_pairs,
    mixed_outputs,
    open_tokens,
    read_tokens,
)
from l2a.kd.losses import soft_label_loss
from l2a.teacher.labelling import run_teacher
from tests.conftest import make_examples

from .test_trainer import CONFIG, make_set, make_trainer


def texts(count, seed):
    return make_examples(count, seed).inputs


def test_a_weight_of_one_or_zero_gives_one_of_the_two_texts(teacher):
    first, second = texts(6, 0), texts(6, 1)
    pairs = encode(teacher.tokenizer, (*first, *second), 32)
    for weight, alone in ((1.0, first), (0.0, second)):
        batch = mix_pairs(teacher.encoder, pairs, np.arange(6), np.arange(6, 12), np.full(6, weight, np.float32))
        encoded = encode(teacher.tokenizer, alone, 32)
        plain = teacher.encoder.get_input_embeddings()(encoded.padded(np.arange(6))["input_ids"])
        for row, length in enumerate(encoded.lengths):
            assert torch.allclose(batch["inputs_embeds"][row, :length], plain[row, :length], atol=1e-6)


def test_mixing_a_text_with_itself_gives_the_teachers_plain_outputs(teacher):
    inputs = texts(9, 0)
    weights = np.random.default_rng(0).random(9).astype(np.float32)
    mixed = mixed_outputs(teacher, encode(teacher.tokenizer, (*inputs, *inputs), 32), weights)
    plain = run_teacher(teacher, encode(teacher.tokenizer, inputs, 32))
    assert mixed.logits == pytest.approx(plain.logits, abs=5e-3)
    assert mixed.embeddings == pytest.approx(plain.embeddings, abs=5e-3)


def test_a_mix_covers_the_longer_text(teacher):
    pairs = encode(teacher.tokenizer, (("film",), ("the film was very good and the story is fine",)), 32)
    batch = mix_pairs(teacher.encoder, pairs, np.array([0]), np.array([1]), np.array([0.5], np.float32))
    assert int(batch["attention_mask"].sum()) == pairs.lengths.max()


def test_only_the_augmented_examples_are_mixed_and_gradients_reach_the_embeddings(student):
    plain, bases, partners = make_set(student, 5), make_set(student, 4, 1), make_set(student, 4, 2)
    data = join([plain, bases, partners])
    reader = MixedBatches(5, 9, np.full(4, 0.5, np.float32))
    indices = np.array([0, 6, 3])
    batch, taught = reader(student, data, indices)
    expected, _ = read_tokens(student, data, indices)
    table = student.model.get_input_embeddings()
    plain_embeds = table(expected["input_ids"])
    width = plain_embeds.shape[1]
    for row, is_same in enumerate([True, False, True]):
        length = int(expected["attention_mask"][row].sum())
        same = torch.allclose(batch["inputs_embeds"][row, :length], plain_embeds[row, :length], atol=1e-6)
        assert same == is_same and length <= width
    assert np.array_equal(taught.logits, data.teacher.logits[indices])
    batch["inputs_embeds"].sum().backward()
    assert table.weight.grad is not None and table.weight.grad.abs().sum() > 0


def perturbed(teacher, student, bases, teacher_step=0.05, student_step=0.05):
    encoded = encode(teacher.tokenizer, bases, 32)
    words = vocabulary(teacher.tokenizer)
    mine = open_tokens(encode(student.tokenizer, bases, 16), vocabulary(student.tokenizer))
    return PerturbedBatches(5, teacher, encoded, open_tokens(encoded, words), mine, teacher_step, student_step)


def test_each_step_raises_the_divergence_and_spares_special_tokens(student, teacher):
    bases = texts(8, 1)
    data = join([make_set(student, 5), make_set(student, 8, 1)])
    student.model.eval()
    indices = np.array([0, *range(5, 13)])
    clean, _ = read_tokens(student, data, indices)
    divergences = []
    for steps in ((0.0, 0.0), (0.1, 0.0), (0.0, 0.5)):
        batch, taught = perturbed(teacher, student, bases, *steps)(student, data, indices)
        with torch.no_grad():
            logits, _ = student(batch)
        divergences.append(float(soft_label_loss(logits[1:], torch.from_numpy(taught.logits[1:]), 1.0).mean()))
    assert min(divergences[1:]) > divergences[0]
    moved = (batch["inputs_embeds"] - student.model.get_input_embeddings()(clean["input_ids"])).norm(dim=2)
    special = torch.isin(clean["input_ids"], torch.tensor(student.tokenizer.all_special_ids))
    assert moved[special].max() < 1e-6 and moved[0].max() < 1e-6
    assert float(moved[~special].detach().max()) == pytest.approx(0.5, rel=1e-3)
    assert np.array_equal(taught.logits[0], data.teacher.logits[0])


def test_a_batch_without_augmented_examples_is_read_plainly(student, teacher):
    data = join([make_set(student, 5), make_set(student, 8, 1)])
    batch, _ = perturbed(teacher, student, texts(8, 1))(student, data, np.array([0, 4]))
    assert "input_ids" in batch


@pytest.mark.parametrize(("kind", "rate"), [("mixed", 0.0), ("perturbed", 1.0)])
def test_students_train_on_augmented_embeddings_and_repeat(teacher, built_student, kind, rate):
    from dataclasses import replace

    scores = []
    for _ in range(2):
        student = copy.deepcopy(built_student)
        trainer = make_trainer(student, replace(CONFIG, embedding_rate=rate))
        sets = [make_set(student, 5), make_set(student, 8, 1), make_set(student, 8, 2)]
        mixed = MixedBatches(5, 13, np.linspace(0, 1, 8, dtype=np.float32))
        trainer.read_batch = mixed if kind == "mixed" else perturbed(teacher, student, texts(8, 1))
        trainer.train(sets, [0.5, 0.5, 0.0], 5)
        scores.append(trainer.best.log_likelihood)
    assert trainer.steps_done == 5 and np.isfinite(scores[0])
    assert scores[0] == scores[1]


def test_the_step_is_as_long_as_the_way_to_the_nearest_word():
    tokens = ("[CLS]", "film", "movie", "##ing", "phone")
    embeddings = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [4.0, 0.0], [7.0, 0.0]])
    distance = median_neighbour_distance(embeddings, tokens, np.random.default_rng(0))
    assert distance == pytest.approx(1.0)
