"""Second moments that are carried to a trial, the slope of the next updates, and how a model attends in training."""

import copy
import os
import platform
import subprocess
import sys

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from l2a.util import training
from l2a.util.training import STEPS_AHEAD, adamw, adamw_update_derivative, carry_second_moments, linear_schedule


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


@given(st.integers(0, 100), st.integers(1, 30))
def test_a_slope_is_the_derivative_of_the_update_at_the_peak_rate(seed, steps):
    layer, optimizer = trained(steps, seed)
    layer.weight.grad, layer.bias.grad = torch.randn(2, 3), None
    slopes = adamw_update_derivative(optimizer)
    assert set(slopes) == {layer.weight}
    share = 1 - 0.98**STEPS_AHEAD
    moment = (optimizer.state[layer.weight]["exp_avg_sq"] / (1 - 0.98**steps)).double()

    def update(gradient):
        return 1e-3 * gradient / ((1 - share) * moment + share * gradient**2).sqrt()

    gradient, little = layer.weight.grad.double(), 1e-6
    expected = (update(gradient + little) - update(gradient - little)) / (2 * little)
    torch.testing.assert_close(slopes[layer.weight].double(), expected, rtol=1e-3, atol=1e-8)


def test_a_weight_that_was_never_used_has_no_slope_and_a_new_optimiser_has_one():
    layer, optimizer = trained(3)
    optimizer.state[layer.weight]["exp_avg_sq"][0] = 0.0
    layer.weight.grad = torch.ones(2, 3)
    slopes = adamw_update_derivative(optimizer)[layer.weight]
    assert not slopes[0].any() and slopes[1].all()
    fresh, new = trained(0)
    fresh.weight.grad = torch.full((2, 3), 0.5)
    slope = adamw_update_derivative(new)[fresh.weight][0, 0].item()
    assert slope == pytest.approx(1e-3 * 0.98**STEPS_AHEAD / 0.5, rel=1e-5)


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
