import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from l2a.kd.losses import attention_loss, distillation_loss, hidden_state_loss, soft_label_loss

logits = arrays(np.float32, (4, 3), elements=st.floats(-8, 8, width=32)).map(torch.from_numpy)
temperatures = st.floats(0.5, 8)


@given(logits, logits, temperatures)
def test_the_divergence_is_never_negative(student, teacher, temperature):
    assert soft_label_loss(student, teacher, temperature) >= -1e-4


@given(logits, temperatures, st.floats(-5, 5))
def test_it_is_zero_for_equal_distributions_and_ignores_shifts(teacher, temperature, shift):
    assert soft_label_loss(teacher + shift, teacher, temperature) == pytest.approx(0.0, abs=1e-3)


def test_it_matches_the_formula():
    student, teacher, temperature = torch.randn(5, 4), torch.randn(5, 4), 3.0
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    expected = temperature**2 * (p * (p / q).log()).sum(1).mean()
    assert soft_label_loss(student, teacher, temperature) == pytest.approx(expected.item(), rel=1e-4)


def test_the_gradient_hardly_depends_on_the_temperature():
    torch.manual_seed(0)
    teacher, norms = torch.randn(64, 3), []
    for temperature in (2.0, 4.0, 8.0):
        student = torch.zeros(64, 3, requires_grad=True)
        soft_label_loss(student, teacher, temperature).backward()
        norms.append(student.grad.norm().item())
    assert max(norms) / min(norms) < 1.3


def test_text_without_a_label_takes_the_soft_term_alone():
    student, teacher = torch.randn(6, 2), torch.randn(6, 2)
    unlabelled = torch.full((6,), -1)
    loss = distillation_loss(student, teacher, unlabelled, 2.0, alpha=0.3)
    assert loss == pytest.approx(soft_label_loss(student, teacher, 2.0).item(), rel=1e-5)


def test_real_labels_add_cross_entropy():
    student, teacher, labels = torch.randn(6, 2), torch.randn(6, 2), torch.tensor([0, 1, 0, 1, 1, 0])
    hard = torch.nn.functional.cross_entropy(student, labels)
    soft = soft_label_loss(student, teacher, 2.0)
    expected = 0.7 * hard + 0.3 * soft
    assert distillation_loss(student, teacher, labels, 2.0, 0.3) == pytest.approx(expected.item(), rel=1e-5)


def test_hidden_states_that_agree_up_to_scale_cost_nothing():
    states, projection = torch.randn(4, 3), torch.randn(3, 5)
    assert hidden_state_loss(states, 7 * states @ projection, projection) == pytest.approx(0.0, abs=1e-6)
    assert hidden_state_loss(states, -states @ projection, projection) == pytest.approx(4.0, abs=1e-5)


def make_attention(heads: int, lengths: list[int], width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention maps of padded texts, rows summing to 1, and their mask."""
    mask = (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long()
    scores = torch.randn(len(lengths), heads, width, width, generator=torch.Generator().manual_seed(seed))
    return scores.masked_fill(mask[:, None, None] == 0, -1e9).softmax(-1), mask


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 3), st.integers(0, 99))
def test_attention_costs_nothing_iff_the_averaged_maps_agree(lengths, heads, seed):
    teacher, mask = make_attention(heads, lengths, 6, seed)
    averaged = teacher.mean(1, keepdim=True).expand(-1, 5, -1, -1)
    assert attention_loss(averaged, teacher, mask) == pytest.approx(0, abs=1e-12)
    changed = averaged.clone()
    changed[0, :, 0, 0] += 0.1
    assert attention_loss(changed, teacher, mask) > 1e-5


def test_attention_matches_the_formula():
    student, mask = make_attention(2, [4, 4], 4, 0)
    teacher, _ = make_attention(3, [4, 4], 4, 1)
    expected = (student.mean(1) - teacher.mean(1)).pow(2).mean()
    assert attention_loss(student, teacher, mask) == pytest.approx(expected.item(), rel=1e-5)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.sampled_from([7.0, float("nan")]))
def test_attention_of_padding_changes_neither_the_loss_nor_the_gradient(lengths, rubbish):
    student, _ = make_attention(2, lengths, 4, 0)
    teacher, mask = make_attention(2, lengths, 4, 1)
    pairs = (mask[:, None, :, None] * mask[:, None, None, :]).bool()
    clean = attention_loss(student, teacher, mask)
    dirty = student.masked_fill(~pairs, rubbish).requires_grad_()
    wider = torch.nn.functional.pad(dirty, (0, 3, 0, 3), value=rubbish)
    loss = attention_loss(wider, torch.nn.functional.pad(teacher, (0, 3, 0, 3)), torch.nn.functional.pad(mask, (0, 3)))
    assert loss.item() == pytest.approx(clean.item(), rel=1e-5)
    loss.backward()
    assert torch.isfinite(dirty.grad).all()
    assert not dirty.grad.masked_select(~pairs).any()


def test_a_long_text_weighs_no_more_than_a_short_one():
    student, mask = make_attention(1, [6, 2], 6, 0)
    teacher, _ = make_attention(1, [6, 2], 6, 1)
    each = [attention_loss(student[i : i + 1], teacher[i : i + 1], mask[i : i + 1]) for i in (0, 1)]
    assert attention_loss(student, teacher, mask) == pytest.approx(((each[0] + each[1]) / 2).item(), rel=1e-5)
