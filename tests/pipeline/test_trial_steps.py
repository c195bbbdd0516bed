import pytest
import torch

import l2a.kd.losses
from l2a.config import override
from l2a.pipeline.session import RunContext, open_session
from l2a.selector.reward import real_updates, reward_score

TERMS = {
    "subclass_loss": {"kd.objective": "lelp"}, "distillation_loss": {"kd.embedding_rate": 0.0},
    "hidden_state_loss": {"kd.embedding_rate": 0.5, "kd.hidden_weight": 1.0},
}  # fmt: skip


@pytest.mark.parametrize(("term", "changes"), TERMS.items())
def test_updates_on_trial_have_the_loss_of_the_run_and_leave_no_trace(config, monkeypatch, changes, term):
    session = open_session(RunContext(override(config, changes)))
    used, original, before = [], getattr(l2a.kd.losses, term), traces(session)
    monkeypatch.setattr(l2a.kd.losses, term, lambda *arguments: used.append(term) or original(*arguments))
    with real_updates(session.trainer, [session.target], [1.0], 2):
        reward_score(session.student, session.reward)
    assert used and all(torch.equal(one, other) for one, other in zip(before, traces(session), strict=True))


def test_updates_on_trial_start_from_copies_of_what_was_learned_so_far(config):
    session = open_session(RunContext(override(config, {"kd.objective": "lelp"})))
    session.distil(None, 3, "warm-up")
    trial = session.trainer.on_trial(session.context.config.kd)
    copies, learned = ([it._head.weight, it._projection] for it in (trial, session.trainer))
    assert all(torch.equal(one, other) and one is not other for one, other in zip(copies, learned, strict=True))


def traces(session):
    trainer = session.trainer
    moments = [value for state in trainer._optimizer.state.values() for value in state.values()]
    head = list(trainer._head.state_dict().values()) if trainer._head else []
    weights = [*session.student.model.state_dict().values(), trainer._projection.data, *head, *moments]
    return [value.clone() for value in weights]
