"""Agents and rules share one interface, one keep rate, and know only what they may."""

import dataclasses

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from l2a.cards import list_cards
from l2a.errors import RunError, UsageError
from l2a.selector.agents import algorithm_class, load_agent
from l2a.selector.config import SelectorConfig
from l2a.selector.features import candidate_features
from l2a.selector.numerics import kl_divergence, ranks_within, softmax
from l2a.selector.problem import SelectionProblem, keep_best
from l2a.selector.rules import RULES
from l2a.selector.select import select
from l2a.selector.separation import separation
from l2a.selector.surrogate import RIDGE, Heads, build_surrogate, surrogate_reward

QUICK = SelectorConfig(batch=16, episode_steps=4, training_steps=256, snapshots=2, real_evaluations=5)
LEARNED = ("a2c", "dvrl", "ppo", "reinforce")


def rng():
    return np.random.default_rng(0)


def test_every_shipped_card_is_valid():
    cards = {name: load_agent(name) for name in list_cards("agents")}
    assert {name for name, card in cards.items() if card.rule is None} == set(LEARNED)
    assert {card.rule for card in cards.values() if card.rule} == set(RULES)
    for name in LEARNED:
        algorithm_class(cards[name])


@pytest.mark.parametrize("keep_rate", [0.1, 0.5, 0.77])
@pytest.mark.parametrize("agent", [*sorted(set(RULES) - {"all"}), "ppo"])
def test_every_agent_keeps_exactly_the_asked_share(problem, agent, keep_rate):
    config = dataclasses.replace(QUICK, agent=agent, keep_rate=keep_rate)
    selection = select(problem, config, rng())
    assert selection.kept.sum() == round(keep_rate * len(problem))
    assert selection.scores.shape == (len(problem),)
    assert selection.scores.dtype == np.float32
    for label in np.unique(problem.classes):
        scores, kept = (values[problem.classes == label] for values in (selection.scores, selection.kept))
        assert scores[kept].min() >= scores[~kept].max()


def test_all_keeps_everything(problem):
    assert select(problem, dataclasses.replace(QUICK, agent="all"), rng()).kept.all()


@pytest.mark.parametrize("agent", LEARNED)
def test_learning_is_the_same_for_the_same_seed(problem, agent):
    config = dataclasses.replace(QUICK, agent=agent)
    first = select(problem, config, rng())
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    second = select(problem, config, rng())
    assert np.array_equal(first.scores, second.scores)
    assert not np.array_equal(first.scores, select(problem, config, np.random.default_rng(1)).scores)


def test_training_leaves_the_global_generators_alone(problem, global_generators):
    before = global_generators(), torch.get_num_threads()
    select(problem, QUICK, rng())
    assert (global_generators(), torch.get_num_threads()) == before


def test_training_can_go_on_from_a_policy(problem):
    first = select(problem, QUICK, rng())
    weights = first.policy.network.score.weight.clone()
    second = select(problem, QUICK, rng(), start_from=first.policy)
    assert torch.equal(first.policy.network.score.weight, weights)  # the given policy is not changed
    assert not torch.equal(second.policy.network.score.weight, weights)
    assert second.policy.feature_names == first.policy.feature_names


@pytest.mark.parametrize("size", [2, 5, 33])
def test_small_pools_are_handled(make_problem, size):
    problem, _ = make_problem(size=size, reward=1)
    assert select(problem, QUICK, rng()).kept.sum() == max(1, round(size / 2))


def test_many_classes_are_handled(make_problem):
    problem, _ = make_problem(size=64, classes=5)
    for agent in [*RULES, "ppo"]:
        assert np.isfinite(select(problem, dataclasses.replace(QUICK, agent=agent), rng()).scores).all()


@pytest.mark.slow
def test_the_trained_policy_beats_random_selection(make_problem):
    problem, good = make_problem(size=512)
    config = SelectorConfig(training_steps=10_000)
    learned, random = (select(problem, dataclasses.replace(config, agent=agent), rng()) for agent in ("ppo", "random"))
    surrogate = build_surrogate(problem)
    assert surrogate_reward(surrogate, learned.kept) > surrogate_reward(surrogate, random.kept) + 0.03
    assert good[learned.kept].mean() > good[random.kept].mean() + 0.1


