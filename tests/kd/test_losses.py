"""The terms of the loss, and the score of both rewards: how well a student tells the classes apart."""

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays

from l2a.kd.losses import distillation_loss, hidden_state_loss, soft_label_loss

logits = arrays(np.float32, (4, 3), elements=st.floats(-8, 8, width=32)).map(torch.from_numpy)
temperatures = st.floats(0.5, 8)


@given(logits, logits, temperatures, st.floats(-5, 5))
def test_the_divergence_is_zero_for_equal_distributions_alone_and_ignores_shifts(student, teacher, temperature, shift):
    each = soft_label_loss(student + shift, teacher, temperature)
    apart = ((student / temperature).softmax(1) - (teacher / temperature).softmax(1)).abs().max(1).values
    assert (each >= -1e-4).all()
    assert (each[apart > 0.02] > 1e-4 * temperature**2).all()  # Pinsker: KL is at least twice the square
    assert soft_label_loss(teacher + shift, teacher, temperature).abs().max() < 1e-3


@given(logits, logits, temperatures)
def test_it_matches_the_formula_text_by_text(student, teacher, temperature):
    p, q = ((values.double() / temperature).softmax(1) for values in (teacher, student))
    expected = temperature**2 * (p * (p / q).log()).sum(1)
    np.testing.assert_allclose(soft_label_loss(student, teacher, temperature), expected, rtol=1e-3, atol=1e-3)


@given(arrays(np.float32, (8, 3), elements=st.floats(-1, 1, width=32)), st.floats(3, 8))
def test_the_size_of_the_gradient_hardly_depends_on_the_temperature(teacher, temperature):
    """At a high temperature it tends to (z_S - z_T) / C, centred; T^2 makes up for the two divisions by T."""
    student = torch.zeros(8, 3, requires_grad=True)
    soft_label_loss(student, torch.from_numpy(teacher), temperature).mean().backward()
    limit = (teacher.mean(1, keepdims=True) - teacher) / 3 / 8
    assert student.grad.norm().item() == pytest.approx(float(np.linalg.norm(limit)), rel=0.2, abs=1e-4)


@given(logits, logits, st.lists(st.integers(-1, 2), min_size=4, max_size=4), st.floats(0, 1))
def test_real_labels_add_cross_entropy_and_texts_without_take_the_soft_term_alone(student, teacher, labels, alpha):
    labels = torch.tensor(labels)
    soft = soft_label_loss(student, teacher, 2.0)
    hard = torch.nn.functional.cross_entropy(student, labels.clamp(min=0), reduction="none")
    expected = torch.where(labels < 0, soft, alpha * soft + (1 - alpha) * hard)
    each = distillation_loss(student, teacher, labels, 2.0, alpha)
    torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-4)


def test_hidden_states_that_agree_up_to_scale_cost_nothing():
    states, projection = torch.randn(4, 3), torch.randn(3, 5)
    assert hidden_state_loss(states, 7 * states @ projection, projection).numpy() == pytest.approx(0.0, abs=1e-6)
    assert hidden_state_loss(states, -states @ projection, projection).numpy() == pytest.approx(4.0, abs=1e-5)
