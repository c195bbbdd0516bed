"""Cards of experiments, their cells, and the keys of these."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.selector import policies
from l2a.config import DistillConfig, override
from l2a.experiments import card
from l2a.experiments.card import cell_files, cell_key, choose, data_files, expand, load_experiment
from l2a.util.errors import UsageError
from tests.conftest import write_domain

from .conftest import CARD, WITH_MORE, write_card


def test_a_card_becomes_a_grid(workspace):
    card = load_experiment("tiny")
    cells = [cell for group in expand(card, workspace / "data") for cell in group]
    assert len(cells) == 2 * 2 * 3 and tuple(card.variants) == tuple(CARD["variants"])
    assert card == load_experiment("configs/experiments/tiny.yaml")
    config = next(cell.config for cell in cells if cell.place.variant == "random" and cell.place.seed == 1)
    assert (config.selector.agent, config.kd.rounds, config.seed, config.max_length) == ("random", 1, 1, 64)


def of_l2a(**overrides):
    return {"variants": {"a": {"method": "l2a_student", "overrides": overrides}}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sheds": [1]}, ["unknown key sheds", "seeds"]),
        ({"variants": {"a": {"method": "l2a_studnt"}}}, ["did you mean 'l2a_student'"]),
        (of_l2a(**{"selector.agnt": "all"}), ["variants.a", "'agent'"]),
        (of_l2a(**{"kd.alpha": 7}), ["variants.a", "kd.alpha"]),
        (of_l2a(shots=7), ["shots is set by the grid"]),
        ({"seeds": []}, ["seeds: empty"]),
        ({"shots": [4, 4], "seeds": [1, 1]}, ["shots: 4 is given more than once", "seeds: 1 is given more than once"]),
        ({"preset": "screning"}, ["'screening'"]),
        (of_l2a(**{"student.preset": "narow"}), ["variants.a", "'narrow'"]),
        ({"variants": {"a": {"method": "plain_kd_unlabelled_student"}}}, ["variants.a", "unlabelled: true"]),
        (of_l2a(**{"kd.alfa": 1}), ["kd.alfa"]),
    ],
)
def test_what_is_wrong_with_a_card_is_said_before_anything_runs(workspace, changes, words):
    write_card(workspace, **changes)
    with pytest.raises(UsageError) as caught:
        load_experiment("tiny")
    said = str(caught.value)
    assert all(word in said for word in words) and said.count("kd.alfa") <= 1, said


def test_an_override_may_hold_the_name_of_the_pair_and_a_missing_policy_is_refused_before_anything_runs(workspace):
    write_card(workspace, **of_l2a(**{"selector.agent": "policies/without_{pair}"}))
    cells = [cell for group in expand(load_experiment("tiny"), workspace / "data") for cell in group]
    assert {cell.config.selector.agent for cell in cells} == {f"policies/without_{cell.place.pair}" for cell in cells}
    assert len({cell.place.pair for cell in cells}) > 1
    with pytest.raises(UsageError, match=r"policies/without_.* holds no policy\.json"):
        card.refuse_missing_agents([cells])


def test_the_policies_of_a_card_are_trained_with_its_ppo_row():
    card = load_experiment("selectors_whole_source")
    config = policies.config_of(card, card.pairs[0], "data", seed=1)
    assert (config.selector.agent, config.seed, config.shots) == ("ppo", 1, card.shots[0])
    assert config.kd.pool_size == 2400 and config.source == card.pairs[0].source


def test_the_shipped_cards_are_right_and_both_budgets_of_the_baselines_have_the_same_variants():
    cells, but_for_the_pool = {"baselines": 6 * 3 * 7, "baselines_standard": 6 * 7, "shipped": 3 * 3 * 7}, []
    for shipped in map(load_experiment, cells):
        assert sum(map(len, expand(shipped, None))) == cells[shipped.name]
        assert set(shipped.variants) >= {
            "l2a",
            "plain_kd",
            "tfidf_logreg",
            "target_only_teacher",
            "cross_domain_teacher",
        }
        methods = {name: (it.method, {**it.overrides, "kd.pool_size": 0}) for name, it in shipped.variants.items()}
        but_for_the_pool.append((shipped.pairs, methods))
    assert but_for_the_pool[0] == but_for_the_pool[1]


def cell_of(name, **change):
    """A cell of the tiny card, or of a method that it does not have, with some settings changed."""
    variant, *method = name.split()
    cells = (cell for group in expand(load_experiment("tiny"), Path("data")) for cell in group)
    cell = next(cell for cell in cells if cell.place.variant == variant)
    return replace(cell, method=(*method, cell.method)[0], config=override(cell.config, change))


def test_groups_share_pair_shots_and_seed_and_neighbours_have_different_sources(workspace):
    groups = expand(load_experiment("tiny"), None)
    assert [group[0].config.source for group in groups] == ["sea.jsonl", "land.jsonl", "sea.jsonl", "land.jsonl"]
    assert all(len({cell.place[:3] for cell in group}) == 1 and len(group) == 3 for group in groups)


def test_cells_are_chosen_by_a_part_of_their_name(workspace):
    groups = expand(load_experiment("tiny"), None)
    names = [[cell.place.name for cell in group] for group in choose(groups, ["land_sky 4 0 t", "sea_sky 4 1 "])]
    assert names == [["land_sky 4 0 tfidf"], ["sea_sky 4 1 tfidf", "sea_sky 4 1 plain", "sea_sky 4 1 random"]]
    with pytest.raises(UsageError, match=r"'sky 5', but no cell's name contains it; .* as in 'sea_sky 4 0 tfidf'"):
        choose(groups, ["sky 5"])


CHAIN, ONE_OPERATOR = "random augmented_kd_student", {"generator.operator": "eda"}


@pytest.mark.parametrize(
    ("name", "given", "change", "stays"),
    [
        ("random", {}, {"selector.agent": "nearest"}, False),
        ("random", {}, {"selector.agent": "gone"}, False),  # old results of an agent that is lost can be reported
        ("random", {}, {"kd.alpha": 0.5}, False),
        ("plain", {}, {"kd.alpha": 0.5}, False),
        ("plain", {}, {"generator.tau": 2.0}, True),
        ("random", {}, {"generator.tau": 2.0}, False),
        ("random", {}, {"generator.operator": "eda", "generator.copies": 4}, True),
        ("tfidf", {}, {"kd.alpha": 0.5}, True),
        ("tfidf", {}, {"student.preset": "narrow"}, True),
        ("tfidf", {}, {"max_length": 32}, False),
        ("tfidf", {}, {"source_size": 5}, False),
        ("tfidf", {}, {"seed": 5}, False),
        ("random", {}, {"output_dir": "else", "data_root": "/moved", "overwrite": True, "compare": False}, True),
        *((CHAIN, {}, change, False) for change in (ONE_OPERATOR, {"generator.copies": 4}, {"kd.alpha": 0.5})),
        (CHAIN, {}, {"generator.degree": 0.3}, False),
        (CHAIN, {}, {"selector.agent": "nearest"}, True),
        *((CHAIN, given, {f"generator.{field}": 9}, bool(given)) for field in ("tau", "beta", "burn_in")
          for given in ({}, ONE_OPERATOR)),
    ],
)  # fmt: skip
def test_the_key_changes_with_what_decides_the_result(workspace, name, given, change, stays):
    before, after = (cell_key(cell_of(name, **it), {"sea.jsonl": "a"}) for it in (given, given | change))
    assert (before == after) == stays


def test_each_pair_names_the_files_of_both_domains_even_when_they_are_called_alike(workspace):
    for seed, folder in enumerate(("one", "two")):
        (workspace / "data" / folder).mkdir()
        write_domain(workspace / "data" / folder / "train.jsonl", 40, seed, f"{folder} ")
    write_card(workspace, pairs=[{"name": "folders", "source": "one/train.jsonl", "target": "two/train.jsonl"}])
    files = data_files(expand(load_experiment("tiny"), workspace / "data"))["folders"]
    assert sorted(files) == ["one/train.jsonl", "two/train.jsonl"] and len(set(files.values())) == 2


def test_the_content_of_a_file_decides_the_rows_that_read_it(workspace):
    methods = ("l2a_student", "augmented_kd_student", "plain_kd_student")
    variants = {method: {"method": method, "unlabelled": True} for method in methods}
    write_card(workspace, pairs=WITH_MORE, seeds=[0], variants=variants)
    (group,) = expand(load_experiment("tiny"), workspace / "data")
    keys = []
    for unlabelled, source in (("a calm day", "sea"), ("a rough night", "sea"), ("a rough night", "lake")):
        (workspace / "data" / "more.txt").write_text(unlabelled)
        write_domain(workspace / "data" / "sea.jsonl", 200, 0, f"{source} ")
        files = data_files([group])["sea_sky"]
        keys.append([cell_key(cell, files) for cell in group])
        read = [set(cell_files(cell, files)) for cell in group]
        assert read == [{"sea.jsonl", "sky.jsonl", "more.txt"}, *[{"sea.jsonl", "sky.jsonl"}] * 2]
    assert [one == other for one, other in zip(*keys[:2], strict=True)] == [False, True, True]
    assert not set(keys[1]) & set(keys[2])


def test_what_decides_the_agents_choices_decides_only_the_rows_that_select(workspace):
    agent, policy = workspace / "agents" / "mine.yaml", workspace / "agents" / "trained" / "policy.json"
    policy.parent.mkdir(parents=True)
    policy.with_name("policy.safetensors").write_bytes(b"weights")
    cells = [cell_of(name, **{"selector.agent": "mine"}) for name in ("random", "plain")]
    keys = []
    for description, more, policy_text in (
        ("a", "", "{}"), ("b", "\nactivation: tanh", "{}"), ("b", "", '{"format": 1}'),
        ("b", "\nactivation: relu", "{}"),
    ):  # fmt: skip
        agent.write_text(f"description: {description}\nalgorithm: stable_baselines3.PPO\npolicy: trained{more}\n")
        policy.write_text(policy_text)
        keys.append([cell_key(cell, {}) for cell in cells])
    selecting, plain = zip(*keys, strict=True)
    assert selecting[0] == selecting[1]  # a description, and a field at its default
    assert len(set(selecting)) == 3 and len(set(plain)) == 1


def test_a_new_field_at_its_default_changes_no_key(workspace, monkeypatch):
    cell, flat = cell_of("random"), card._flat
    before = cell_key(cell, {})
    for value, stays in ((0.0, True), (1.0, False)):
        added = {id(cell.config): value}  # all other configurations have the default
        monkeypatch.setattr(card, "_flat", lambda config, to=added: {**flat(config), "kd.new": to.get(id(config), 0.0)})
        assert (cell_key(cell, {}) == before) == stays


def test_a_changed_default_is_noted_so_that_old_keys_keep_their_meaning():
    """A key leaves out fields at their default: enter the old value of a changed one in ``FORMER_DEFAULTS``."""
    kept = json.loads((Path(__file__).parent / "defaults.json").read_text())
    now = json.loads(json.dumps({**card._flat(DistillConfig()), **card.FORMER_DEFAULTS}))
    assert {name: value for name, value in kept.items() if name in now and now[name] != value} == {}
