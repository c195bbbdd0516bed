"""Agents and rules share one interface, one keep rate, and know only what they may."""

from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from scipy.special import softmax

from l2a.config import SelectorConfig
from l2a.selector.agents import AgentCard, check_agent, load_agent
from l2a.selector.arms import pool_arms, thompson
from l2a.selector.problem import RULES, candidate_features, in_shares, keep_best, kl_divergence, quantiles
from l2a.selector.reward import surrogate_of, surrogate_reward
from l2a.selector.select import select
from l2a.util import RunError, UsageError, list_cards

from .conftest import QUICK, global_generators, make_problem, rng

LEARNED = ("a2c", "dvrl", "ppo", "reinforce")
OF_ARMS = ("bandit", "shares")


def test_every_shipped_card_is_valid():
    cards = {name: load_agent(name) for name in list_cards("agents")}
    assert {name for name, card in cards.items() if card.rule is None} == {*LEARNED, *OF_ARMS, "pretrained"}
    assert {card.rule for card in cards.values() if card.rule} == set(RULES)
    for name in cards:
        check_agent(name)
    assert SelectorConfig().agent == "all"


@pytest.mark.parametrize("keep_rate", [0.1, 0.5, 0.77])
@pytest.mark.parametrize("agent", [*sorted(set(RULES) - {"all"}), *OF_ARMS, "ppo", "pretrained"])
def test_every_agent_keeps_exactly_the_asked_share(problem, agent, keep_rate):
    selection = select(problem, replace(QUICK, agent=agent, keep_rate=keep_rate), rng())
    assert selection.kept.sum() == round(keep_rate * len(problem))
    assert selection.scores.shape == (len(problem),) and selection.scores.dtype == np.float32
    for label in np.unique(problem.classes):
        scores, kept = (values[problem.classes == label] for values in (selection.scores, selection.kept))
        assert scores[kept].min() >= scores[~kept].max()


def test_all_keeps_everything(problem):
    assert select(problem, replace(QUICK, agent="all"), rng()).kept.all()


@pytest.mark.parametrize("agent", [*LEARNED, *OF_ARMS])
def test_learning_is_the_same_for_the_same_seed(problem, agent):
    config = replace(QUICK, agent=agent)
    first = select(problem, config, rng())
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    second = select(problem, config, rng())
    assert np.array_equal(first.scores, second.scores)
    assert not np.array_equal(first.scores, select(problem, config, np.random.default_rng(1)).scores)


def test_training_leaves_the_global_generators_alone(problem):
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
def test_small_pools_are_handled(size):
    problem, _ = make_problem(size=size)
    assert select(problem, QUICK, rng()).kept.sum() == max(1, round(size / 2))


def test_many_classes_are_handled():
    problem, _ = make_problem(size=64, classes=5)
    for agent in [*RULES, "ppo"]:
        assert np.isfinite(select(problem, replace(QUICK, agent=agent), rng()).scores).all()


@pytest.mark.slow
def test_the_trained_policy_beats_random_selection():
    (problem, good), config = make_problem(size=512), SelectorConfig(training_steps=10_000)
    learned, random = (select(problem, replace(config, agent=agent), rng()) for agent in ("ppo", "random"))
    surrogate = problem.surrogate()
    assert surrogate_reward(surrogate, learned.kept) > surrogate_reward(surrogate, random.kept) + 0.03
    assert good[learned.kept].mean() > good[random.kept].mean() + 0.1


def test_the_problem_holds_no_labels(problem):
    assert not any(isinstance(v, np.ndarray) and np.issubdtype(v.dtype, np.integer) for v in vars(problem).values())
    known = {"pool", "predict", "surrogate", "real_reward", "veto", "repeated", "oracle"}
    assert {field.name for field in fields(problem)} == known


def test_rules_do_not_depend_on_the_reward_split(problem):
    other = replace(problem, surrogate=None, real_reward=None)
    for rule in RULES.values():
        assert np.array_equal(rule(problem, rng()), rule(other, rng()))


