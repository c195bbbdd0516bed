"""Attention transfer: the student learns to look where its teacher looks."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from l2a.config import KDConfig, StudentConfig
from l2a.data.encoding import encode
from l2a.kd.attention import AttentionTransfer
from l2a.kd.data import DistillationSet
from l2a.kd.embedding_space import MixedBatches
from l2a.kd.inference import run_student
from l2a.kd.trainer import KDTrainer
from l2a.student.presets import build_student
from l2a.student.student import Student
from l2a.teacher.labelling import predict
from l2a.teacher.model import Teacher
from l2a.util.errors import UsageError
from tests.conftest import LABELS, make_examples

CONFIG = KDConfig(attention_weight=50.0, warmup_steps=60, round_steps=1, rounds=1, batch_size=8, learning_rate=3e-3)
EXAMPLES = make_examples(48)


@pytest.fixture
def watchful(teacher: Teacher) -> Teacher:
    """A teacher whose last layer looks at few tokens, as trained ones do."""
    with torch.no_grad():
        for part in ("query", "key"):
            getattr(teacher.encoder.encoder.layer[-1].attention.self, part).weight.mul_(12)
    return teacher.eval()


def make_student(teacher: Teacher, preset: str = "narrow") -> Student:
    return build_student(StudentConfig(preset=preset, max_share=0.9), teacher, LABELS, (), seed=0)


def make_set(student: Student, teacher: Teacher) -> DistillationSet:
    return DistillationSet(
        encode(student.tokenizer, EXAMPLES.inputs, 16), predict(teacher, EXAMPLES.inputs, 16), EXAMPLES.labels
    )


def make_trainer(student: Student, teacher: Teacher, config: KDConfig = CONFIG) -> KDTrainer:
    trainer = KDTrainer(student, config, make_examples(16, seed=5), teacher.hidden_size, 16, seed=0)
    if config.attention_weight:
        trainer.learn_attention(teacher)
    return trainer


def distance(student: Student, teacher: Teacher) -> float:
    """The attention term of all examples, in eval mode."""
    transfer, batch = AttentionTransfer(student, teacher), encode(student.tokenizer, EXAMPLES.inputs, 16)
    padded = batch.padded(np.arange(len(batch)))
    with transfer.watching(), torch.no_grad():
        student(padded)
    return transfer.loss(padded, None).item()


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["narrow"])
def test_the_student_comes_to_look_where_its_teacher_looks(watchful, preset):
    ends = {}
    for weight in (0.0, 50.0):
        student = make_student(watchful, preset)
        before = distance(student, watchful)
        config = dataclasses.replace(CONFIG, attention_weight=weight)
        make_trainer(student, watchful, config).train([make_set(student, watchful)], [1.0], 60)
        ends[weight] = distance(student, watchful) / before
    assert ends[50.0] < min(0.75, 0.8 * ends[0.0])


def test_the_teacher_reads_its_own_tokens_whichever_rows_are_trained(watchful, monkeypatch):
    seen, loss = [], AttentionTransfer.loss

    def spy(transfer, *arguments):
        seen.append(loss(transfer, *arguments).item())
        return loss(transfer, *arguments)

    monkeypatch.setattr(AttentionTransfer, "loss", spy)
    for rate in (0.0, 1.0):
        student = make_student(watchful)
        config = dataclasses.replace(CONFIG, embedding_rate=rate)
        make_trainer(student, watchful, config).train([make_set(student, watchful)], [1.0], 1)
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)


def test_training_leaves_the_models_as_fast_as_they_came(watchful):
    student, kernels = make_student(watchful), []
    data, known = make_set(student, watchful), watchful.fingerprint()
    for model in (student.model, watchful.encoder):
        kernels.append(model.config._attn_implementation)
    make_trainer(student, watchful).train([data], [1.0], 2)
    assert [model.config._attn_implementation for model in (student.model, watchful.encoder)] == kernels
    assert kernels == ["sdpa", "sdpa"]
    assert not student.model._forward_hooks and not student.model._forward_pre_hooks
    assert watchful.fingerprint() == known
    assert np.isfinite(run_student(student, data.encoded)[0]).all()


def test_other_tokens_are_refused(watchful):
    student = make_student(watchful)
    student.tokenizer = copy.deepcopy(student.tokenizer)
    student.tokenizer.add_tokens(["motorcycle"])
    with pytest.raises(UsageError, match=r"kd\.attention_weight: .* different vocabularies; set it to 0"):
        make_trainer(student, watchful)


def test_a_batch_without_tokens_is_refused(watchful):
    student = make_student(watchful)
    data, trainer = make_set(student, watchful), make_trainer(student, watchful)
    trainer.read_batch = MixedBatches(0, 0, np.full(len(data), 0.5, np.float32))
    with pytest.raises(UsageError, match=r"kd\.attention_weight: mixkd"):
        trainer.train([data], [1.0], 1)


def test_a_negative_weight_is_refused():
    with pytest.raises(UsageError, match=r"kd\.attention_weight: -1"):
        KDConfig(attention_weight=-1)
