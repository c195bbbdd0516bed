"""The chains' law against the law that is written down, and the candidates that they give."""

from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from l2a.config import GeneratorConfig, resolve_degree
from l2a.data import normalised_hash
from l2a.generator import chain
from l2a.generator.operators import CHAIN_OPERATORS, OPERATORS, check_operators
from l2a.util import RunError, UsageError

from .conftest import COMMON, FILM, PHONE, Recorder, embed_toy, sentences, toy_outputs

STATES = 24
SCORES = np.concatenate([np.linspace(-2.0, 2.0, STATES - 1), [-np.inf]])
BASE = (1.0 + np.arange(STATES)) / (1.0 + np.arange(STATES)).sum()
TARGET = BASE * np.exp(SCORES) / (BASE * np.exp(SCORES)).sum()


class ToyStates(NamedTuple):
    place: NDArray[np.int64]


def score(states: ToyStates) -> NDArray[np.float64]:
    return SCORES[states.place]


def propose(states: ToyStates, rng: np.random.Generator, is_reversible: bool = True):
    """Redraw the place, or which of its pair it is, from the base law; from another law if it is not reversible."""
    law, count = BASE if is_reversible else np.full(STATES, 1 / STATES), len(states.place)
    moves, jumped = rng.integers(0, 2, size=count), rng.choice(STATES, size=count, p=law)
    first = states.place // 2 * 2
    second = rng.random(count) < law[first + 1] / (law[first] + law[first + 1])
    return ToyStates(np.where(moves == 0, jumped, first + second)), moves


def distance_to_target(is_reversible: bool) -> float:
    rng = np.random.default_rng(0)
    start = ToyStates(rng.integers(0, STATES, size=500))
    steps = chain.metropolis_hastings(start, lambda states, rng: propose(states, rng, is_reversible), score, rng)
    places = [states.place for _, (states, *_) in zip(range(360), steps, strict=False)]
    counts = np.bincount(np.concatenate(places[60:]), minlength=STATES)
    return 0.5 * float(np.abs(counts / counts.sum() - TARGET).sum())


def test_the_empirical_law_is_the_stationary_law_and_moves_that_are_not_reversible_miss_it():
    assert distance_to_target(is_reversible=True) < 0.02
    assert distance_to_target(is_reversible=False) > 0.04


def test_a_forbidden_state_is_left_and_never_entered():
    start = ToyStates(np.full(50, STATES - 1))
    steps = chain.metropolis_hastings(start, propose, score, np.random.default_rng(1))
    visited = [states.place for (states, *_), _ in zip(steps, range(60), strict=False)]
    assert (visited[-1] != STATES - 1).all()
    left = np.stack(visited) != STATES - 1
    assert (np.diff(left.astype(int), axis=0) >= 0).all(), "a chain came back to the forbidden state"


def test_the_acceptance_rule():
    current, proposed = np.array([-1.0, 0, 0, 0, -np.inf, -np.inf]), np.array([0.0, -1, -1, -np.inf, 0, -np.inf])
    uniform = np.array([0.999, np.exp(-1) - 1e-6, np.exp(-1) + 1e-6, 0.0, 0.999, 0.0])
    start, move = ToyStates(np.arange(6)), (ToyStates(np.arange(6, 12)), np.zeros(6, np.int64))
    scores, rng = np.concatenate([current, proposed]), SimpleNamespace(random=lambda count: uniform)
    states, _, _, accepted = next(chain.metropolis_hastings(start, lambda *_: move, lambda s: scores[s.place], rng))
    assert accepted.tolist() == [True, True, False, False, True, False]
    assert states.place.tolist() == [6, 7, 2, 3, 10, 5]


def two_domains(source_count: int, target_count: int, seed: int = 0, width: int = 48):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(width, width)) * np.linspace(2.0, 0.1, width)
    source = rng.normal(size=(source_count, width)) @ mixing
    target = (rng.normal(size=(target_count, width)) * 0.7 + 1.5 * (np.arange(width) < 6)) @ mixing
    return source.astype(np.float32), target.astype(np.float32)


@pytest.mark.parametrize("target_count", [2, 8, 64, 8000])
def test_held_out_target_text_ranks_above_source_text(target_count):
    source, target = two_domains(600, target_count + 200)
    density = chain.fit_target_density(source[:400], target[:target_count])
    values = density.log_density(np.concatenate([source[400:], target[target_count:]]))
    assert np.isfinite(values).all()
    assert roc_auc_score(np.repeat([0, 1], 200), values) > (0.5 if target_count == 2 else 0.75)


