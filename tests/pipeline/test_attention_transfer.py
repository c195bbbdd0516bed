import numpy as np
import pytest

import l2a.kd.attention
from l2a.config import override
from l2a.pipeline.session import RunContext, open_session
from l2a.pipeline.students import train_plain_student
from l2a.selector.reward import real_reward


@pytest.mark.slow
def test_a_run_learns_attention_only_when_asked_to(config, monkeypatch):
    context, asked = RunContext(config), []
    monkeypatch.setattr("l2a.kd.trainer.KDTrainer.learn_attention", lambda trainer, teacher: asked.append(teacher))
    open_session(context)
    assert not asked
    with_attention = RunContext(override(config, {"kd.attention_weight": 1.0}))
    open_session(with_attention)
    assert asked == [with_attention.teacher]


@pytest.mark.slow
def test_a_student_that_learns_attention_is_trained_and_judged_as_any_other(config, monkeypatch):
    context = RunContext(override(config, {"kd.attention_weight": 100.0}))
    trained = train_plain_student(context)
    plain = train_plain_student(RunContext(config))
    assert not trained.rounds
    assert (trained.student.word_embeddings() != plain.student.word_embeddings()).any()
    session = open_session(context)
    compared, original = [], l2a.kd.attention.attention_loss
    monkeypatch.setattr(
        l2a.kd.attention, "attention_loss", lambda *arguments: compared.append(1) or original(*arguments)
    )
    assert np.isfinite(real_reward(session, session.target))
    assert compared
