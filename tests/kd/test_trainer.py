import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from l2a.config import KDConfig
from l2a.data.encoding import encode
from l2a.kd import trainer as kd_trainer
from l2a.kd.data import DistillationSet
from l2a.kd.losses import soft_label_loss
from l2a.kd.trainer import TEMPERATURES, KDTrainer, Score, mean_divergence, run_student
from l2a.student.student import Student
from l2a.teacher.labelling import TeacherOutputs
from l2a.util import Checkpoint, Progress, RunError, UsageError
from tests.conftest import NEGATIVE, POSITIVE, make_examples

CONFIG = KDConfig(warmup_steps=20, rounds=1, round_steps=20, batch_size=8, learning_rate=3e-3, evaluate_every=5)


def make_set(student: Student, count: int, seed: int = 0) -> DistillationSet:
    examples = make_examples(count, seed)
    logits = ((2.0 * examples.labels - 1)[:, None] * [-2.0, 2.0]).astype(np.float32)
    logits += np.random.default_rng(seed).normal(scale=0.3, size=logits.shape).astype(np.float32)
    outputs = TeacherOutputs(logits, np.random.default_rng(1).normal(size=(count, 64)).astype(np.float32))
    return DistillationSet(encode(student.tokenizer, examples.inputs, 16), outputs, examples.labels)


def make_trainer(student: Student, config: KDConfig = CONFIG) -> KDTrainer:
    return KDTrainer(student, config, make_examples(16, seed=5), 64, 16, seed=0)


@pytest.mark.parametrize("count", [1, 31])
def test_few_examples_train(student, count):
    trainer, data = make_trainer(student), make_set(student, count)
    before = student.snapshot()
    trainer.train([data], [1.0], 3)
    assert trainer.steps_done == 3
    assert any(not torch.equal(before[name], value) for name, value in student.snapshot().items())


@pytest.mark.slow
def test_the_student_comes_to_agree_with_its_teacher(student):
    data = make_set(student, 96)
    trainer = make_trainer(student, replace(CONFIG, warmup_steps=60, round_steps=60))
    trainer.train([data], [1.0], 120)
    assert (run_student(student, data.encoded)[0].argmax(1) == data.teacher.logits.argmax(1)).mean() > 0.9


def test_evaluations_leave_the_student_in_training(student, monkeypatch):
    modes, step = [], KDTrainer._step
    monkeypatch.setattr(KDTrainer, "_step", lambda run, *rest: modes.append(student.model.training) or step(run, *rest))
    make_trainer(student, replace(CONFIG, evaluate_every=1)).train([make_set(student, 16)], [1.0], 3)
    assert modes == [True, True, True] and not student.model.training


def test_trials_neither_score_nor_copy_the_student(student, monkeypatch):
    monkeypatch.setattr(KDTrainer, "evaluate", lambda self: pytest.fail("scored"))
    monkeypatch.setattr(KDTrainer, "_keep", lambda self: pytest.fail("copied"))
    trainer = make_trainer(student, replace(CONFIG, evaluate_every=1))
    trainer.train([make_set(student, 8)], [1.0], 2, evaluate=False)


class Told(Progress):
    """A progress that remembers events and keeps states in a folder."""

    def __init__(self, folder):
        super().__init__(verbosity=-1)
        self.checkpoint, self.events = Checkpoint(folder, {}), []

    def event(self, name, **values):
        self.events += [values] if name == "validation" else []


@pytest.mark.parametrize(
    ("killed_at", "embedding_rate", "first_is_best"), [(9, 0, False), (21, 1, False), (16, 0, True)]
)
def test_a_killed_training_goes_on_to_the_same_student(
    built_student, tmp_path, monkeypatch, saved_after_every_step, killed_at, embedding_rate, first_is_best
):
    if first_is_best:
        monkeypatch.setattr(KDTrainer, "_divergence", lambda trainer: float(trainer.steps_done))
        monkeypatch.setattr(KDTrainer, "_log_likelihoods", lambda trainer: np.zeros(4))
    config = replace(CONFIG, warmup_steps=8, round_steps=14, embedding_rate=embedding_rate)
    steps, real = [], KDTrainer._step

    def step(trainer, *batch):
        steps.append(trainer.steps_done)
        if len(steps) == 22 + killed_at + 1:  # the whole training takes the first 22
            raise KeyboardInterrupt
        real(trainer, *batch)

    def run(folder):
        student = copy.deepcopy(built_student)
        student.model.dropout = nn.Dropout(0.3)
        trainer, told = make_trainer(student, config), Told(folder)
        trainer.follow(make_set(student, 8, seed=3))
        sets, shares = [make_set(student, 12, seed=1), make_set(student, 16, seed=2)], [0.5, 0.5]
        trainer.train(sets, shares, config.warmup_steps, told)
        trainer.train(sets, shares, config.round_steps, told)
        trainer.restore_best()
        return student.snapshot(), told.events, trainer._rng.bit_generator.state

    monkeypatch.setattr(KDTrainer, "_step", step)
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed")
    again = run(tmp_path / "killed")
    assert steps == [*range(22), *range(killed_at + 1), *range(killed_at, 22)], "a step is lost or taken twice"
    assert all(torch.equal(again[0][name], value) for name, value in whole[0].items())
    assert again[1:] == whole[1:]