def test_the_scale_does_not_depend_on_the_unit_of_the_embeddings():
    source, target = two_domains(300, 32)
    one, other = chain.fit_target_density(source, target), chain.fit_target_density(100 * source, 100 * target)
    assert one.log_density(source) == pytest.approx(other.log_density(100 * source), abs=1e-2)


@pytest.mark.parametrize("shift", [0.0, 1.0, 1000.0])
def test_the_target_lies_at_most_two_units_above_the_source(shift):
    source, target = two_domains(300, 32)
    density = chain.fit_target_density(source, target + np.float32(shift))
    values, target_values = density.log_density(source), density.log_density(target + np.float32(shift))
    assert np.median(values) == pytest.approx(0, abs=1e-6)
    assert 0 < target_values.mean() - values.mean() <= 2.0001


def test_fewer_points_than_dimensions_and_constant_embeddings_stay_finite():
    source, target = two_domains(5, 3)
    assert np.isfinite(chain.fit_target_density(source, target).log_density(1000 * source)).all()
    same = np.ones((4, 6), dtype=np.float32)
    density = chain.fit_target_density(same, same[:2])
    assert np.isfinite(density.log_density(same)).all() and np.isfinite(density.log_odds(same)).all()


def test_the_log_odds_tell_the_domains_apart_with_equal_priors():
    source, target = two_domains(400, 40)
    density = chain.fit_target_density(source[:200], target[:20])
    assert expit(density.log_odds(source[200:])).mean() < 0.35
    assert expit(density.log_odds(target[20:])).mean() > 0.65


@pytest.mark.parametrize(("sources", "targets"), [(1, 8), (8, 1), (8, 0)])
def test_too_few_texts_are_refused(sources, targets):
    source, target = two_domains(8, 8)
    with pytest.raises(UsageError, match="at least 2 of each domain"):
        chain.fit_target_density(source[:sources], target[:targets])


CONFIG = GeneratorConfig(chains=16, burn_in=2, degree=0.4, max_degree=1.0)


def draw(problem, config=CONFIG, size=80, seed=0):
    return chain.draw_pool(problem, config, size, np.random.default_rng(seed))


@pytest.fixture(scope="module")
def pool(problem):
    return draw(problem)[0]


def test_candidates_are_different_and_hold_no_test_text_and_no_labelled_target_text(problem, pool):
    hashes = {normalised_hash(text) for text in pool.inputs}
    assert len(pool) == len(hashes) == 80
    assert not hashes & {*problem.forbidden_hashes, *(normalised_hash(text) for text in problem.target_inputs)}


def test_every_field_describes_its_text(problem, pool):
    expected = toy_outputs(pool.inputs)
    assert np.array_equal(pool.teacher.embeddings, expected.embeddings)
    assert np.array_equal(pool.teacher.logits, expected.logits)
    cosine = chain.max_cosine(expected.embeddings, embed_toy(problem.target_inputs))
    assert pool.max_target_cosine == pytest.approx(cosine, abs=1e-6)
    for name in ("degrees", "log_density", "domain_probability", "max_target_cosine"):
        values = getattr(pool, name)
        assert values.shape == (80,) and values.dtype == np.float32 and np.isfinite(values).all()
    assert ((pool.domain_probability >= 0) & (pool.domain_probability <= 1)).all()


def test_operators_origins_and_degrees_fit_the_texts(problem, pool):
    assert set(pool.operators) == set(CHAIN_OPERATORS)
    for text, origin, operator, degree in zip(pool.inputs, pool.origins, pool.operators, pool.degrees, strict=True):
        domain, index = origin.split(":")
        old = (problem.source_inputs if domain == "source" else problem.target_inputs)[int(index)][0].split()
        changed = sum(one != other for one, other in zip(old, text[0].split(), strict=True))
        assert degree == pytest.approx(changed / len(old)), "the realised share of changed tokens"
        assert (operator == "source") == (changed == 0)


def test_the_same_seed_draws_the_same_pool_and_another_seed_another(problem):
    (one, _), (same, _), (other, _) = draw(problem, seed=3), draw(problem, seed=3), draw(problem, seed=4)
    assert one.inputs == same.inputs and one.operators == same.operators
    assert one.inputs != other.inputs