def test_shares_are_found_that_favour_the_arms_that_help():
    """Good candidates are near, so the arms of near ones hold more of them; inside an arm nothing is known."""
    problem, good = make_problem()
    problem = replace(problem, pool=replace(problem.pool, degrees=np.zeros_like(problem.pool.degrees)))  # four arms
    near = problem.pool.log_density >= np.median(problem.pool.log_density)
    for agent, steps in (("bandit", 400), ("shares", 6000)):
        found = select(problem, replace(QUICK, agent=agent, training_steps=steps, keep_rate=0.2, batch=64), rng())
        assert near[found.kept].mean() > 0.8 and good[found.kept].mean() > good.mean() + 0.2
        assert sum(found.diagnostics["arms"].values()) == pytest.approx(1)
        assert len(found.diagnostics["reward_curve"]) > 0 and found.policy is None


def test_arms_are_what_the_pool_has_and_never_too_many():
    pool = make_problem(size=4000)[0].pool
    names, arms = pool_arms(pool)
    assert len(names) == 44 == len(np.unique(arms)) and names[0] == "source, knn, degree 0.0, far"
    many = replace(pool, origins=tuple(f"file {i % 9}:{i}" for i in range(4000)))
    names, arms = pool_arms(many)
    assert len(names) == 48 == len(np.unique(arms)) and "others" in names


def test_arms_get_the_shares_that_are_asked_for(problem):
    arms = np.arange(len(problem)) % 3
    scores = in_shares(np.array([0.7, 0.3, 0.0], np.float32), arms, problem.classes, rng())
    kept = keep_best(scores, 0.25, problem.classes)
    assert np.bincount(arms[kept], minlength=3) / kept.sum() == pytest.approx([0.7, 0.3, 0.0], abs=0.02)


def test_every_origin_is_kept_alike_and_the_ratio_of_densities_weighs(problem):
    origins = tuple(f"{'source' if i % 8 else 'far.txt'}:{i}" for i in range(len(problem)))
    mixed = replace(problem, pool=replace(problem.pool, origins=origins))
    kept = {name: keep_best(RULES[name](mixed, rng()), 0.2, mixed.classes) for name in RULES}
    far = np.arange(len(problem)) % 8 == 0
    assert far[kept["random_per_origin"]].mean() == pytest.approx(0.5, abs=0.03)
    assert far[kept["random"]].mean() < 0.3
    probability = mixed.pool.domain_probability
    drawn, nearest = probability[kept["domain_ratio"]], np.sort(probability)[-int(kept["random"].sum()) :]
    assert probability.mean() + 0.15 < drawn.mean() < nearest.mean()
    again = RULES["domain_ratio"](mixed, np.random.default_rng(1))
    assert not np.array_equal(keep_best(again, 0.2, mixed.classes), kept["domain_ratio"]), "by chance, too"


def test_candidates_that_are_surely_of_the_target_have_finite_scores(problem):
    sure = replace(problem.pool, domain_probability=np.ones_like(problem.pool.domain_probability))
    assert np.isfinite(RULES["domain_ratio"](replace(problem, pool=sure), rng())).all()


def test_thompson_sampling_sees_a_candidate_once_in_a_batch():
    problem = make_problem(size=6)[0]
    surrogate, arms = problem.surrogate(), np.array([0, 1, 0, 1, 0, 1])
    shares, rewards = thompson(SimpleNamespace(surrogate=surrogate, batch=3), arms, 40, seed=0)
    of_arms = [surrogate_reward(surrogate, arms == arm) for arm in (0, 1)]
    assert {round(reward, 4) for reward in rewards} <= {round(gain, 4) for gain in of_arms} and shares.sum() == 1


def test_thompson_sampling_leaves_a_small_arm_that_harms(problem):
    """It holds fewer candidates than a batch, so that one pull shows all of them; there the labels are turned round."""
    surrogate, arms = problem.surrogate(), (np.arange(len(problem)) >= 20).astype(np.int64)
    rows = surrogate.rows.copy()
    rows[:20, -2:] *= -20
    shares, _ = thompson(SimpleNamespace(surrogate=replace(surrogate, rows=rows), batch=32), arms, 200, seed=0)
    assert shares[0] < 0.05


def test_without_spare_labels_there_is_no_oracle(problem):
    with pytest.raises(UsageError, match="spare texts"):
        RULES["oracle"](replace(problem, oracle=None), rng())


