"""The row of one operator without a selector."""

import numpy as np
import pytest

import l2a.pipeline.students as augmented
from l2a.config import override
from l2a.data.examples import normalised_hash
from l2a.pipeline.methods import METHODS, prepare, run_method
from l2a.pipeline.session import RunContext, TrainingSession
from l2a.pipeline.students import train_augmented_student, train_fine_tuned_student
from l2a.util.errors import UsageError

OPERATORS = [None, "augpro_mix", "augpro_fgsm", "knn", "source", "target_only", "mixkd", "unprojected_fgsm"]


@pytest.fixture
def context(config):
    return RunContext(override(config, {"generator.degree": 0.5}))


def with_operator(context, operator, copies=1):
    return RunContext(override(context.config, {"generator.operator": operator, "generator.copies": copies}))


@pytest.fixture
def no_teacher(monkeypatch):
    def refuse(*_):
        raise AssertionError("a teacher was trained or checked")

    for name in ("fine_tuned", "cached_labeller", "refuse_useless_teacher"):
        monkeypatch.setattr(f"l2a.pipeline.session.{name}", refuse)


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_trains_as_long_as_plain_distillation(context, monkeypatch, operator):
    steps = []
    original = augmented.finish
    monkeypatch.setattr(
        augmented, "finish", lambda session, _: steps.append(session.trainer.steps_done) or original(session, ())
    )
    trained = train_augmented_student(with_operator(context, operator))
    assert steps == [context.config.kd.total_steps]
    assert np.isfinite(trained.score.log_likelihood) and not trained.student.model.training


def drawn(context, monkeypatch):
    sets = []
    original = TrainingSession.distil

    def spy(self, kept, steps, stage):
        sets.extend([] if kept is None else [kept])
        original(self, kept, steps, stage)

    monkeypatch.setattr(TrainingSession, "distil", spy)
    made = []
    monkeypatch.setattr(
        augmented,
        "draw_texts",
        lambda session, rng, draw=augmented.draw_texts: made.append(draw(session, rng)) or made[-1],
    )
    train_augmented_student(context)
    assert [len(part) for part in sets] == [len(inputs) for inputs, _ in made]
    return [inputs for inputs, _ in made]


@pytest.mark.parametrize(("operator", "copies"), [("augpro_mix", 1), ("knn", 2)])
def test_candidates_are_new_and_as_many_as_asked(context, monkeypatch, operator, copies):
    context = with_operator(context, operator, copies)
    splits, test = context.data.splits, context.data.target.test.hashes
    own = {normalised_hash(text) for text in splits.train.inputs}
    for inputs in drawn(context, monkeypatch):
        hashes = {normalised_hash(text) for text in inputs}
        assert len(inputs) == len(hashes) == copies * context.config.kd.pool_size
        assert not hashes & own and not hashes & test and not hashes & context.data.forbidden


@pytest.mark.slow
def test_copies_come_from_the_domain_that_the_operator_names(context, monkeypatch):
    for operator, inputs in (("source", context.data.source.inputs), ("target_only", context.data.splits.train.inputs)):
        for texts in drawn(with_operator(context, operator), monkeypatch):
            assert set(texts) <= set(inputs)


@pytest.mark.slow
def test_fine_tuning_inherits_labels_and_asks_no_teacher(context, no_teacher, monkeypatch):
    context = with_operator(context, "augpro_mix")
    texts, sets = [], []
    draw, distil = augmented.draw_texts, TrainingSession.distil

    def spy(session, kept, steps, stage):
        sets.extend([] if kept is None else [kept])
        assert (session.trainer.config.alpha, session.trainer.config.hidden_weight) == (0, 0)
        distil(session, kept, steps, stage)

    monkeypatch.setattr(augmented, "draw_texts", lambda *a: texts.append(draw(*a)) or texts[-1])
    monkeypatch.setattr(TrainingSession, "distil", spy)
    trained = train_fine_tuned_student(context)
    assert np.isfinite(trained.score.log_likelihood) and len(sets) == context.config.kd.rounds
    data = context.data
    parts = (data.source, data.splits.train)
    real = {text: label for part in parts for text, label in zip(part.inputs, part.labels.tolist(), strict=True)}
    for kept, (inputs, bases) in zip(sets, texts, strict=True):
        assert kept.labels.tolist() == [real[base] for base in bases]
        assert inputs != bases
        assert all(len(one[0].split()) == len(base[0].split()) for one, base in zip(inputs, bases, strict=True))


@pytest.mark.slow
def test_fine_tuning_learns_and_runs_by_its_name_without_any_teacher(context, no_teacher):
    result = run_method(with_operator(context, "augpro_mix").config, "augmented_fine_tuned_student")
    assert (result.predictions == result.test.labels).mean() > 0.8


@pytest.mark.parametrize("operator", [None, "augpro_fgsm", "mixkd"])
def test_fine_tuning_refuses_operators_that_ask_a_teacher(context, operator):
    with pytest.raises(UsageError, match=r"generator\.operator.*needs a teacher.*augpro_mix"):
        train_fine_tuned_student(with_operator(context, operator))


def test_the_source_can_be_cut_to_a_size(context):
    whole = context.data.source
    cut = RunContext(override(context.config, {"source_size": 20})).data.source
    again = RunContext(override(context.config, {"source_size": 20})).data.source
    assert len(cut) == 20 < len(whole) and cut.inputs == again.inputs and set(cut.inputs) <= set(whole.inputs)
    assert RunContext(override(context.config, {"source_size": 10_000})).data.source.inputs == whole.inputs
    with pytest.raises(UsageError, match="source_size"):
        override(context.config, {"source_size": 1})


def test_nothing_of_a_teacher_is_prepared_for_fine_tuning_alone(context, no_teacher):
    prepare(context, METHODS["augmented_fine_tuned_student"])
    with pytest.raises(AssertionError, match="a teacher"):
        prepare(RunContext(context.config), METHODS["augmented_kd_student"])
