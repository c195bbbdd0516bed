import pytest

from benchmarks.selector import policies
from l2a.experiments.card import expand, load_experiment
from l2a.util.errors import UsageError

from .conftest import CARD, write_card


def test_a_card_becomes_a_grid(workspace):
    card = load_experiment("tiny")
    cells = [cell for group in expand(card, workspace / "data") for cell in group]
    assert len(cells) == 2 * 2 * 3
    assert tuple(card.variants) == tuple(CARD["variants"])
    assert card == load_experiment("configs/experiments/tiny.yaml")
    chosen = next(cell for cell in cells if cell.place.variant == "random" and cell.place.seed == 1)
    assert (chosen.config.selector.agent, chosen.config.kd.rounds, chosen.config.seed) == ("random", 1, 1)
    assert chosen.config.max_length == 64  # the preset's


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


def test_an_override_may_hold_the_name_of_the_pair(workspace):
    variants = {"moved": {"method": "l2a_student", "overrides": {"selector.agent": "policies/without_{pair}"}}}
    write_card(workspace, variants=variants)
    cells = [cell for group in expand(load_experiment("tiny"), workspace / "data") for cell in group]
    assert {cell.config.selector.agent for cell in cells} == {f"policies/without_{cell.place.pair}" for cell in cells}
    assert len({cell.place.pair for cell in cells}) > 1


def test_the_policies_of_a_card_are_trained_with_its_ppo_row():
    card = load_experiment("selectors_whole_source")
    config = policies.config_of(card, card.pairs[0], "data", dev_shots=128, seed=1)
    assert (config.selector.agent, config.dev_shots, config.seed, config.shots) == ("ppo", 128, 1, card.shots[0])
    assert config.kd.pool_size == 2400 and config.source == card.pairs[0].source


@pytest.mark.parametrize(
    ("name", "cells"), [("baselines", 6 * 3 * 7), ("baselines_standard", 6 * 7), ("shipped", 3 * 3 * 7)]
)
def test_the_shipped_cards_are_right(name, cells):
    card = load_experiment(name)
    assert sum(map(len, expand(card, None))) == cells
    assert set(card.variants) >= {"l2a", "plain_kd", "tfidf_logreg", "target_only_teacher", "cross_domain_teacher"}


def test_the_two_budgets_of_the_baselines_have_the_same_variants():
    screening, standard = load_experiment("baselines"), load_experiment("baselines_standard")
    variants = [
        {name: (variant.method, {k: v for k, v in variant.overrides.items() if k != "kd.pool_size"})
         for name, variant in card.variants.items()}
        for card in (screening, standard)
    ]  # fmt: skip
    assert variants[0] == variants[1]
    assert screening.pairs == standard.pairs
