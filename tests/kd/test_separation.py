"""The score of both rewards: how well a student tells the classes apart."""

import numpy as np
import pytest
import torch

from l2a.kd.losses import threshold_free_log_likelihood


def noisy_logits(classes, noise=1.0, seed=0):
    labels = torch.arange(200) % classes
    values = np.random.default_rng(seed).normal(size=(200, classes)).astype(np.float32)
    return torch.eye(classes)[labels] + noise * torch.from_numpy(values), labels


@pytest.mark.parametrize("classes", [2, 5])
def test_separation_ignores_confidence_and_thresholds_but_not_the_order(classes):
    logits, labels = noisy_logits(classes)
    plain = float(threshold_free_log_likelihood(logits, labels))
    moved = threshold_free_log_likelihood(7 * logits + torch.arange(classes), labels)
    assert float(moved) == pytest.approx(plain, abs=1e-4)
    worse, _ = noisy_logits(classes, 3.0)
    assert (
        plain
        > float(threshold_free_log_likelihood(worse, labels))
        > float(threshold_free_log_likelihood(-logits, labels))
    )


def test_it_is_the_log_likelihood_at_the_best_of_its_temperatures():
    logits = torch.tensor([[1.0, -1.0], [0.0, 0.0], [-1.0, 1.0], [0.5, -0.5]])
    labels = torch.tensor([0, 0, 1, 1])
    centred = logits - logits.mean(dim=0)
    standard = centred / centred.std(correction=0)
    losses = [torch.nn.functional.cross_entropy(0.25 * 32 ** (i / 7) * standard, labels) for i in range(8)]
    assert float(threshold_free_log_likelihood(logits, labels)) == pytest.approx(-float(min(losses)), abs=1e-6)


def test_constant_logits_score_as_chance_and_have_a_finite_gradient():
    logits = torch.zeros(6, 2, requires_grad=True)
    score = threshold_free_log_likelihood(logits, torch.tensor([0, 1, 0, 1, 0, 1]))
    score.backward()
    assert float(score.detach()) == pytest.approx(np.log(0.5), abs=1e-6)
    assert torch.isfinite(logits.grad).all()
