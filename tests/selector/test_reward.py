"""The real reward, and the surrogate of an output layer fitted on what is kept."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from scipy.special import log_softmax, softmax
from scipy.stats import spearmanr

from l2a.kd.losses import soft_label_loss
from l2a.kd.trainer import KDTrainer, calibrated_log_likelihoods, run_student
from l2a.selector import reward
from l2a.selector.reward import Gains, fit_surrogate, marginal_gains, reward_score, surrogate_reward, view
from l2a.util import RunError
from tests.kd.test_trainer import CONFIG, make_set, make_trainer

from .conftest import make_problem


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


def test_the_score_is_the_divergence_from_the_teacher_at_the_best_temperature_and_thresholds(student, judge):
    logits, score = torch.from_numpy(run_student(student, judge.encoded)[0]), reward_score(student, judge)
    assert -float(soft_label_loss(logits, torch.from_numpy(judge.teacher.logits), 1.0).mean()) < score < 0
    with torch.no_grad():
        student.output.weight.mul_(3.0)
        student.output.bias.mul_(3.0).add_(torch.arange(len(student.output.bias)))
    assert reward_score(student, judge) == pytest.approx(score, abs=1e-4)
    same = replace(judge, teacher=replace(judge.teacher, logits=run_student(student, judge.encoded)[0] / 2))
    assert reward_score(student, same) == pytest.approx(0, abs=1e-5)
    assert reward_score(student, judge.take(np.arange(0))) == 0, "a number, so that the page of a run can show it"


def test_real_updates_are_those_of_a_round_and_are_taken_back(student, trainer, texts, judge, monkeypatch):
    student.model.dropout = torch.nn.Dropout(0.3)
    before, rates, real = student.snapshot(), [], KDTrainer._step

    def step(trial, *rest):
        rates.append(trial._optimizer.param_groups[0]["lr"] / CONFIG.peak_rate)
        real(trial, *rest)

    monkeypatch.setattr(KDTrainer, "_step", step)

    def worth(part, order=0):
        with reward.real_updates(trainer, [part, texts], [0.9, 0.1], order=order):
            return reward_score(student, judge)

    found = worth(texts.take(np.arange(8)))
    assert len(rates) == reward.REAL_UPDATES and max(rates) == pytest.approx(1) and rates[-1] < 0.1
    assert found == worth(texts.take(np.arange(8))) != worth(texts.take(np.arange(8)), order=1)
    assert found != worth(texts.take(np.arange(8, 16)))
    assert all(torch.equal(before[name], value) for name, value in student.snapshot().items())


def test_real_updates_are_taken_back_whatever_goes_wrong(student, trainer, texts):
    before = student.snapshot()
    with pytest.raises(KeyboardInterrupt), reward.real_updates(trainer, [texts], [1.0], updates=2):
        raise KeyboardInterrupt
    assert all(torch.equal(before[name], value) for name, value in student.snapshot().items())


def test_labels_are_scored_at_the_temperature_that_suits_them(student, judge):
    logits = run_student(student, judge.encoded)[0]
    assert np.array_equal(reward.label_scores(student, judge), calibrated_log_likelihoods(logits, judge.labels))


def test_the_views_of_texts_are_what_student_and_teacher_say(student, texts):
    seen = view(student, texts)
    assert np.array_equal(seen.teacher, texts.teacher.logits) and seen.states.shape == (24, student.output.in_features)
    np.testing.assert_allclose(seen.student, run_student(student, texts.encoded)[0], atol=0.05)
    np.testing.assert_allclose(seen.gaps.sum(axis=1), 0, atol=1e-5)


def by_hand(surrogate, kept):
    """The gain of a selection, by weighted ridge regression text by text."""
    width = surrogate.judged.shape[1]
    counts = np.bincount(surrogate.classes[kept], minlength=len(surrogate.class_shares))
    weights = surrogate.share * (surrogate.class_shares / (counts + reward.PRIOR * surrogate.class_shares))
    rows, each = surrogate.rows[kept].astype(float), weights[surrogate.classes[kept]]
    both = [surrogate.known.astype(float), surrogate.known + (rows[:, :width] * each[:, None]).T @ rows]
    scores = []
    for moments in both:
        logits = surrogate.judged @ np.linalg.solve(moments[:, :width], moments[:, width:]) + surrogate.judged_student
        scores.append((surrogate.judged_teacher * log_softmax(logits, axis=1)).sum(axis=1).mean())
    return scores[1] - scores[0]


@given(st.integers(0, 1000), st.floats(0.05, 0.9), st.integers(2, 4))
def test_a_selection_gains_what_a_layer_fitted_on_it_does_with_each_class_as_in_the_pool(seed, rate, classes):
    """Whatever the order and however the candidates were dealt to the steps."""
    problem, _ = make_problem(size=96, classes=classes, seed=seed)
    surrogate, generator = problem.surrogate(), np.random.default_rng(seed)
    kept, order, gains = generator.random((1, 96)) < rate, generator.permutation(96), Gains(surrogate, 2)
    for part in (slice(0, 16), slice(16, 96)):
        both = np.stack([np.arange(96), order])[:, part]
        gains.add(both, np.concatenate([kept[:, both[0]], kept[:, both[1]]]))
    assert gains.gain == pytest.approx(by_hand(surrogate, np.flatnonzero(kept[0])), abs=1e-3)
    assert surrogate_reward(surrogate, kept[0]) == pytest.approx(gains.gain[0], abs=1e-3)


def test_dropped_candidates_gain_nothing_and_a_reset_forgets(problem):
    gains, kept = Gains(problem.surrogate(), 2), np.zeros((2, 8), bool)
    kept[1, :4] = True
    gains.add(np.arange(16).reshape(2, 8), kept)
    assert gains.gain[0] == pytest.approx(0, abs=1e-6) and abs(gains.gain[1]) > 1e-5
    gains.reset(np.array([1]))
    gains.add(np.arange(16).reshape(2, 8), np.zeros((2, 8), bool))
    assert gains.gain == pytest.approx(0, abs=1e-6) and not gains.counts.any()


def test_the_layer_reads_the_leading_directions_of_the_states():
    """Texts that differ from the teacher along a direction that hardly varies are not told apart."""
    rng = np.random.default_rng(0)
    states = (rng.normal(size=(400, 24)) * np.r_[3.0, np.ones(15), np.full(8, 1e-3)]).astype(np.float32)
    teacher = np.stack([states[:, 0], -states[:, 0]], axis=1)
    seen = reward.Views(states, np.zeros_like(teacher), teacher)
    surrogate = fit_surrogate(seen, [(seen.take(np.arange(0)), 0.1)], 0.9, seen)
    assert surrogate.rows.shape == (400, reward.DIRECTIONS + 1 + 2)
    assert np.abs(surrogate.rows[:, 0]).std() < 1 and surrogate.rows[:, 0].std() == pytest.approx(1, rel=1e-3)
    gain = surrogate_reward(surrogate, np.ones(400, bool))
    taught = softmax(teacher, axis=1)
    best = (taught * np.log(taught)).sum(axis=1).mean() - np.log(0.5)
    assert 0.9 * best < gain <= best
    with pytest.raises(RunError, match="states are not all finite"):
        fit_surrogate(replace(seen, states=states * np.nan), [], 0.9, seen)


def test_marginal_gains_are_what_a_little_more_of_a_candidate_adds(problem):
    surrogate, little = problem.surrogate(), 2e-3
    width, rows = surrogate.judged.shape[1], surrogate.rows
    everything = surrogate.known + surrogate.share * rows[:, :width].T @ rows / len(rows)
    more = [everything + sign * little * rows[:50, :width, None] * rows[:50, None] for sign in (1, -1)]
    slopes = (surrogate.scores(more[0]) - surrogate.scores(more[1])) / (2 * little)
    assert np.corrcoef(marginal_gains(surrogate)[:50], slopes)[0, 1] > 0.99


@pytest.mark.slow
def test_the_surrogate_foretells_real_updates(student, trainer):
    """Half of the candidates have their labels turned round; selections hold more or fewer of them."""
    texts, judge, rng = make_set(student, 96, seed=9), make_set(student, 200, seed=4), np.random.default_rng(0)
    turned = np.where(np.arange(96)[:, None] % 2, texts.teacher.logits, -texts.teacher.logits)
    texts = replace(texts, teacher=replace(texts.teacher, logits=turned))
    surrogate = fit_surrogate(view(student, texts), [(view(student, judge), 0.1)], 0.9, view(student, judge))
    foretold, real = [], []
    for chance in np.linspace(0, 1, 8):
        kept = rng.permutation(96)
        kept = kept[(kept % 2 == 1) == (rng.random(96) < chance)][:40]
        foretold.append(surrogate_reward(surrogate, np.isin(np.arange(96), kept)))
        with reward.real_updates(trainer, [texts.take(kept)], [1.0]):
            real.append(reward_score(student, judge))
    assert spearmanr(foretold, real).statistic > 0.6
