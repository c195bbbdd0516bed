from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from l2a.config import StudentConfig
from l2a.data.encoding import encode
from l2a.kd.inference import run_student
from l2a.kd.lelp import fit_subclasses, fold_parity, refit_output_layer, subclass_head, subclass_targets
from l2a.kd.losses import fold, subclass_loss
from l2a.report import check_parity, export_student
from l2a.student.presets import build_student
from l2a.student.student import Student
from l2a.teacher.labelling import TeacherOutputs
from l2a.teacher.model import Teacher
from tests.conftest import LABELS, make_examples

COUNTS = (3, 1, 2)
OBJECTIVES = ("lelp", "lelp_random_directions")


@pytest.fixture
def student(teacher: Teacher) -> Student:
    return build_student(StudentConfig(max_share=0.9), teacher, LABELS, (), seed=0)


def make_layer(outputs: int, seed: int = 0, width: int = 5, scale: float = 1.0) -> nn.Linear:
    layer = nn.Linear(width, outputs)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.normal_(0, scale, generator=generator)
        layer.bias.normal_(0, scale, generator=generator)
    return layer


@settings(deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(1, 4), min_size=2, max_size=4))
def test_folding_sums_the_probabilities_of_each_class(seed, counts):
    logits = torch.randn(6, sum(counts), generator=torch.Generator().manual_seed(seed)) * 5
    parts = logits.softmax(1).split(counts, dim=1)
    assert torch.allclose(fold(logits, counts).softmax(1), torch.stack([p.sum(1) for p in parts], 1), atol=1e-5)


def test_a_fresh_head_folds_to_the_output_layer():
    output, features = make_layer(3), torch.randn(8, 5)
    assert torch.allclose(fold(subclass_head(output, COUNTS)(features), COUNTS), output(features), atol=1e-5)


def test_the_loss_is_the_cross_entropy_on_the_subclasses_and_the_divergence_from_the_fold():
    output, head, features = make_layer(3), make_layer(6, seed=1), torch.randn(4, 5)
    targets = torch.rand(4, 6).softmax(1)
    folded = fold(head(features), COUNTS).log_softmax(1)
    expected = -(targets * head(features).log_softmax(1)).sum(1)
    expected += (folded.exp() * (folded - output(features).log_softmax(1))).sum(1)
    torch.testing.assert_close(subclass_loss(features, head, output, targets, COUNTS, "none"), expected)
    torch.testing.assert_close(subclass_loss(features, head, output, targets, COUNTS), expected.mean())


def test_the_body_and_the_head_do_not_feel_the_output_layer():
    head, features = make_layer(6, seed=1), torch.randn(4, 5, requires_grad=True)
    targets, gradients = torch.rand(4, 6).softmax(1), []
    for seed in (0, 7):
        output = make_layer(3, seed=seed)
        loss = subclass_loss(features, head, output, targets, COUNTS)
        gradients.append(torch.autograd.grad(loss, [features, head.weight, output.weight]))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1])
    assert gradients[0][2].abs().max() > 0


def test_the_output_layer_alone_follows_the_head():
    output, head, features = make_layer(3), make_layer(6, seed=1), torch.randn(64, 5)
    targets = torch.rand(64, 6).softmax(1)
    optimizer = torch.optim.Adam(output.parameters(), lr=0.1)
    before = fold_parity(output(features), fold(head(features), COUNTS)).probability_difference
    for _ in range(100):
        optimizer.zero_grad()
        subclass_loss(features, head, output, targets, COUNTS).backward()
        optimizer.step()
    assert fold_parity(output(features), fold(head(features), COUNTS)).probability_difference < before / 3


def test_parity_counts_equal_decisions_and_averages_probabilities():
    first = torch.tensor([[0.8, 0.2], [0.6, 0.4]]).log()
    second = torch.tensor([[0.7, 0.3], [0.4, 0.6]]).log()
    parity = fold_parity(first, second)
    assert parity.agreement == 0.5
    assert parity.probability_difference == pytest.approx(0.15)


def test_a_refit_is_exact_where_the_fold_is_linear():
    goal, output, features = make_layer(3), make_layer(3, seed=1), torch.randn(200, 5).numpy()
    parity = refit_output_layer(output, subclass_head(goal, COUNTS), COUNTS, features)
    assert parity.agreement == 1
    assert parity.probability_difference < 1e-4


def test_a_refit_is_the_best_layer_for_a_fold_that_is_not_linear():
    output, head, features = make_layer(3), make_layer(6, seed=1, scale=2), torch.randn(300, 5)
    refit_output_layer(output, head, COUNTS, features.numpy())
    goals = fold(head(features), COUNTS).softmax(1).detach()
    nn.functional.cross_entropy(output(features), goals).backward()
    assert output.weight.grad.abs().max() < 1e-3


def train_on_subclasses(student: Student, objective: str) -> tuple[nn.Linear, tuple[int, ...], np.ndarray]:
    """Some steps on subclasses of separable embeddings; gives the head, its counts and unseen features."""
    examples, fresh, rng = make_examples(96), make_examples(64, seed=4), np.random.default_rng(0)
    sign = (2.0 * examples.labels - 1)[:, None]
    embeddings = np.concatenate([sign, rng.normal(size=(96, 7))], axis=1).astype(np.float32)
    outputs = TeacherOutputs((sign * [-2, 2] + rng.normal(size=(96, 2)) * 0.3).astype(np.float32), embeddings)
    subclasses = fit_subclasses(outputs, np.eye(2, 8)[:1] * [[-2], [2]], objective, 3, rng)
    targets = torch.from_numpy(subclass_targets(subclasses, outputs, 2.0, 1.0))
    head = subclass_head(student.output, subclasses.counts)
    batch = encode(student.tokenizer, examples.inputs, 16).padded(np.arange(96))
    optimizer = torch.optim.Adam([*student.model.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        subclass_loss(student(batch)[1], head, student.output, targets, subclasses.counts).backward()
        optimizer.step()
    features = run_student(student, encode(student.tokenizer, examples.inputs, 16))[1]
    refit_output_layer(student.output, head, subclasses.counts, features)
    return head, subclasses.counts, run_student(student, encode(student.tokenizer, fresh.inputs, 16))[1]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_student_trained_on_subclasses_decides_alike_without_them(student, objective):
    head, counts, features = train_on_subclasses(student, objective)
    states = torch.from_numpy(features)
    with torch.no_grad():
        folded, classes = fold(head(states), counts), student.output(states)
    parity = fold_parity(classes, folded)
    assert parity.agreement > 0.97
    assert parity.probability_difference < 0.02
    assert (classes.argmax(1).numpy() == make_examples(64, seed=4).labels).mean() > 0.9


@pytest.mark.slow
def test_a_student_trained_on_subclasses_exports_as_an_ordinary_classifier(student, tmp_path: Path):
    train_on_subclasses(student, "lelp")
    export_student(student.model, student.tokenizer, tmp_path / "student", "# card", 16)
    check_parity(student.model, student.tokenizer, tmp_path / "student", make_examples(9).inputs, 16)
    weights = load_file(tmp_path / "student" / "model.safetensors")
    assert weights["classifier.weight"].shape[0] == len(LABELS)
    assert set(weights) <= set(student.model.state_dict())