def test_the_problem_holds_no_labels_but_those_of_the_reward_split(problem):
    integers = {
        name
        for name, value in vars(problem).items()
        if isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.integer)
    }
    assert integers == {"reward_labels"}
    assert {field.name for field in dataclasses.fields(SelectionProblem)} == {
        "pool",
        "student_features",
        "student_logits",
        "head_weight",
        "head_bias",
        "reward_features",
        "reward_labels",
        "real_reward",
    }


def test_rules_do_not_depend_on_the_reward_split(problem):
    other = dataclasses.replace(problem, reward_labels=1 - problem.reward_labels)
    for rule in RULES.values():
        assert np.array_equal(rule(problem, rng()), rule(other, rng()))


def test_rules_prefer_what_they_say(problem):
    teacher, student = problem.pool.teacher.probabilities(), softmax(problem.student_logits)
    kept = {name: keep_best(rule(problem, rng()), 0.5, problem.classes) for name, rule in RULES.items()}
    values = {
        "nearest": problem.pool.log_density,
        "confidence": teacher.max(axis=1),
        "glitter": kl_divergence(teacher, student),
        "llkd": teacher.max(axis=1) - student.max(axis=1),
        "low_variance": -np.abs(teacher[:, 0] - teacher[:, 0].mean()),
    }
    for name, preferred in values.items():
        assert preferred[kept[name]].mean() > preferred[~kept[name]].mean()


def test_llkd_takes_the_same_share_of_each_class(problem):
    classes = problem.pool.teacher.logits.argmax(axis=1)
    scores = RULES["llkd"](problem, rng())
    kept = scores >= np.quantile(scores, 0.7)  # without regard to the classes
    shares = [kept[classes == c].mean() for c in (0, 1)]
    assert shares[0] == pytest.approx(shares[1], abs=0.1)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 60), st.floats(0.01, 1.0), st.integers(1, 4), st.integers(0, 1000))
def test_the_best_of_each_class_are_kept_as_many_as_asked(size, keep_rate, classes, seed):
    generator = np.random.default_rng(seed)
    scores, labels = generator.integers(0, 5, size).astype(np.float32), generator.integers(0, classes, size)
    kept = keep_best(scores, keep_rate, labels)
    assert kept.sum() == max(1, round(keep_rate * size))
    for label in range(classes):
        mine = labels == label
        assert abs(kept[mine].sum() - keep_rate * mine.sum()) <= 2
        if kept[mine].any() and not kept[mine].all():
            assert scores[mine & kept].min() >= scores[mine & ~kept].max()


def test_a_policy_cannot_choose_a_class(problem):
    """What prefers one class for all it is worth keeps the pool's mixture."""
    kept = keep_best(problem.pool.teacher.probabilities()[:, 1], 0.5, problem.classes)
    assert problem.classes[kept].mean() == pytest.approx(problem.classes.mean(), abs=0.02)


def test_ranks_within_groups():
    ranks = ranks_within(np.array([3.0, 1.0, 9.0, 2.0], np.float32), np.array([0, 0, 1, 0]))
    np.testing.assert_allclose(ranks, [1.0, 1 / 3, 1.0, 2 / 3], atol=1e-6)


def test_features_are_standardised_and_found_by_name(problem):
    features = candidate_features(problem)
    assert np.isfinite(features.matrix).all()
    assert np.abs(features.matrix).max() <= 5.0
    column = features.matrix[:, features.names.index("log_density")]
    assert abs(np.median(column)) < 1e-5
    picked = candidate_features(problem, ("operator=absent", "log_density"))
    assert np.array_equal(picked.matrix[:, 1], column)
    assert not picked.matrix[:, 0].any()