def test_only_the_same_training_continues_from_what_a_killed_one_kept(student):
    data, key = make_set(student, 8), make_trainer(student)._key(make_set(student, 8))
    assert make_trainer(student)._key(data) == key != make_trainer(student)._key(make_set(student, 9))
    config, reader = replace(CONFIG, batch_size=4), print  # any callable that is no function of Python
    for name, value in (("_seed", 1), ("steps_done", 5), ("read_batch", reader), ("config", config)):
        other = make_trainer(student)
        setattr(other, name, value)
        assert other._key(data) != key, name


def test_a_loss_that_is_not_finite_stops_the_run(student):
    data = make_set(student, 8)
    data.teacher.embeddings[:] = np.nan
    text = rf"'[^']*({'|'.join((*POSITIVE, *NEGATIVE))})[^']*'"
    message = rf"loss is nan at step 0, in the batch that begins with {text}(, {text}){{2}}; lower"
    with pytest.raises(RunError, match=message):
        make_trainer(student).train([data], [1.0], 2)


def test_fitting_the_output_layer_alone_leaves_the_body(student):
    data, before = make_set(student, 64), student.snapshot()
    kd_trainer.fit_output_layer(student, data)
    changed = {name for name, value in student.snapshot().items() if not torch.equal(before[name], value)}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_gradients_have_one_row_a_token_and_do_not_depend_on_the_batch(student):
    inputs = make_examples(6).inputs
    outputs = TeacherOutputs(np.tile(np.array([[2.0, -2.0]], np.float32), (6, 1)), np.zeros((6, 64), np.float32))
    together, alone = (
        kd_trainer.embedding_gradients(student, lambda texts: outputs.take(np.arange(len(texts))), inputs[:count], 16)
        for count in (6, 1)
    )
    lengths = encode(student.tokenizer, inputs, 16).lengths
    assert [len(rows) for rows in together] == lengths.tolist()
    assert np.allclose(together[0], alone[0], atol=1e-6)
    assert np.abs(together[0]).max() > 0


def test_the_score_of_a_state_rewards_ranking_not_confidence():
    labels = np.array([0, 1, 0, 1])
    right = np.array([[1.0, -1], [-1, 1], [1, -1], [-1, 1]], np.float32)
    one_wrong = right * np.array([[1], [1], [1], [-1]], np.float32)
    cases = (right, one_wrong, 4 * one_wrong)
    of_right, of_wrong, sure = (kd_trainer.calibrated_log_likelihoods(logits, labels) for logits in cases)
    assert of_right.shape == (4,) and of_right.mean() > of_wrong.mean()
    assert of_wrong.mean() == pytest.approx(sure.mean(), abs=0.01)


def test_embeddings_stay_where_they_are_at_rate_zero_and_move_otherwise(student):
    before, data = student.word_embeddings().clone(), make_set(student, 32)
    make_trainer(student, replace(CONFIG, embedding_rate=0.0)).train([data], [1.0], 4)
    assert torch.equal(student.word_embeddings(), before)
    make_trainer(student, replace(CONFIG, embedding_rate=1.0)).train([data], [1.0], 4)
    moved = (student.word_embeddings() != before).any(1).nonzero().flatten().tolist()
    choice = encode(student.tokenizer, make_examples(16, 5).inputs, 16)
    assert moved and set(moved) <= {*data.encoded.ids.tolist(), *choice.ids.tolist(), choice.pad_id}


def test_the_best_state_holds_the_whole_table_when_rows_are_trained(student):
    shape = student.word_embeddings().shape
    trainer = make_trainer(student, replace(CONFIG, embedding_rate=1.0))
    trainer.train([make_set(student, 32)], [1.0], 20)
    best = trainer.best.log_likelihood
    trainer.restore_best()
    assert student.word_embeddings().shape == shape
    assert make_trainer(student).evaluate().log_likelihood == pytest.approx(best, abs=1e-5)


def test_more_processes_than_texts_in_a_batch_are_refused(student, monkeypatch):
    monkeypatch.setattr("l2a.util.training.join_processes", lambda: None)
    monkeypatch.setenv("WORLD_SIZE", str(CONFIG.batch_size + 1))
    with pytest.raises(UsageError, match="batch_size is 8, which 9 processes cannot share"):
        make_trainer(student, CONFIG)


