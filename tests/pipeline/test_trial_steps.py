import numpy as np
import pytest
import torch

import l2a.kd.trainer
from l2a.config import override
from l2a.pipeline.session import RunContext, open_workbench
from l2a.selector.reward import candidate_influences, real_reward


@pytest.mark.parametrize(
    ("changes", "term"),
    [({"kd.objective": "lelp"}, "subclass_loss"), ({"kd.objective": "soft_labels"}, "distillation_loss")],
)
def test_steps_on_trial_have_the_loss_of_the_run_and_leave_no_trace(config, monkeypatch, changes, term):
    bench = open_workbench(RunContext(override(config, changes)))
    trainer, used = bench.trainer, []
    original = getattr(l2a.kd.trainer, term)
    monkeypatch.setattr(l2a.kd.trainer, term, lambda *arguments: used.append(term) or original(*arguments))
    kept = [bench.student.model.state_dict()] + ([trainer._head.state_dict()] if trainer._head else [])
    before = [{name: value.clone() for name, value in state.items()} for state in kept]
    real_reward(bench, bench.target)
    assert used
    for state, earlier in zip(kept, before, strict=True):
        assert all(torch.equal(state[name], earlier[name]) for name in earlier)


def test_steps_on_trial_start_from_copies_of_what_was_learned_so_far(config):
    bench = open_workbench(RunContext(override(config, {"kd.objective": "lelp"})))
    bench.distil(None, 3, "warm-up")
    trial = bench.trainer.on_trial(bench.context.config.kd, bench.context.data.splits.reward, 24)
    for copy, learned in (
        (trial._head.weight, bench.trainer._head.weight),
        (trial._projection, bench.trainer._projection),
    ):
        assert torch.equal(copy, learned)
        assert copy is not learned


@pytest.mark.parametrize(
    "changes",
    [{"kd.objective": "lelp"}, {"kd.embedding_rate": 0.0}, {"kd.embedding_rate": 0.5}, {"kd.hidden_weight": 1.0}],
)
def test_measuring_influences_leaves_no_trace(config, changes):
    """Whatever is trained, and also where the real reward takes its steps on a part of the candidates."""
    bench = open_workbench(RunContext(override(config, changes)))
    bench.distil(None, 6, "warm-up")
    trainer = bench.trainer
    before = traces(bench)
    found = candidate_influences(bench, bench.target, bench.target.take(np.arange(4)), bench.reward)
    assert np.isfinite(found).all() and found.std() > 0
    assert found.shape == (len(bench.target),)
    assert all(torch.equal(one, other) for one, other in zip(before, traces(bench), strict=True))
    assert all(parameter.grad is None for parameter in bench.student.model.parameters())
    assert not bench.student.model.training and trainer.steps_done == 6


def traces(bench):
    trainer = bench.trainer
    moments = [value for state in trainer._optimizer.state.values() for value in state.values()]
    head = list(trainer._head.state_dict().values()) if trainer._head else []
    weights = [*bench.student.model.state_dict().values(), trainer._projection.data, *head, *moments]
    return [value.clone() for value in weights]


def test_a_frozen_table_has_no_say_and_a_slow_one_less(config):
    found = []
    for rate in (0.0, 0.5, 1.0):
        bench = open_workbench(RunContext(override(config, {"kd.embedding_rate": rate})))
        moves = bench.trainer.moves_per_gradient(bench.target)
        table = bench.student.model.get_input_embeddings().weight
        found.append(next(m for m, p in zip(moves, bench.student.model.parameters(), strict=True) if p is table))
    assert not found[0].any()
    torch.testing.assert_close(2 * found[1], found[2])
