import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from l2a.config import StudentConfig
from l2a.student.student import attention_heads, largest_fitting, principal_word_vectors
from l2a.util.errors import UsageError


@pytest.fixture
def states():
    return np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32) * np.arange(1, 17, dtype=np.float32)


def test_word_vectors_are_the_same_whichever_sign_the_machine_gives(states, monkeypatch):
    before = principal_word_vectors(states, 6)
    solve = torch.linalg.eigh

    def turned(matrix):
        found = solve(matrix)
        return torch.return_types.linalg_eigh((found.eigenvalues, found.eigenvectors * torch.tensor([1.0, -1.0] * 8)))

    monkeypatch.setattr(torch.linalg, "eigh", turned)
    assert torch.equal(principal_word_vectors(states, 6), before)


def test_word_vectors_are_the_leading_components_at_one_scale(states):
    found = principal_word_vectors(states, 3).numpy()
    _, values, directions = np.linalg.svd(states - states.mean(0), full_matrices=False)
    expected = np.abs((states - states.mean(0)) @ directions[:3].T)
    ratios = np.abs(found) / expected
    assert np.allclose(ratios, ratios[0, 0], rtol=1e-2)
    assert np.linalg.norm(found, axis=1).mean() == pytest.approx(0.1 * 3**0.5, rel=1e-4)
    assert values[0] > values[2]


def test_more_components_than_the_teacher_has_are_refused(states):
    with pytest.raises(UsageError, match="exceeds the teacher's width 16"):
        principal_word_vectors(states, 17)


@given(st.integers(1, 128).map(lambda eighth: 8 * eighth))
def test_heads_divide_every_width_into_even_parts(width):
    heads = attention_heads(width)
    assert width % heads == 0
    assert (width // heads) % 2 == 0
    assert heads == 1 or width // heads >= 32


@given(st.integers(11, 3000))
def test_the_largest_size_that_fits_is_found(budget):
    config = StudentConfig(max_share=budget / 10_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("l2a.student.student.classifier_of", lambda size, weights: nn.Linear(10, size))
        size = largest_fitting(config, _Teacher(10_000), range(1, 400), lambda size: size)
    assert 11 * size <= int(config.max_share * 10_000) < 11 * (size + 1)


class _Teacher:
    def __init__(self, parameters_count):
        self.parameters_count = parameters_count
