"""Second moments that are carried to a trial, the slope of the next updates, and how a model attends in training."""

import copy
import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from l2a.util import training
from l2a.util.training import adamw, carry_second_moments, linear_schedule


def trained(steps, seed=0):
    torch.manual_seed(seed)
    layer = nn.Linear(3, 2)
    optimizer = adamw([(list(layer.parameters()), 1e-3)], weight_decay=0.0)
    linear_schedule(optimizer, 100)
    for _ in range(steps):
        optimizer.zero_grad()
        layer(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    return layer, optimizer


def test_second_moments_are_carried_without_momentum_and_as_copies():
    layer, optimizer = trained(7)
    other = copy.deepcopy(layer)
    target = adamw([(list(other.parameters()), 1e-3)])
    carry_second_moments(optimizer, target)
    for old, new in zip(layer.parameters(), other.parameters(), strict=True):
        assert torch.equal(target.state[new]["exp_avg_sq"], optimizer.state[old]["exp_avg_sq"])
        assert not target.state[new]["exp_avg"].any() and float(target.state[new]["step"]) == 7
    target.zero_grad()
    other(torch.ones(1, 3)).sum().backward()
    before = optimizer.state[layer.weight]["exp_avg_sq"].clone()
    target.step()
    assert float(optimizer.state[layer.weight]["step"]) == 7
    assert torch.equal(optimizer.state[layer.weight]["exp_avg_sq"], before)


def test_of_an_optimiser_without_steps_nothing_is_carried():
    layer, optimizer = trained(0)
    carry_second_moments(optimizer, target := adamw([(list(layer.parameters()), 1e-3)]))
    assert not target.state


@pytest.mark.parametrize(("fast", "used"), [(True, "eager"), (False, "sdpa")])
def test_a_model_attends_by_plain_products_only_while_it_trains_in_bfloat16(teacher, monkeypatch, fast, used):
    monkeypatch.setattr(training, "_bfloat16_pays", lambda device, width: fast)
    model = teacher.encoder
    model.set_attn_implementation("sdpa")
    mask = torch.tensor([[1] * 6, [1, 1] + [0] * 4])
    batch = {"input_ids": torch.ones_like(mask), "attention_mask": mask}
    before = model(**batch).last_hidden_state
    with pytest.raises(RuntimeError), training.plain_attention(model):
        assert model.config._attn_implementation == used
        torch.testing.assert_close(model(**batch).last_hidden_state[:, :2], before[:, :2])
        raise RuntimeError
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_that_is_freed_is_kept_for_the_next_batch():
    code = """
import resource, torch
from l2a.util.training import keep_freed_memory
keep_freed_memory()
def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for count in range(50):
    if count == 10:
        before = pages()
    first, second = torch.ones(2_000_000), torch.ones(3_000_000)
    del first, second
print(pages() - before)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC", "GLIBC"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) < 20_000  # of 200,000 where memory is given back
