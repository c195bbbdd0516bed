from functools import partial

import numpy as np
import pytest
import torch

import l2a.kd.losses
from l2a.config import override
from l2a.pipeline.session import RunContext, open_session
from l2a.selector.reward import candidate_influences, real_reward, reward_score

KINDS = {
    "lelp": {"kd.objective": "lelp"}, "frozen": {"kd.embedding_rate": 0.0}, "slow": {"kd.embedding_rate": 0.5},
    "whole": {"kd.embedding_rate": 1.0, "kd.hidden_weight": 0.5},
}  # fmt: skip


@pytest.fixture(scope="module")
def opened(config):
    """Sessions that no test here changes, since measuring leaves no trace; each with its moves before any step."""
    found = {}
    for kind, changes in KINDS.items():
        session = open_session(RunContext(override(config, {"kd.hidden_weight": 0.5, **changes})))
        moves = session.trainer.moves_per_gradient(session.target)
        session.distil(None, 6, "warm-up")
        found[kind] = session, dict(zip(session.student.model.parameters(), moves, strict=True))
    return found


def traces(session):
    trainer = session.trainer
    moments = [value for state in trainer._optimizer.state.values() for value in state.values()]
    head = list(trainer._head.state_dict().values()) if trainer._head else []
    weights = [*session.student.model.state_dict().values(), trainer._projection.data, *head, *moments]
    return [value.clone() for value in weights]


@pytest.mark.parametrize(("kind", "term"), [("lelp", "subclass_loss"), ("whole", "distillation_loss")])
def test_steps_on_trial_have_the_loss_of_the_run_and_leave_no_trace(opened, monkeypatch, kind, term):
    session, used = opened[kind][0], []
    original = getattr(l2a.kd.losses, term)
    monkeypatch.setattr(l2a.kd.losses, term, lambda *arguments: used.append(term) or original(*arguments))
    before, score = traces(session), partial(reward_score, reward=session.reward)
    real_reward(session.trainer, session.target, score, session.context.config.kd)
    assert used and all(torch.equal(one, other) for one, other in zip(before, traces(session), strict=True))


def test_steps_on_trial_start_from_copies_of_what_was_learned_so_far(opened):
    session = opened["lelp"][0]
    trial = session.trainer.on_trial(session.context.config.kd, session.reward)
    copies, learned = ([it._head.weight, it._projection] for it in (trial, session.trainer))
    assert all(torch.equal(one, other) and one is not other for one, other in zip(copies, learned, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_measuring_influences_leaves_no_trace(opened, kind):
    """Whatever is trained, and also where the real reward takes its steps on a part of the candidates."""
    session = opened[kind][0]
    before = traces(session)
    few, kd = session.target.take(np.arange(4)), session.context.config.kd
    found = candidate_influences(session.trainer, session.target, few, session.reward, kd)
    assert np.isfinite(found).all() and found.std() > 0
    assert found.shape == (len(session.target),)
    assert all(torch.equal(one, other) for one, other in zip(before, traces(session), strict=True))
    assert all(parameter.grad is None for parameter in session.student.model.parameters())
    assert not session.student.model.training and session.trainer.steps_done == 6


def test_a_frozen_table_has_no_say_and_a_slow_one_less(opened):
    tables = {kind: moves[it.student.model.get_input_embeddings().weight] for kind, (it, moves) in opened.items()}
    assert not tables["frozen"].any()
    torch.testing.assert_close(2 * tables["slow"], tables["whole"])
