"""The terms of the loss, the score of both rewards, and the subclasses of LELP."""

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from l2a.data.encoding import encode
from l2a.kd import losses
from l2a.kd.losses import fold, fold_parity, owners, soft_label_loss, subclass_head, subclass_loss, subclass_targets
from l2a.kd.trainer import run_student
from l2a.teacher.labelling import TeacherOutputs
from l2a.teacher.model import load_fine_tuned
from tests.conftest import LABELS, make_examples

logits = arrays(np.float32, (4, 3), elements=st.floats(-8, 8, width=32)).map(torch.from_numpy)
temperatures = st.floats(0.3, 8)


@given(logits, logits, temperatures)
def test_the_divergence_matches_the_formula_text_by_text_and_is_zero_for_equal_logits(student, teacher, temperature):
    p, q = ((values.double() / temperature).softmax(1) for values in (teacher, student))
    expected = temperature**2 * (p * (p / q).log()).sum(1)
    np.testing.assert_allclose(soft_label_loss(student, teacher, temperature), expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(soft_label_loss(teacher, teacher, temperature), 0, atol=1e-4)


@given(arrays(np.float32, (8, 3), elements=st.floats(-1, 1, width=32)), st.floats(3, 8))
def test_the_size_of_the_gradient_hardly_depends_on_the_temperature(teacher, temperature):
    """At a high temperature it tends to (z_S - z_T) / C, centred; T^2 makes up for the two divisions by T."""
    student = torch.zeros(8, 3, requires_grad=True)
    soft_label_loss(student, torch.from_numpy(teacher), temperature).mean().backward()
    limit = (teacher.mean(1, keepdims=True) - teacher) / 3 / 8
    assert student.grad.norm().item() == pytest.approx(float(np.linalg.norm(limit)), rel=0.2, abs=1e-4)


@given(logits, logits, st.lists(st.integers(-1, 2), min_size=4, max_size=4), st.floats(0, 1))
def test_real_labels_add_cross_entropy_and_texts_without_take_the_soft_term_alone(student, teacher, labels, alpha):
    labels, soft = torch.tensor(labels), soft_label_loss(student, teacher, 2.0)
    hard = torch.nn.functional.cross_entropy(student, labels.clamp(min=0), reduction="none")
    expected = torch.where(labels < 0, soft, alpha * soft + (1 - alpha) * hard)
    each = losses.distillation_loss(student, teacher, labels, 2.0, alpha)
    torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-4)


def test_hidden_states_that_agree_up_to_scale_cost_nothing():
    states, projection = torch.randn(4, 3), torch.randn(3, 5)
    assert losses.hidden_state_loss(states, 7 * states @ projection, projection).numpy() == pytest.approx(0.0, abs=1e-6)
    assert losses.hidden_state_loss(states, -states @ projection, projection).numpy() == pytest.approx(4.0, abs=1e-5)


OBJECTIVES = ("lelp", "lelp_random_directions")
WIDTH = 12


def make_outputs(count: int, classes: int, seed: int = 0) -> tuple[TeacherOutputs, np.ndarray]:
    """Embeddings of unequal variance and the logits of a linear head on them."""
    rng = np.random.default_rng(seed)
    embeddings = (rng.normal(size=(count, WIDTH)) * np.geomspace(4, 0.2, WIDTH) + 1).astype(np.float32)
    weight = rng.normal(size=(classes, WIDTH))
    return TeacherOutputs(((embeddings - 1) @ weight.T).astype(np.float32), embeddings), weight


def fit(outputs, weight, objective="lelp", count=3, seed=0):
    return losses.fit_subclasses(outputs, weight, objective, count, np.random.default_rng(seed))


def fitted(texts, classes=2, objective="lelp", count=3, seed=0):
    """Outputs, the output weights that they come from, and their subclasses."""
    outputs, weight = make_outputs(texts, classes, seed)
    return outputs, weight, fit(outputs, weight, objective, count, seed)


any_objective = st.sampled_from(OBJECTIVES)


@given(any_objective, st.integers(2, 5), st.integers(1, 60), st.integers(1, 9), temperatures, temperatures)
def test_summed_over_a_class_the_targets_are_its_tempered_probability(objective, classes, texts, count, tau, beta):
    outputs, _, subclasses = fitted(texts, classes, objective, count)
    targets = subclass_targets(subclasses, outputs, tau, beta)
    sums = np.stack([targets[:, owners(subclasses.counts) == c].sum(1) for c in range(classes)], axis=1)
    assert targets.min() >= 0
    assert np.allclose(targets.sum(1), 1, atol=1e-5)
    assert np.allclose(sums, outputs.probabilities(tau), atol=1e-5)


@given(any_objective, st.randoms(use_true_random=False))
def test_permuted_texts_get_permuted_targets_alone_or_together(objective, random):
    outputs, _, subclasses = fitted(40, objective=objective)
    order = np.array(random.sample(range(40), 40))
    targets = subclass_targets(subclasses, outputs, 2.0, 1.0)
    assert np.allclose(subclass_targets(subclasses, outputs.take(order), 2.0, 1.0), targets[order], atol=1e-6)
    assert np.allclose(subclass_targets(subclasses, outputs.take(order[:1]), 2.0, 1.0), targets[order[:1]], atol=1e-6)


