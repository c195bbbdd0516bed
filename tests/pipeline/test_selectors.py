"""Policies on their own, over tiny pairs of domains."""

import dataclasses

import numpy as np
import pytest
import torch

from l2a.config import override
from l2a.data.examples import Examples, HeldOut, normalised_hash
from l2a.pipeline import policies
from l2a.pipeline.data import load_run_data
from l2a.pipeline.policies import ORACLES, open_policy, pair_name, prepare_pair, train_selector
from l2a.pipeline.session import RunContext, mixture
from l2a.pipeline.students import near_and_clean, spare_labels, train_l2a_student
from l2a.selector.problem import RULES
from l2a.selector.reward import marginal_gains, real_updates, reward_score
from l2a.util.errors import UsageError
from tests.conftest import LABELS, write_domain


@pytest.fixture(scope="module")
def pairs(config, tmp_path_factory):
    """The run's pair, and one with another target."""
    other = write_domain(tmp_path_factory.mktemp("other") / "other.jsonl", 150, seed=4, prefix="a battery ")
    return [config, override(config, {"target": str(other)})]


@pytest.fixture(scope="module")
def policy_folder(pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policies") / "policy"
    train_selector(pairs, folder)
    return folder


@pytest.fixture(scope="module")
def prepared(config):
    return prepare_pair(config)


def test_one_policy_is_trained_on_several_pairs(pairs, policy_folder):
    policy = open_policy(str(policy_folder))
    assert policy.facts["pairs"] == [pair_name(pair) for pair in pairs] and policy.agent == "ppo"
    assert policy.facts["seeds"] == [0] and policy.facts["steps"] >= 64 and len(policy.facts["reward_curve"]) > 0
    assert {"torch", "stable-baselines3", "l2a"} <= policy.facts["versions"].keys()


@pytest.mark.slow
def test_the_same_seed_trains_the_same_policy(pairs, policy_folder, tmp_path):
    train_selector(pairs, tmp_path / "again")
    first, second = ((folder / "policy.safetensors").read_bytes() for folder in (policy_folder, tmp_path / "again"))
    assert first == second


@pytest.mark.slow
def test_a_policy_is_compared_with_every_rule(config, policy_folder):
    policy = open_policy(str(policy_folder))
    result, again = (policies.evaluate_policy(config, policy, updates=3) for _ in range(2))
    assert result == again  # every selection starts from one state
    kept = {verdict.name: verdict.kept for verdict in result.verdicts}
    assert list(kept) == ["policy", *(name for name in RULES if name != "oracle")] and result.updates == 3
    assert {count for name, count in kept.items() if name != "all"} == {kept["all"] // 2}
    assert len({verdict.real for verdict in result.verdicts}) > 1 and -1 <= result.correlation <= 1
    assert np.isfinite([(verdict.surrogate, verdict.real) for verdict in result.verdicts]).all()


@pytest.mark.slow
def test_a_policy_is_explained_on_a_pair(config, policy_folder):
    found = policies.explain_policy(config, open_policy(str(policy_folder)))
    assert "teacher_student_kl" in found.importances and "operator" in found.importances
    assert len(found.kept_texts) == len(found.dropped_texts) == 10


def test_headroom_reads_labels_that_no_run_reads_and_is_known_to_later_runs(config, tmp_path):
    target = write_domain(tmp_path / "target.jsonl", 260, seed=2, prefix="this phone ")
    quick = {"selector.keep_rate": 0.25, "kd.warmup_steps": 5, "kd.round_steps": 4}
    changed = override(config, {"target": str(target), **quick})
    context = RunContext(changed)
    assert policies.known_headroom(context) == {}
    found, splits = policies.measure_headroom(changed), context.data.splits
    rows = {row["name"]: row for row in found["verdicts"]}
    kept = {**dict.fromkeys((*ORACLES, "random"), 8), "all": 32, "none": 0}
    assert {name: row["kept"] for name, row in rows.items()} == kept
    best = max(rows[name]["accuracy"] for name in ORACLES)
    assert found["points"] == pytest.approx(100 * (best - rows["random"]["accuracy"]), abs=1e-4) and found["noise"] >= 0
    seen, unseen = spare_labels(context)
    assert len(seen) == found["labels"] and found["judged_on"] <= len(unseen)
    parts = [splits.train, splits.reward, splits.validation, context.data.target.test.reveal()]
    used = [{normalised_hash(text) for text in part.inputs} for part in (*parts, seen, unseen)]
    used += [set(map(normalised_hash, part)) for part in context.set_apart]
    assert sum(map(len, used)) == len(set().union(*used)), "no text is in two of them"
    known = policies.known_headroom(RunContext(override(changed, {"seed": 5, "selector.agent": "dvrl"})))
    assert known["points"] == found["points"] and "can" in policies.headroom_note(known)
    assert "no selector can win" in policies.headroom_note({**known, "points": 0.9})
    for other in ({"kd.pool_size": 33}, {"dev_shots": 5}, {"target_columns.text": "text"}):
        assert policies.known_headroom(RunContext(override(changed, other))) == {}


def test_an_oracle_without_spare_labels_is_refused(config):
    with pytest.raises(UsageError, match="labels in train that no run reads"):
        spare_labels(RunContext(config))


def test_saved_policies_see_what_the_student_says_whatever_the_configured_agent(config, prepared):
    """Of a pair to compare them on, or to explain them; the default agent keeps everything without asking it."""
    found = prepare_pair(override(config, {"selector.agent": "all"})).problem.student_logits
    assert np.array_equal(found, prepared.problem.student_logits) and np.ptp(found) > 0


def test_the_oracle_keeps_unchanged_texts_near_the_target(prepared, monkeypatch):
    drawn, context = prepared.drawn, prepared.session.context
    unchanged = np.array(drawn.pool.operators) == "source"
    near = drawn.pool.inputs[int(unchanged.argmax())]
    seen = Examples((near,) * 8, np.zeros(8, np.int64), LABELS)
    monkeypatch.setattr("l2a.pipeline.students.spare_labels", lambda _: (seen, seen))
    scores = near_and_clean(context, drawn)
    assert scores[unchanged].min() > scores[~unchanged].max() and drawn.pool.inputs[int(scores.argmax())] == near


def flip_labels(monkeypatch, config, part):
    """Let a run read the other labels in one of its splits."""
    data = load_run_data(config)
    flipped = {part: dataclasses.replace(split := getattr(data.splits, part), labels=1 - split.labels)}
    changed = dataclasses.replace(data, splits=dataclasses.replace(data.splits, **flipped))
    monkeypatch.setattr("l2a.pipeline.session.load_run_data", lambda *_: changed)


def test_neither_test_nor_model_choice_labels_reach_a_selector(config, prepared, monkeypatch):
    """What an environment is made of stays the same to the bit when those labels are flipped, and the test is shut."""
    assert config.teacher.learns_from == "both"  # the choice of the teacher may read validation labels
    plain = prepared.problem
    flip_labels(monkeypatch, config, "validation")
    monkeypatch.setattr(HeldOut, "reveal", lambda self: pytest.fail("the test split was opened"))
    other = prepare_pair(config).problem
    assert other.pool.inputs == plain.pool.inputs and np.array_equal(other.student_logits, plain.student_logits)
    assert np.array_equal(marginal_gains(other.surrogate()), marginal_gains(plain.surrogate()))
    kept = np.arange(len(plain)) % 2 == 0
    assert other.real_reward(kept) == plain.real_reward(kept)


def test_the_real_reward_judges_candidates_and_not_their_order(prepared):
    """The same candidates in another order get the same reward; other candidates do not; the student is untouched."""
    problem, session, candidates = prepared.problem, prepared.session, prepared.drawn.candidates
    kept, before = np.arange(len(problem)) % 2 == 0, session.student.snapshot()
    chosen, rewards = np.flatnonzero(kept), []
    for order in (chosen, chosen[::-1]):
        with real_updates(session.trainer, *mixture(session, candidates.take(order))):
            rewards.append(reward_score(session.student, session.reward))
    assert rewards[0] == problem.real_reward(kept) != problem.real_reward(~kept)
    assert rewards[0] == pytest.approx(rewards[1], abs=0.02)
    assert all((value == before[name]).all() for name, value in session.student.snapshot().items())


def test_a_run_trains_no_saved_policy(config, policy_folder, monkeypatch):
    """The run goes on to say who chose."""
    monkeypatch.setattr("l2a.selector.select.train_agent", lambda *_: pytest.fail("a trained policy was trained"))
    changes = {"selector.agent": str(policy_folder), "kd.rounds": 1, "kd.warmup_steps": 5, "kd.pool_size": 24}
    saved = open_policy(str(policy_folder)).network.state_dict()
    (done,) = train_l2a_student(RunContext(override(config, changes))).rounds
    assert done.selection.agent == str(policy_folder)
    assert all((saved[name] == value).all() for name, value in done.selection.policy.network.state_dict().items())


def test_the_reward_split_does_not_choose_the_model(config, monkeypatch):
    """Without a policy those labels train and choose nothing: flipped, they give the same student to the bit."""
    monkeypatch.setattr("l2a.pipeline.session.refuse_useless_teacher", lambda *_: 1.0)
    changed = override(config, {"selector.agent": "confidence", "kd.rounds": 1, "kd.warmup_steps": 5})
    plain = train_l2a_student(RunContext(changed))
    flip_labels(monkeypatch, changed, "reward")
    again = train_l2a_student(RunContext(changed))
    assert again.score.log_likelihood == plain.score.log_likelihood
    assert torch.equal(again.student.output.weight, plain.student.output.weight)


def test_what_does_not_learn_is_not_trained_and_a_policy_is_not_overwritten(config, policy_folder):
    refused = {"nearest": "does not learn", str(policy_folder): "does not learn", "ppo": "--overwrite"}
    for agent, said in refused.items():
        with pytest.raises(UsageError, match=said):
            train_selector([override(config, {"selector.agent": agent})], policy_folder)