def test_a_lower_temperature_comes_nearer_to_the_target(problem):
    config, densities = replace(CONFIG, operators={"augpro_fgsm": 0}), []
    for tau in (float("inf"), 1.0, 0.2):
        pool, facts = draw(problem, replace(config, tau=tau), size=200)
        densities.append(facts["sample_log_density"])
        assert facts["proposal_log_density"] == pytest.approx(densities[0], abs=0.35)
        assert pool.log_density.std() > 0
    assert densities[0] + 0.3 < densities[1] and densities[1] + 0.1 < densities[2]


def test_plain_proposals_are_all_accepted_at_infinite_temperature(problem):
    _, facts = draw(replace(problem, forbidden_hashes=frozenset()), replace(CONFIG, tau=float("inf")))
    assert facts["acceptance"] == {"jump": 1.0, "local": 1.0, "partner": 1.0}


def test_the_limit_on_the_degree_holds_texts_back(problem):
    config = replace(CONFIG, degree=0.9, tau=float("inf"))
    free, _ = draw(problem, config)
    held, _ = draw(problem, replace(config, max_degree=0.3, beta=50.0, burn_in=30), size=60)
    assert held.degrees.max() <= 0.5 < np.quantile(free.degrees, 0.7)


def test_diagnostics_count_the_work(problem):
    labeller = Recorder(toy_outputs)
    pool, facts = draw(replace(problem, labeller=labeller))
    assert set(labeller.asked) == set(pool.inputs) | set(problem.target_inputs), "the teacher reads what the pool holds"
    assert len(pool) <= facts["visited_texts"] <= (facts["steps"] + 1) * 16 and facts["chains"] == 16
    assert 0 < facts["distinct_share"] <= 1 and 0 < facts["labelling_seconds"] < facts["seconds"]
    assert facts["sample_log_density"] > facts["proposal_log_density"] and facts["degree"] == 0.4
    assert draw(problem, size=1)[1]["steps"] == 3, "the two steps of the burn-in are left out, and no other"


def test_a_pool_that_cannot_be_filled_is_smaller_and_says_so_and_an_empty_one_is_a_failed_run(problem, caplog):
    config = replace(CONFIG, operators={"augpro_mix": 0, "augpro_fgsm": 0, "knn": 0})
    pool, _ = draw(problem, config, size=100)
    assert len(pool) <= 59 and set(pool.operators) == {"source"}
    assert "of 100 candidates" in caplog.text
    everything = frozenset(normalised_hash(text) for text in problem.source_inputs)
    with pytest.raises(RunError, match="no candidate"):
        draw(replace(problem, forbidden_hashes=everything), config)


def test_pairs_keep_their_sides(problem):
    source = tuple((text[0], "my phone is bad !") for text in problem.source_inputs)
    target = tuple(("the film was good", text[0]) for text in problem.target_inputs)
    space = replace(problem.space, gradient=None, max_length=32)
    pairs = replace(problem, source_inputs=source, target_inputs=target, space=space)
    pool, _ = draw(pairs, replace(CONFIG, operators={"source": 0, "augpro_fgsm": 0, "knn": 0}, target_share=0.0))
    first_side = {word for text in target for word in text[0].split()}
    for text, origin in zip(pool.inputs, pool.origins, strict=True):
        new = set(text[0].split()) - set(source[int(origin.removeprefix("source:"))][0].split())
        assert new <= first_side, "a word of the partner's second side came into the first"


def test_unlabelled_texts_are_bases_too_but_not_of_the_operator_that_reads_their_labels(problem):
    more = {text: f"mine.txt:{i}" for i, text in enumerate(sentences(["toaster", "kettle"], 300, seed=5))}
    gradient = Recorder(problem.space.gradient)
    watched = replace(problem, unlabelled=more, space=replace(problem.space, gradient=gradient))
    pool, _ = draw(watched, replace(CONFIG, tau=float("inf")), size=300)
    assert len({*pool.origins} & {*more.values()}) > 50 and gradient.asked and not {*gradient.asked} & {*more}
    unchanged = [i for i in range(len(pool)) if pool.operators[i] == "source" and "mine.txt" in pool.origins[i]]
    assert unchanged and all(more[pool.inputs[i]] == pool.origins[i] for i in unchanged)