@given(any_objective, st.integers(2, 4), st.integers(1, 4), st.integers(0, 5))
def test_directions_are_orthonormal_and_unseen_by_the_output_weights(objective, classes, count, seed):
    _, weight, subclasses = fitted(200, classes, objective, count, seed)
    assert np.abs(weight @ subclasses.directions).max() < 1e-9
    for c in range(classes):
        own = subclasses.directions[:, owners(subclasses.counts) == c]
        assert np.allclose(own.T @ own, np.eye(own.shape[1]), atol=1e-9)


def test_the_directions_span_the_leading_components_of_each_class():
    outputs, weight, subclasses = fitted(300)
    projector = np.eye(WIDTH) - weight.T @ np.linalg.pinv(weight @ weight.T) @ weight
    for c in range(2):
        rows = outputs.embeddings[outputs.logits.argmax(1) == c].astype(np.float64)
        leading = np.linalg.svd((rows - rows.mean(0)) @ projector)[2][:3]
        own = subclasses.directions[:, owners(subclasses.counts) == c]
        assert np.allclose(own @ own.T, leading.T @ leading, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_scores_have_unit_size_in_their_own_class(objective):
    outputs, _, subclasses = fitted(2000, objective=objective)
    for c in range(2):
        own = subclasses.scores(outputs.embeddings[outputs.logits.argmax(1) == c])[:, owners(subclasses.counts) == c]
        assert np.sqrt((own**2).mean()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_number_of_subclasses_is_capped_at_a_quarter_of_the_class(objective):
    embeddings = np.random.default_rng(0).normal(size=(123, WIDTH)).astype(np.float32)
    decisions = np.repeat([0, 1, 2], [100, 20, 3])  # and none of the fourth class
    outputs = TeacherOutputs(np.eye(4, dtype=np.float32)[decisions], embeddings)
    subclasses = fit(outputs, np.eye(4, WIDTH), objective, count=16)
    assert subclasses.counts == (WIDTH - 4, 5, 1, 1)
    assert np.isfinite(subclass_targets(subclasses, outputs, 2.0, 0.5)).all()


def test_identical_embeddings_give_finite_targets():
    outputs, weight = make_outputs(40, 2)
    same = TeacherOutputs(outputs.logits, np.ones_like(outputs.embeddings))
    assert np.isfinite(subclass_targets(fit(same, weight), same, 2.0, 0.5)).all()


def test_a_class_of_few_dimensions_still_has_directions_that_the_output_weights_ignore():
    outputs, weight = make_outputs(40, 2)
    flat = outputs.embeddings[:, :1] * np.random.default_rng(1).normal(size=WIDTH)
    subclasses = fit(TeacherOutputs(outputs.logits, flat.astype(np.float32)), weight, count=9)
    assert subclasses.directions.shape[1] > 4
    assert np.abs(weight @ subclasses.directions).max() < 1e-9


def test_of_very_many_texts_some_are_fitted_on_and_all_are_counted(monkeypatch):
    monkeypatch.setattr("l2a.kd.losses.FIT_TEXTS", 20)
    logits = np.tile(np.array([[1, 0]], np.float32), (80, 1))
    embeddings = np.random.default_rng(0).normal(size=(80, WIDTH)).astype(np.float32)
    whole = fit(TeacherOutputs(logits, embeddings), np.eye(2, WIDTH), count=8)
    assert whole.counts == (8, 1)
    thinned = fit(TeacherOutputs(logits[::4], embeddings[::4]), np.eye(2, WIDTH), count=5)
    assert np.allclose(whole.means, thinned.means)


def test_a_higher_temperature_splits_more_evenly():
    outputs, _, subclasses = fitted(100)
    sharp, even = (subclass_targets(subclasses, outputs, 2.0, beta).max(1).mean() for beta in (0.1, 100.0))
    assert even == pytest.approx(outputs.probabilities(2.0).max(1).mean() / 3, rel=0.05)
    assert sharp > 2 * even


def test_new_texts_are_split_by_the_fitted_directions():
    _, _, subclasses = fitted(300)
    text = subclasses.means[1] + 5 * subclasses.rms[1] * subclasses.directions[:, 4]
    new = TeacherOutputs(np.array([[-9.0, 9.0]], np.float32), text[None].astype(np.float32))
    assert subclass_targets(subclasses, new, 1.0, 0.5)[0, 4] > 0.99


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_seed_gives_one_split_and_another_seed_another(objective):
    outputs, weight = make_outputs(60, 2)
    splits = (fit(outputs, weight, objective, seed=seed) for seed in (0, 0, 1))
    first, same, other = (subclass_targets(split, outputs, 2.0, 1.0) for split in splits)
    assert np.array_equal(first, same)
    assert not np.allclose(first, other, atol=1e-3)


def test_a_random_direction_is_not_a_leading_component():
    outputs, weight = make_outputs(300, 2)
    leading, random = (fit(outputs, weight, objective).rms.mean() for objective in OBJECTIVES)
    assert random < 0.8 * leading


def test_the_weight_of_a_teachers_own_head_is_read(teacher):
    outputs = TeacherOutputs(np.zeros((3, 2), np.float32), np.zeros((3, 64), np.float32))
    assert np.array_equal(losses.teacher_output_weight(teacher, outputs), teacher.head.weight.detach().numpy())


def test_the_weight_of_a_hidden_head_is_the_map_that_fits_its_logits(classifier_folder):
    outputs, weight = make_outputs(200, 2)
    found = losses.teacher_output_weight(load_fine_tuned(str(classifier_folder), LABELS), outputs)
    assert np.allclose(found, weight, atol=1e-3)


COUNTS = (3, 1, 2)


def make_layer(outputs: int, seed: int = 0, scale: float = 1.0) -> nn.Linear:
    layer, generator = nn.Linear(5, outputs), torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=scale, generator=generator)
    return layer


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
    torch.testing.assert_close(subclass_loss(features, head, output, targets, COUNTS), expected)


def test_the_body_and_the_head_do_not_feel_the_output_layer():
    head, features = make_layer(6, seed=1), torch.randn(4, 5, requires_grad=True)
    targets, gradients = torch.rand(4, 6).softmax(1), []
    for seed in (0, 7):
        output = make_layer(3, seed=seed)
        loss = subclass_loss(features, head, output, targets, COUNTS).mean()
        gradients.append(torch.autograd.grad(loss, [features, head.weight, output.weight]))
    assert all(torch.equal(gradients[0][i], gradients[1][i]) for i in (0, 1))
    assert gradients[0][2].abs().max() > 0


def test_the_output_layer_alone_follows_the_head():
    output, head, features = make_layer(3), make_layer(6, seed=1), torch.randn(64, 5)
    targets = torch.rand(64, 6).softmax(1)
    optimizer = torch.optim.Adam(output.parameters(), lr=0.1)
    before = fold_parity(output(features), fold(head(features), COUNTS))["probability_difference"]
    for _ in range(100):
        optimizer.zero_grad()
        subclass_loss(features, head, output, targets, COUNTS).mean().backward()
        optimizer.step()
    assert fold_parity(output(features), fold(head(features), COUNTS))["probability_difference"] < before / 3


def test_parity_counts_equal_decisions_and_averages_probabilities():
    first = torch.tensor([[0.8, 0.2], [0.6, 0.4]]).log()
    second = torch.tensor([[0.7, 0.3], [0.4, 0.6]]).log()
    assert fold_parity(first, second) == {"agreement": 0.5, "probability_difference": pytest.approx(0.15)}


def test_a_refit_is_exact_where_the_fold_is_linear():
    goal, output, features = make_layer(3), make_layer(3, seed=1), torch.randn(200, 5).numpy()
    parity = losses.refit_output_layer(output, subclass_head(goal, COUNTS), COUNTS, features)
    assert parity["agreement"] == 1 and parity["probability_difference"] < 1e-4


def test_a_refit_is_the_best_layer_for_a_fold_that_is_not_linear():
    output, head, features = make_layer(3), make_layer(6, seed=1, scale=2), torch.randn(300, 5)
    losses.refit_output_layer(output, head, COUNTS, features.numpy())
    goals = fold(head(features), COUNTS).softmax(1).detach()
    nn.functional.cross_entropy(output(features), goals).backward()
    assert output.weight.grad.abs().max() < 1e-3


def test_a_student_trained_on_subclasses_decides_alike_without_them(student):
    """Some steps on subclasses of separable embeddings; judged on unseen texts."""
    examples, fresh, rng = make_examples(96), make_examples(64, seed=4), np.random.default_rng(0)
    sign = (2.0 * examples.labels - 1)[:, None]
    embeddings = np.concatenate([sign, rng.normal(size=(96, 7))], axis=1).astype(np.float32)
    outputs = TeacherOutputs((sign * [-2, 2] + rng.normal(size=(96, 2)) * 0.3).astype(np.float32), embeddings)
    subclasses = losses.fit_subclasses(outputs, np.eye(2, 8)[:1] * [[-2], [2]], "lelp", 3, rng)
    targets = torch.from_numpy(subclass_targets(subclasses, outputs, 2.0, 1.0))
    head, encoded = subclass_head(student.output, subclasses.counts), encode(student.tokenizer, examples.inputs, 16)
    optimizer = torch.optim.Adam([*student.model.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        features = student(encoded.padded(np.arange(96)))[1]
        subclass_loss(features, head, student.output, targets, subclasses.counts).mean().backward()
        optimizer.step()
    losses.refit_output_layer(student.output, head, subclasses.counts, run_student(student, encoded)[1])
    states = torch.from_numpy(run_student(student, encode(student.tokenizer, fresh.inputs, 16))[1])
    with torch.no_grad():
        folded, classes = fold(head(states), subclasses.counts), student.output(states)
    parity = fold_parity(classes, folded)
    assert parity["agreement"] > 0.97 and parity["probability_difference"] < 0.02
    assert (classes.argmax(1).numpy() == fresh.labels).mean() > 0.9
