"""What a text would add, to first order, against steps that are really taken."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from l2a.kd.losses import fit_subclasses, soft_label_loss
from l2a.kd.trainer import KDTrainer, calibrated_log_likelihoods, run_student
from l2a.selector import reward
from l2a.selector.reward import influences, reward_gradient, reward_score
from tests.kd.test_trainer import CONFIG, make_set, make_trainer


def score(student, judge):
    logits = torch.from_numpy(run_student(student, judge.encoded)[0])
    return -float(soft_label_loss(logits, torch.from_numpy(judge.teacher.logits), 1.0).mean())


@pytest.fixture
def texts(student):
    return make_set(student, 24)


@pytest.fixture
def judge(student):
    return make_set(student, 32, seed=4)


@pytest.fixture
def trainer(student, texts):
    trainer = make_trainer(student)
    trainer.train([texts], [1.0], 10)
    return trainer


def test_the_loss_of_each_text_is_that_of_a_batch_of_one(trainer, texts):
    losses = trainer.losses(texts)
    alone = [trainer._loss(texts, np.array([i])).item() for i in range(len(texts))]
    np.testing.assert_allclose(losses, alone, rtol=1e-4)
    assert not trainer.student.model.training


def lelp_trainer(student, texts):
    trainer = make_trainer(student, replace(CONFIG, objective="lelp", subclasses=2))
    weight = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    trainer.learn_subclasses(fit_subclasses(texts.teacher, weight, "lelp", 2, np.random.default_rng(0)))
    return trainer


@pytest.mark.parametrize("terms", [{"hidden_weight": 0.5}, {"objective": "lelp"}])
def test_every_term_is_measured_text_by_text(student, texts, terms):
    trainer = lelp_trainer(student, texts) if "objective" in terms else make_trainer(student, replace(CONFIG, **terms))
    trainer.train([texts], [1.0], 6)
    together = trainer._loss(texts, np.arange(len(texts))).item()
    assert trainer.losses(texts).mean() == pytest.approx(together, rel=1e-4)


def test_the_gradient_of_the_reward_is_that_of_small_moves(student, trainer, judge):
    start, reach = score(student, judge), 1e-2
    assert reward_score(student, judge) == pytest.approx(start, abs=1e-6) != 0
    assert reward_score(student, judge.take(np.arange(0))) == 0, "a number, so that the page of a run can show it"
    gradients = reward_gradient(student, judge)
    length = float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())
    with torch.no_grad():
        for parameter, gradient in zip(student.model.parameters(), gradients, strict=True):
            parameter.add_(gradient, alpha=reach / length)
    assert score(student, judge) - start == pytest.approx(reach * length, rel=0.1)


@pytest.mark.parametrize("objective", ["soft_labels", "lelp"])
def test_an_influence_is_what_a_step_on_the_text_alone_adds_to_first_order(student, texts, judge, objective):
    """Of LELP too, where the body and the output layer feel different terms."""
    trainer = lelp_trainer(student, texts) if objective == "lelp" else make_trainer(student)
    trainer.train([texts], [1.0], 10)
    moves = [torch.ones_like(p) for p in student.model.parameters()]
    found, slope, expected = influences(trainer, texts, moves, judge), reward_gradient(student, judge), []
    for i in range(len(texts)):
        loss = trainer._loss(texts, np.array([i]))
        gradients = torch.autograd.grad(loss, list(student.model.parameters()), allow_unused=True)
        both = zip(gradients, moves, slope, strict=True)
        expected.append(-sum(float((g * move * s).sum()) for g, move, s in both if g is not None))
    assert np.corrcoef(found, expected)[0, 1] > 0.99
    assert np.std(found) == pytest.approx(np.std(expected), rel=0.05)


def test_influences_look_as_far_back_as_ahead_and_no_farther_than_is_linear(trainer, texts, judge, monkeypatch):
    def weights():
        return torch.cat([p.detach().flatten() for p in trainer.student.model.parameters()])

    before, seen, losses = weights(), [], trainer.losses
    monkeypatch.setattr(trainer, "losses", lambda data: seen.append(weights() - before) or losses(data))
    influences(trainer, texts, trainer.moves_per_gradient(texts), judge)
    assert [float(step.norm() / before.norm()) for step in seen] == pytest.approx(2 * [reward.REACH], rel=0.02)
    assert torch.nn.functional.cosine_similarity(*seen, dim=0) < -0.99


def test_rewards_and_influences_take_four_steps_on_all_texts_and_take_them_back(
    student, trainer, texts, judge, monkeypatch
):
    student.model.dropout = torch.nn.Dropout(0.3)
    before, steps, real = student.snapshot(), [], KDTrainer._step

    def step(trial, data, indices):
        steps.append((sorted(indices), trial._optimizer.param_groups[0]["lr"] / CONFIG.peak_rate))
        real(trial, data, indices)

    monkeypatch.setattr(KDTrainer, "_step", step)

    def worth(kept, order=0):
        with reward.real_steps(trainer, kept, order):
            return reward_score(student, judge)

    found = worth(texts)
    assert [batch for batch, _ in steps] == [list(range(24))] * 4
    rates = np.array([rate for _, rate in steps])
    assert rates @ (1 - 0.9 ** np.arange(1, 5)) == pytest.approx(reward.TRAVELLED, abs=1e-3), "momentum starts at 0"
    assert found == worth(texts) != worth(texts, order=1), "another order is another dropout"
    assert found != worth(texts.take(np.arange(0))) == reward_score(student, judge)
    reward.candidate_influences(trainer, texts, texts, judge)
    assert [rate for _, rate in steps[-4:]] == pytest.approx(reward.PART_OF_THE_WAY * rates)
    assert all(torch.equal(before[name], value) for name, value in student.snapshot().items())


def test_labels_are_scored_at_the_temperature_that_suits_them(student, judge):
    logits = run_student(student, judge.encoded)[0]
    assert np.array_equal(reward.label_scores(student, judge), calibrated_log_likelihoods(logits, judge.labels))


def test_measuring_leaves_student_and_optimiser_as_they_were(student, trainer, texts, judge):
    weights = student.snapshot()
    moments = {p: s["exp_avg_sq"].clone() for p, s in trainer._optimizer.state.items()}
    moves = trainer.moves_per_gradient(texts)
    influences(trainer, texts, moves, judge)
    again = trainer.moves_per_gradient(texts)  # whatever gradients the last step has left
    assert all(torch.equal(first, second) for first, second in zip(moves, again, strict=True))
    assert all(torch.equal(weights[name], value) for name, value in student.snapshot().items())
    assert all(torch.equal(moments[p], s["exp_avg_sq"]) for p, s in trainer._optimizer.state.items())
    assert all(p.grad is None for p in student.model.parameters())


def test_slopes_foretell_real_steps_on_halves_of_the_texts(student, trainer, judge):
    texts, rng = make_set(student, 64, seed=9), np.random.default_rng(0)
    one_batch = replace(CONFIG, batch_size=32, learning_rate=3e-4, round_steps=2, warmup_steps=0)
    found = influences(trainer, texts, trainer.moves_per_gradient(texts), judge)
    foretold, real, before = [], [], student.snapshot()
    for _ in range(10):
        half = rng.permutation(64)[:32]
        trainer.on_trial(one_batch).train([texts.take(half)], [1.0], 2, evaluate=False)
        foretold.append(found[half].mean())
        real.append(score(student, judge))
        student.restore(before)
    assert spearmanr(foretold, real).statistic > 0.5
