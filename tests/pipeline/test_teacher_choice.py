"""The teacher learns from the source too, unless the target's held-out labels speak against it."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from l2a.config import override
from l2a.pipeline import methods, session
from l2a.pipeline.methods import METHODS, MethodResult
from l2a.pipeline.session import RunContext
from l2a.teacher.labelling import TeacherOutputs


@pytest.fixture
def stages(monkeypatch):
    """Stages that would be trained, and teachers that are told apart by the last of theirs."""
    seen = []

    def train(base, examples, config, epochs, length, seed, stage, progress):
        seen.append(stage)
        base.stage = stage
        return base

    monkeypatch.setattr(session, "fine_tuned", train)
    return seen


def judged(monkeypatch, better):
    """Let one of the two teachers be right on every held-out label, and the other wrong."""

    def predict(teacher, inputs, length):
        labels = np.array([held_out[text] for text in inputs])
        right = np.eye(2, dtype=np.float32)[labels] * 4
        return TeacherOutputs(right if teacher.stage == better else -right, np.zeros((len(inputs), 2), np.float32))

    held_out = {}
    monkeypatch.setattr(session, "predict", predict)
    return held_out


@pytest.mark.parametrize("better", ["teacher: target", "teacher: target alone"])
def test_the_teacher_is_the_one_under_which_held_out_labels_are_likelier(config, stages, monkeypatch, better):
    context, labels = RunContext(override(config, {"dev_shots": 8})), judged(monkeypatch, better)
    examples = context.data.held_out_labels
    labels |= dict(zip(examples.inputs, examples.labels.tolist(), strict=True))
    assert len(examples) >= session.FEWEST_TO_CHOOSE and context.teacher.stage == better
    assert stages == ["teacher: source", "teacher: target", "teacher: target alone"]


def test_a_handful_of_held_out_labels_chooses_nothing(config, stages, monkeypatch):
    monkeypatch.setattr(session, "predict", lambda *_: pytest.fail("asked"))
    assert RunContext(override(config, {"dev_shots": 3})).teacher.stage == "teacher: target"


@pytest.mark.parametrize(("learns_from", "last"), [("both", "teacher: target"), ("target", "teacher: target alone")])
def test_the_choice_can_be_made_beforehand(config, stages, monkeypatch, learns_from, last):
    monkeypatch.setattr(session, "predict", lambda *_: pytest.fail("asked"))
    context = RunContext(override(config, {"dev_shots": 8, "teacher.learns_from": learns_from}))
    assert context.teacher.stage == stages[-1] == last and len(stages) == (2 if learns_from == "both" else 1)


@pytest.mark.parametrize("student_is_right", [True, False])
def test_a_student_that_a_linear_model_or_a_constant_answer_beats_is_warned_of(
    config, monkeypatch, caplog, student_is_right
):
    context = RunContext(override(config, {"dev_shots": 8}))
    labels = context.data.held_out_labels.labels
    logits = np.eye(2, dtype=np.float32)[labels if student_is_right else 1 - labels]
    monkeypatch.setattr(methods, "run_student", lambda *_: (logits, logits))
    monkeypatch.setattr(methods, "encode", lambda *_: None)

    trained = SimpleNamespace(student=SimpleNamespace(tokenizer=None))
    tested = np.array([0, 0, 1])
    said = tested if student_is_right else 0 * tested
    inputs = tuple((f"text {i}",) for i in tested)
    methods.warn_of_student(
        context, trained, MethodResult("l2a_student", said, tested, ("bad", "good", "so so"), 1, 1, 0.0, {}, inputs)
    )
    absent, *others = caplog.messages
    assert absent == "test split: no example of so so; add some, or leave the class out everywhere"
    if student_is_right:
        assert not others
    else:
        assert re.search(r"right on 66\.7%.*'bad' to every text is on 66\.7%.*give more", others[0])
        assert "tfidf_logreg" in others[1] and "the student on 0%" in others[1]


def test_rows_of_the_small_encoder_are_left_out_where_it_is_the_teacher(config):
    small = {name for name, method in METHODS.items() if "small" in method.needs}
    assert small == {"fine_tuned_minilm", "frozen_minilm_logreg"}
    for teacher, shown in (("minilm-l6", set()), ("mpnet-base", small)):
        compared = methods.compared_methods(override(config, {"compare": True, "teacher.model": teacher}))
        assert {method.name for method in compared} & small == shown