def test_the_judged_state_is_the_average_of_the_steps(student):
    trainer = make_trainer(student, replace(CONFIG, average=0.9, evaluate_every=1000))
    trainer.train([make_set(student, 32)], [1.0], 15)
    last = student.snapshot()
    trainer.restore_best()
    assert not torch.equal(last["classifier.weight"], student.snapshot()["classifier.weight"])


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path):
    run_processes(tmp_path / "one", 1, "together")
    run_processes(tmp_path / "two", 2, "together")
    expected = load_file(tmp_path / "one" / "0.safetensors")
    for rank in (0, 1):
        for name, value in load_file(tmp_path / "two" / f"{rank}.safetensors").items():
            torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["soft_labels", "lelp"])
def test_processes_that_start_apart_end_equal(tmp_path, objective):
    """With other weights, seeds, output layers and validation texts in each; what the first has counts."""
    run_processes(tmp_path / "apart", 2, "apart", objective)
    first, second = (load_file(tmp_path / "apart" / f"{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def run_processes(out: Path, processes: int, *arguments: str) -> None:
    out.mkdir()
    flags = ["--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
    flags += ["--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    # On a machine without a GPU this flag alone makes the launcher start more than one process.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *flags]
    script = str(Path(__file__).parent / "train_in_processes.py")
    command = [*(launcher if processes > 1 else [sys.executable]), script, str(out), str(processes), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_state_is_kept_for_following_the_teacher_unless_the_labels_forbid_it():
    few = np.array([-0.1, -0.3, -0.2, -0.4])
    state = Score(0.5, few)
    assert state.beats(None) and not state.beats(state)
    assert Score(0.4, few - [0.01, -0.01, 0.02, 0.0]).beats(state), "no worse than by chance"
    assert not Score(0.4, few - [0.2, 0.21, 0.2, 0.19]).beats(state), "the labels' veto"
    spread = 0.1 * np.array([-1, 1, -1, 1])  # its mean has a standard error of 0.058
    assert Score(0.4, few - 0.113 + spread).beats(state) and not Score(0.4, few - 0.118 + spread).beats(state)
    assert not Score(0.6, few + 1).beats(state)
    assert Score(0.4, np.zeros(0)).beats(Score(0.5, np.zeros(0))), "no labels, no veto"
    assert "0.500 nats" in str(state) and "nats" not in str(Score(None, few)) and "-0.250" in str(Score(None, few))
    assert Score(None, few + 0.1).beats(Score(None, few)) and not Score(None, few - 0.1).beats(Score(None, few))
    assert Score(None, np.zeros(0)).beats(Score(None, np.zeros(0))), "nothing tells, so training does"


def test_a_state_is_no_further_from_the_teacher_for_being_surer():
    """What is served is divided by a fitted temperature."""
    taught = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    assert mean_divergence(4 * taught, taught, TEMPERATURES) == pytest.approx(0, abs=1e-4)
    assert mean_divergence(4 * taught, taught) > 0.5


def test_the_best_state_is_the_one_nearest_to_the_teacher_on_texts_set_apart(student, monkeypatch):
    divergences, states = iter([0.5, 0.2, 0.9, 0.3]), []

    def measure(self):
        states.append(student.snapshot())
        return next(divergences)

    monkeypatch.setattr(KDTrainer, "_divergence", measure)
    trainer = make_trainer(student, replace(CONFIG, embedding_rate=0.0))
    monkeypatch.setattr(trainer, "_log_likelihoods", lambda: np.zeros(0))
    trainer.train([make_set(student, 32)], [1.0], 20)
    trainer.restore_best()
    kept = [all(torch.equal(state[name], value) for name, value in student.snapshot().items()) for state in states]
    assert kept == [False, True, False, False] and trainer.best.divergence == 0.2


def test_divergence_is_measured_on_the_texts_set_apart(student):
    assert make_trainer(student).evaluate().divergence is None
    trainer, apart = make_trainer(student), make_set(student, 12, seed=9)
    trainer.follow(apart)
    logits, taught = (torch.from_numpy(one) for one in (run_student(student, apart.encoded)[0], apart.teacher.logits))
    expected = min(float(soft_label_loss(logits / by, taught, 1.0).mean()) for by in np.geomspace(0.25, 16, 25))
    assert trainer.evaluate().divergence == pytest.approx(expected, abs=1e-5)
    trainer.train([make_set(student, 16)], [1.0], 5)
    trainer.restore_best()
    assert trainer.evaluate().divergence == pytest.approx(trainer.best.divergence, abs=1e-5)