def test_a_head_is_the_ridge_regression_of_the_teacher_on_what_was_kept(problem, monkeypatch):
    """In closed form, whatever the order and however the candidates were dealt to the steps."""
    monkeypatch.setattr("l2a.selector.surrogate.PRIOR", 0.001)
    surrogate, order = build_surrogate(problem), rng().permutation(64)
    heads = Heads(surrogate, 2)
    for part in (slice(0, 16), slice(16, 64)):
        heads.learn(np.stack([np.arange(64), order])[:, part], np.ones((2, part.stop - part.start), bool))
    x, y, classes = surrogate.directions[:64], surrogate.targets[:64], surrogate.classes
    pool, kept = (np.bincount(part, minlength=2) / len(part) for part in (classes, classes[:64]))
    weight = (pool / kept)[classes[:64], None] / 64  # each class counts as it does in the pool
    x, y = x - (weight * x).sum(axis=0), y - (weight * y).sum(axis=0)
    expected = np.linalg.solve((weight * x).T @ x + RIDGE * np.eye(x.shape[1]), (weight * x).T @ y)
    np.testing.assert_allclose(heads.weight[0], expected, atol=1e-3)
    np.testing.assert_allclose(heads.weight[1], heads.weight[0], atol=1e-4)


def test_dropped_candidates_do_not_move_the_heads(problem):
    heads = Heads(build_surrogate(problem), 2)
    kept = np.zeros((2, 8), bool)
    kept[1, :4] = True
    heads.learn(np.arange(16).reshape(2, 8), kept)
    assert heads.log_likelihood[0] == heads.start
    assert heads.log_likelihood[1] != heads.start


def test_before_any_candidate_a_head_is_that_of_the_target(problem):
    right = np.linalg.lstsq(problem.reward_features, np.eye(2)[problem.reward_labels], rcond=None)[0]
    heads = {"right": 8 * right.astype(np.float32), "none": np.zeros_like(problem.head_weight)}
    starts = {name: Heads(build_surrogate(dataclasses.replace(problem, head_weight=head)), 1).start
              for name, head in heads.items()}  # fmt: skip
    assert starts["right"] > starts["none"] + 0.1
    assert starts["none"] == pytest.approx(np.log(0.5), abs=0.05)


@pytest.mark.parametrize("classes", [2, 5])
def test_separation_ignores_confidence_and_thresholds_but_not_the_order(classes):
    labels = np.arange(200) % classes
    logits = (np.eye(classes)[labels] + rng().normal(size=(200, classes))).astype(np.float32)
    plain = separation(logits, labels)
    moved = separation(7 * logits + np.arange(classes, dtype=np.float32), labels)
    assert moved == pytest.approx(plain, abs=1e-4)
    worse = logits + 2 * np.random.default_rng(1).normal(size=logits.shape).astype(np.float32)
    assert plain > separation(worse, labels) > separation(-logits, labels)
    both = separation(np.stack([logits, worse]), labels)
    np.testing.assert_allclose(both, [plain, separation(worse, labels)], atol=1e-5)


@pytest.mark.parametrize("field", ["student_features", "student_logits", "head_weight", "reward_features"])
def test_a_wrong_shape_is_refused_by_name(problem, field):
    with pytest.raises(UsageError, match=field):
        dataclasses.replace(problem, **{field: getattr(problem, field)[:, :1]})


def test_a_diverged_student_is_refused(problem):
    logits = problem.student_logits.copy()
    logits[3, 0] = np.nan
    with pytest.raises(RunError, match="student_logits"):
        dataclasses.replace(problem, student_logits=logits)


@pytest.mark.parametrize(
    ("field", "value"),
    [("keep_rate", 0.0), ("keep_rate", 1.5), ("batch", 0), ("training_steps", 0), ("real_evaluations", -1)],
)
def test_wrong_options_are_refused_by_name(field, value):
    with pytest.raises(UsageError, match=f"selector.{field}"):
        SelectorConfig(**{field: value})


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ({"algorithm": "stable_baselines3.DQN"}, "MultiBinary"),
        ({"algorithm": "stable_baselines3.Nothing"}, "cannot be imported"),
        ({"algorithm": "PPO"}, "cannot be imported"),
        ({"algorithm": "rule: best"}, "no rule 'best'"),
        ({"algorithm": "stable_baselines3.PPO", "hyperparameters": {"speed": 1}}, "speed"),
        ({"algorithm": "stable_baselines3.PPO", "enviroments": 1}, "did you mean 'environments'"),
    ],
)
def test_a_wrong_card_is_refused_in_words(problem, tmp_path, monkeypatch, card, message):
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "mine.yaml").write_text(yaml.safe_dump({"description": "A trial.", **card}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        select(problem, dataclasses.replace(QUICK, agent="mine"), rng())
