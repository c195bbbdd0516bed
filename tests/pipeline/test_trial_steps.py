import numpy as np
import pytest
import torch

import l2a.kd.losses
from l2a.config import override
from l2a.pipeline.session import RunContext, open_session
from l2a.selector.reward import candidate_influences, real_steps, reward_score


@pytest.mark.parametrize(
    ("changes", "term"),
    [({"kd.objective": "lelp"}, "subclass_loss"), ({"kd.objective": "soft_labels"}, "distillation_loss")],
)
def test_steps_on_trial_have_the_loss_of_the_run_and_leave_no_trace(config, monkeypatch, changes, term):
    session = open_session(RunContext(override(config, changes)))
    used, original, before = [], getattr(l2a.kd.losses, term), traces(session)
    monkeypatch.setattr(l2a.kd.losses, term, lambda *arguments: used.append(term) or original(*arguments))
    with real_steps(session.trainer, session.target):
        reward_score(session.student, session.reward)
    assert used and all(torch.equal(one, other) for one, other in zip(before, traces(session), strict=True))


def test_steps_on_trial_start_from_copies_of_what_was_learned_so_far(config):
    session = open_session(RunContext(override(config, {"kd.objective": "lelp"})))
    session.distil(None, 3, "warm-up")
    trial = session.trainer.on_trial(session.context.config.kd)
    copies, learned = ([it._head.weight, it._projection] for it in (trial, session.trainer))
    assert all(torch.equal(one, other) and one is not other for one, other in zip(copies, learned, strict=True))


@pytest.mark.parametrize(
    "changes",
    [{"kd.objective": "lelp"}, {"kd.embedding_rate": 0.0}, {"kd.embedding_rate": 0.5, "kd.hidden_weight": 1.0}],
)
def test_measuring_influences_leaves_no_trace(config, changes):
    """Whatever is trained, and also where the real reward takes its steps on a part of the candidates."""
    session = open_session(RunContext(override(config, changes)))
    session.distil(None, 6, "warm-up")
    before, few = traces(session), session.target.take(np.arange(4))
    found = candidate_influences(session.trainer, session.target, few, session.reward)
    assert np.isfinite(found).all() and found.std() > 0 and found.shape == (len(session.target),)
    assert all(torch.equal(one, other) for one, other in zip(before, traces(session), strict=True))
    assert all(parameter.grad is None for parameter in session.student.model.parameters())
    assert not session.student.model.training and session.trainer.steps_done == 6


def traces(session):
    trainer = session.trainer
    moments = [value for state in trainer._optimizer.state.values() for value in state.values()]
    head = list(trainer._head.state_dict().values()) if trainer._head else []
    weights = [*session.student.model.state_dict().values(), trainer._projection.data, *head, *moments]
    return [value.clone() for value in weights]


def test_a_frozen_table_has_no_say_and_a_slow_one_less(config):
    found = []
    for rate in (0.0, 0.5, 1.0):
        session = open_session(RunContext(override(config, {"kd.embedding_rate": rate})))
        moves = session.trainer.moves_per_gradient(session.target)
        table = session.student.model.get_input_embeddings().weight
        found.append(next(m for m, p in zip(moves, session.student.model.parameters(), strict=True) if p is table))
    assert not found[0].any()
    torch.testing.assert_close(2 * found[1], found[2])
