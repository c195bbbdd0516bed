import pytest
import torch

import l2a.kd.trainer
from l2a.config import override
from l2a.pipeline.context import RunContext
from l2a.pipeline.rewards import real_reward
from l2a.pipeline.workbench import open_workbench


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