def test_rules_prefer_what_they_say(problem):
    teacher, student = problem.pool.teacher.probabilities(), softmax(problem.student_logits, axis=1)
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
    classes, scores = problem.pool.teacher.logits.argmax(axis=1), RULES["llkd"](problem, rng())
    kept = scores >= np.quantile(scores, 0.7)  # without regard to the classes
    assert kept[classes == 0].mean() == pytest.approx(kept[classes == 1].mean(), abs=0.1)


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


def test_ranks_within_groups():
    ranks = quantiles(np.array([3.0, 1.0, 9.0, 2.0], np.float32), np.array([0, 0, 1, 0]))
    np.testing.assert_allclose(ranks, [1.0, 1 / 3, 1.0, 2 / 3], atol=1e-6)


def test_features_are_standardised_and_found_by_name(problem):
    features = candidate_features(problem)
    assert np.isfinite(features.matrix).all() and np.abs(features.matrix).max() <= 5.0
    column = features.matrix[:, features.names.index("log_density")]
    assert abs(np.median(column)) < 1e-5
    picked = candidate_features(problem, ("operator=absent", "log_density"))
    assert np.array_equal(picked.matrix[:, 1], column) and not picked.matrix[:, 0].any()


def test_what_does_not_fit_the_pool_or_is_not_finite_is_refused_by_name(problem):
    logits = problem.student_logits
    for error, changed in ((UsageError, logits[1:]), (RunError, logits * np.nan)):
        with pytest.raises(error, match="the student's logits"):
            replace(problem, predict=lambda changed=changed: changed).student_logits  # noqa: B018
    with pytest.raises(UsageError, match="of 96 candidates"):
        surrogate_of(replace(problem, surrogate=make_problem(size=96)[0].surrogate))
    with pytest.raises(UsageError, match="surrogate is None"):
        surrogate_of(replace(problem, surrogate=None))


def test_rules_ask_for_what_they_read_alone(problem):
    """The surrogate is for policies, and of the rules only those that compare student and teacher ask the student."""
    asked = []
    for rule in RULES:
        lazy = replace(problem, predict=lambda rule=rule: asked.append(rule) or problem.student_logits, surrogate=None)
        select(lazy, replace(QUICK, agent=rule), rng())
    assert asked == ["glitter", "llkd"]


WRONG = [("keep_rate", 0.0), ("keep_rate", 1.5), ("batch", 0), ("training_steps", 0), ("real_evaluations", -1)]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_wrong_options_are_refused_by_name(field, value):
    with pytest.raises(UsageError, match=f"selector.{field}"):
        SelectorConfig(**{field: value})


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ({"algorithm": "stable_baselines3.DQN"}, "MultiBinary"),
        ({"algorithm": "stable_baselines3.Nothing"}, "cannot be imported"),
        ({"algorithm": "PPO"}, "outside stable_baselines3"),
        ({"algorithm": "rule: best"}, "no rule 'best'"),
        ({"algorithm": "stable_baselines3.PPO", "hyperparameters": {"speed": 1}}, "hyperparameters.*speed"),
        ({"algorithm": "stable_baselines3.PPO", "hyperparameters": {"learning_rate": -1}}, "hyperparameters.*rate"),
        ({"algorithm": "stable_baselines3.PPO", "hyperparameters": {"learning_rate": "fast"}}, "hyperparameters"),
        ({"algorithm": "stable_baselines3.PPO", "enviroments": 1}, "did you mean 'environments'"),
    ],
)
def test_a_wrong_card_is_refused_in_words(problem, write_card, card, message):
    write_card(**card)
    with pytest.raises(UsageError, match=message):
        select(problem, replace(QUICK, agent="mine"), rng())
    if "hyperparameters" not in card:  # which only the algorithm knows; the rest is refused before anything is trained
        with pytest.raises(UsageError, match=message):
            check_agent("mine")


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": "l2a.selector.arms.thompson"}, {"algorithm": "rule: nearest", "acts_on": "arms"},
        {"algorithm": "l2a.selector.algorithms.DVRL", "acts_on": "arms"},
        {"algorithm": "stable_baselines3.PPO", "acts_on": "arms", "policy": "trained"},
    ],
)  # fmt: skip
def test_a_card_of_arms_that_cannot_work_is_refused(changes):
    with pytest.raises(UsageError, match=r"acts_on is '(arms|candidates)' with the algorithm"):
        AgentCard("A card.", **changes)
