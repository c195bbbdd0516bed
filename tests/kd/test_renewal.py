"""A set whose texts in use are chosen anew while the student learns."""

import numpy as np
import pytest
import torch

from l2a.kd.data import Renewal
from l2a.kd.inference import run_student
from l2a.util.progress import RunProgress
from tests.kd.test_trainer import make_set, make_trainer, student

__all__ = ["student"]


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
        progress = RunProgress(tmp_path / name, -1)
        weights_after(student, lambda t: t.train([known, pool], [0.5, 0.5], 20, progress, renewal=renewal))
        progress.close()
        return (tmp_path / name).read_text().count("validation")

    often = Renewal(pool, np.arange(8), 3, lambda logits: np.arange(8))
    assert looks("often", often) == looks("never", None) == 4


def test_no_updates_are_no_updates(student):
    trainer = make_trainer(student)
    trainer.train([make_set(student, 8)], [1.0], 0)
    assert trainer.steps_done == 0


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
