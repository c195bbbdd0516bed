"""The teacher learns from the source too, unless the target's held-out labels speak against it."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from l2a.config import override
from l2a.data.examples import Examples
from l2a.pipeline import methods, session
from l2a.pipeline.methods import METHODS, MethodResult
from l2a.pipeline.run import warn_of_student
from l2a.pipeline.session import RunContext
from l2a.teacher.labelling import TeacherOutputs


@pytest.fixture
def stages(monkeypatch, tmp_path):
    """Stages that would be trained, and teachers that are told apart by the last of theirs."""
    monkeypatch.setenv("L2A_CACHE", str(tmp_path))
    seen = []

    def train(base, examples, config, epochs, length, seed, stage, progress=None):
        seen.append(stage)
        base.stage, base.learned = stage, examples.inputs
        return base

    monkeypatch.setattr(session, "fine_tuned", train)
    monkeypatch.setattr(session, "fine_tune", train)
    return seen


@pytest.mark.parametrize("dev_shots", [8, 3])
@pytest.mark.parametrize("better", ["teacher: target", "teacher: target alone"])
def test_the_teacher_is_the_one_under_which_labels_that_it_did_not_learn_are_likelier(
    config, stages, monkeypatch, better, dev_shots
):
    context, asked = RunContext(override(config, {"dev_shots": dev_shots, "teacher.learns_from": "auto"})), []

    def predict(teacher, inputs, length):
        asked.append((teacher.learned, inputs))
        right = np.eye(2, dtype=np.float32)[[labels[text] for text in inputs]] * 4
        return TeacherOutputs(right if teacher.stage == better else -right, np.zeros((len(inputs), 2), np.float32))

    data = context.data
    labels = dict(zip(data.target_labels.inputs, data.target_labels.labels.tolist(), strict=True))
    monkeypatch.setattr(session, "predict", predict)
    assert context.teacher.stage == better and context.teacher.learned == data.splits.train.inputs
    judges = data.held_out_labels if dev_shots == 8 else data.splits.train
    assert len(data.held_out_labels) == (32 if dev_shots == 8 else 12)
    assert not any(set(learned) & set(inputs) for learned, inputs in asked)
    of_one_teacher = [text for _, inputs in asked[: len(asked) // 2] for text in inputs]
    assert sorted(of_one_teacher) == sorted(judges.inputs)

    stages.clear()
    assert RunContext(context.config).teacher.stage == better
    assert stages == {"teacher: target": ["teacher: source", better], "teacher: target alone": [better]}[better]


@pytest.mark.parametrize(("ahead", "stage"), [([0.5] * 15 + [-3], "target"), ([0.5] * 15 + [-1], "target alone")])
def test_the_target_alone_must_be_ahead_by_more_than_two_standard_errors(config, stages, monkeypatch, ahead, stage):
    judged = {"both": np.full(16, -5.0), "target": np.array(ahead) - 5}  # ahead by 0.28 and 0.41, errors 0.22 and 0.09
    monkeypatch.setattr(RunContext, "_judge", lambda self, name, *_: judged[name])
    context = RunContext(override(config, {"dev_shots": 8, "teacher.learns_from": "auto"}))
    assert context.teacher.stage == f"teacher: {stage}"


BOTH, ALONE = ["teacher: source", "teacher: target"], ["teacher: target alone"]


@pytest.mark.parametrize(("shots", "way", "trained"), [(8, "both", BOTH), (8, "target", ALONE), (1, "auto", BOTH)])
def test_one_label_of_a_class_or_a_choice_made_judges_no_teacher(config, stages, monkeypatch, shots, way, trained):
    monkeypatch.setattr(session, "predict", lambda *_: pytest.fail("asked"))
    context = RunContext(override(config, {"shots": shots, "dev_shots": 0, "teacher.learns_from": way}))
    assert context.teacher.stage == stages[-1] and stages == trained


@pytest.mark.parametrize("student_is_right", [True, False])
def test_a_student_that_a_linear_model_or_a_constant_answer_beats(config, monkeypatch, caplog, student_is_right):
    context = RunContext(override(config, {"dev_shots": 8}))
    labels = context.data.held_out_labels.labels
    logits = np.eye(2, dtype=np.float32)[labels if student_is_right else 1 - labels]
    monkeypatch.setattr(methods, "run_student", lambda *_: (logits, logits))
    monkeypatch.setattr(methods.encoding, "encode", lambda *_: None)
    trained, tested = SimpleNamespace(student=SimpleNamespace(tokenizer=None)), np.array([0, 0, 1])
    test = Examples(tuple((f"text {i}",) for i in tested), tested, ("bad", "good", "so so"))
    said = tested if student_is_right else 0 * tested
    warn_of_student(context, trained, MethodResult("l2a_student", test, said, 1, 1, 0.0, {}))
    absent, *others = caplog.messages
    assert absent == "test split: no example of so so; add some, or leave the class out everywhere"
    assert bool(others) is not student_is_right
    if others:
        assert re.search(r"right on 66\.7%.*'bad' to every text is on 66\.7%.*give more", others[0])
        assert "tfidf_logreg" in others[1] and "the student on 0%" in others[1]


def test_rows_of_the_small_encoder_are_left_out_where_it_is_the_teacher(config):
    small = {name for name, method in METHODS.items() if "small" in method.needs}
    assert small == {"fine_tuned_minilm", "frozen_minilm_logreg"}
    for teacher, shown in (("minilm-l6", set()), ("mpnet-base", small)):
        compared = methods.compared_methods(override(config, {"compare": True, "teacher.model": teacher}))
        assert {method.name for method in compared} & small == shown
    given = {"compare": True, "teacher.model": "my-classifier", "teacher.fine_tuned": True}
    compared = methods.compared_methods(override(config, given))
    assert not {method.name for method in compared} & (small | {"target_only_teacher", "frozen_teacher_logreg"})