def test_one_pool_has_texts_of_several_degrees(problem):
    config = replace(CONFIG, degrees=(0.1, 0.9), operators={"source": 0, "augpro_fgsm": 0, "augpro_mix": 0})
    degrees = draw(problem, replace(config, tau=float("inf"), beta=0.0), size=150)[0].degrees
    assert (degrees < 0.35).mean() > 0.3 and (degrees > 0.65).mean() > 0.3


NUMBERS = {"tau": 0.0, "beta": -0.1, "degree": 1.5, "max_degree": -0.1, "target_share": 1.1, "chains": 0, "burn_in": -1}
WEIGHTS = [("operators", value) for value in (3, {"knn": -1.0}, {"knn": float("nan")})]


@pytest.mark.parametrize(("field", "value"), [*NUMBERS.items(), ("neighbours", 0), *WEIGHTS])
def test_wrong_settings_are_named(field, value):
    with pytest.raises(UsageError, match=f"generator.{field} is "):
        GeneratorConfig(**{field: value})


def test_operators_are_checked_by_name():
    with pytest.raises(UsageError, match=r"generator\.operator is 'augpro_mx' \(did you mean 'augpro_mix'\?\)"):
        check_operators(GeneratorConfig(operator="augpro_mx"))
    with pytest.raises(UsageError, match=r"generator\.operators names 'kn' \(did you mean 'knn'\?\)"):
        check_operators(GeneratorConfig(operators={"kn": 1.0}))
    with pytest.raises(UsageError, match="weight above 0"):
        check_operators(GeneratorConfig(operators=dict.fromkeys(CHAIN_OPERATORS, 0.0)))
    with pytest.raises(UsageError, match="mixture names 'knn'"):
        check_operators(GeneratorConfig(mixture={"knn": 0.1}))
    for name in OPERATORS:
        check_operators(GeneratorConfig(operator=name))


@pytest.mark.parametrize(
    ("degree", "inputs", "expected"),
    [("auto", 64, 0.5), ("auto", 9_999, 0.5), ("auto", 10_000, 0.3), ("auto", 100_001, 0.1), (0.25, 64, 0.25)],
)
def test_the_degree_follows_the_amount_of_data(degree, inputs, expected):
    assert resolve_degree(degree, inputs) == expected


@pytest.fixture
def embed(word_tokenizer, embeddings):
    return chain.fit_word_average(word_tokenizer, embeddings, sentences(FILM, 60, seed=1), 16)


def test_a_text_is_the_direction_of_its_rare_words(word_tokenizer, embeddings):
    common = tuple((" ".join([*COMMON, word]),) for word in FILM)
    embed = chain.fit_word_average(word_tokenizer, embeddings, common, 16)
    (film, framed, phone, none) = embed([("film",), ("the film was this",), ("the phone was this",), ("",)])
    centred = embeddings.numpy() - embeddings.numpy().mean(0)
    vector = centred[word_tokenizer.convert_tokens_to_ids("film")]
    assert film == pytest.approx(vector / np.linalg.norm(vector), abs=1e-5)
    assert film @ framed > film @ phone and not none.any()


def test_both_sides_of_a_pair_and_no_more_than_the_longest_length_are_read(embed):
    one, other, swapped = embed([("film", "phone"), ("film", "battery"), ("phone", "film")])
    assert one == pytest.approx(swapped) and one != pytest.approx(other)
    long, cut = embed([("film " * 16 + "phone",), ("film " * 16,)])
    assert long == pytest.approx(cut)


@pytest.mark.parametrize(("choice", "least", "most"), [("near", 0.65, 1.0), ("random", 0.15, 0.5), ("far", 0.0, 0.12)])
def test_near_texts_are_those_of_the_target(embed, choice, least, most):
    near, far = sentences(PHONE, 90, seed=7), sentences(FILM, 210, seed=8)
    bank = tuple((near + far)[i] for i in np.random.default_rng(0).permutation(300))
    places = chain.choose_texts(bank, sentences(PHONE, 12, seed=2), 60, choice, embed, np.random.default_rng(0))
    chosen = [bank[i] for i in places]
    assert len(set(chosen)) == 60 and [text for text in bank if text in set(chosen)] == chosen
    assert least <= np.mean([text in set(near) for text in chosen]) <= most


def test_a_bank_that_is_small_enough_is_taken_whole(embed):
    bank = sentences(FILM, 5, seed=1)
    chosen = chain.choose_texts(bank, sentences(PHONE, 4, seed=2), 5, "near", embed, np.random.default_rng(0))
    assert chosen.tolist() == [0, 1, 2, 3, 4]
