from dataclasses import replace

import numpy as np
import pytest

from l2a.config import GeneratorConfig
from l2a.data.examples import normalised_hash
from l2a.generator.chain import draw_pool, max_cosine
from l2a.generator.operators import CHAIN_OPERATORS
from l2a.util.errors import RunError

from .conftest import embed_toy, sentences, toy_outputs

CONFIG = GeneratorConfig(chains=16, burn_in=2, degree=0.4, max_degree=1.0)


def draw(problem, config=CONFIG, size=80, seed=0):
    return draw_pool(problem, config, size, np.random.default_rng(seed))


def test_candidates_are_different_and_hold_no_test_text_and_no_labelled_target_text(problem):
    pool, _ = draw(problem)
    hashes = [normalised_hash(text) for text in pool.inputs]
    assert len(pool) == len(set(hashes)) == 80
    assert not set(hashes) & problem.forbidden_hashes
    assert not set(hashes) & {normalised_hash(text) for text in problem.target_inputs}


def test_every_field_describes_its_text(problem):
    pool, _ = draw(problem)
    expected = toy_outputs(pool.inputs)
    assert np.array_equal(pool.teacher.embeddings, expected.embeddings)
    assert np.array_equal(pool.teacher.logits, expected.logits)
    assert pool.max_target_cosine == pytest.approx(
        max_cosine(expected.embeddings, embed_toy(problem.target_inputs)), abs=1e-6
    )
    for name in ("degrees", "log_density", "domain_probability", "max_target_cosine"):
        values = getattr(pool, name)
        assert values.shape == (80,) and values.dtype == np.float32 and np.isfinite(values).all()
    assert ((pool.domain_probability >= 0) & (pool.domain_probability <= 1)).all()


def test_operators_origins_and_degrees_fit_the_texts(problem):
    pool, _ = draw(problem)
    assert set(pool.operators) == set(CHAIN_OPERATORS)
    for text, origin, operator, degree in zip(pool.inputs, pool.origins, pool.operators, pool.degrees, strict=True):
        domain, index = origin.split(":")
        base = (problem.source_inputs if domain == "source" else problem.target_inputs)[int(index)]
        old, new = base[0].split(), text[0].split()
        changed = sum(one != other for one, other in zip(old, new, strict=True))
        assert degree == pytest.approx(changed / len(old)), "the realised share of changed tokens"
        assert (operator == "source") == (changed == 0)


def test_the_same_seed_draws_the_same_pool_and_another_seed_another(problem):
    (one, _), (same, _), (other, _) = draw(problem, seed=3), draw(problem, seed=3), draw(problem, seed=4)
    assert one.inputs == same.inputs and one.operators == same.operators
    assert one.inputs != other.inputs


def test_a_lower_temperature_comes_nearer_to_the_target(problem):
    config = replace(CONFIG, operators={"augpro_fgsm": 0})
    densities = []
    for tau in (float("inf"), 1.0, 0.2):
        pool, chain = draw(problem, replace(config, tau=tau), size=200)
        densities.append(chain.sample_log_density)
        assert chain.proposal_log_density == pytest.approx(densities[0], abs=0.35)
        assert pool.log_density.std() > 0
    assert densities[0] + 0.3 < densities[1] and densities[1] + 0.1 < densities[2]


def test_plain_proposals_are_all_accepted_at_infinite_temperature(problem):
    _, chain = draw(replace(problem, forbidden_hashes=frozenset()), replace(CONFIG, tau=float("inf")))
    assert chain.acceptance == {"jump": 1.0, "local": 1.0, "partner": 1.0}


def test_the_limit_on_the_degree_holds_texts_back(problem):
    free, _ = draw(problem, replace(CONFIG, degree=0.9, tau=float("inf")))
    limited = replace(CONFIG, degree=0.9, tau=float("inf"), max_degree=0.3, beta=50.0, burn_in=30)
    held, _ = draw(problem, limited, size=60)
    assert held.degrees.max() <= 0.5 < np.quantile(free.degrees, 0.7)


def test_diagnostics_count_the_work(problem):
    asked = []

    def labeller(inputs):
        asked.extend(inputs)
        return toy_outputs(inputs)

    pool, chain = draw(replace(problem, labeller=labeller))
    assert set(asked) == set(pool.inputs) | set(problem.target_inputs), "the teacher reads what the pool holds"
    assert len(pool) <= chain.visited_texts <= (chain.steps + 1) * 16 and chain.chains == 16
    assert 1 <= chain.effective_sample_size <= (chain.steps - 2) * 16
    assert 0 < chain.distinct_share <= 1 and 0 < chain.labelling_seconds < chain.seconds
    assert chain.sample_log_density > chain.proposal_log_density
    assert chain.degree == 0.4
    assert draw(problem, size=1)[1].steps == 3, "the two steps of the burn-in are left out, and no other"


def test_a_pool_that_cannot_be_filled_is_smaller_and_says_so(problem, caplog):
    config = replace(CONFIG, operators={"augpro_mix": 0, "augpro_fgsm": 0, "knn": 0})
    pool, _ = draw(problem, config, size=100)
    assert len(pool) <= 59 and set(pool.operators) == {"source"}
    assert "of 100 candidates" in caplog.text


def test_no_candidate_at_all_is_a_failed_run(problem):
    everything = frozenset(normalised_hash(text) for text in problem.source_inputs)
    config = replace(CONFIG, operators={"augpro_mix": 0, "augpro_fgsm": 0, "knn": 0})
    with pytest.raises(RunError, match="no candidate"):
        draw(replace(problem, forbidden_hashes=everything), config)


def test_pairs_keep_their_sides(problem):
    source = tuple((text[0], "my phone is bad !") for text in problem.source_inputs)
    target = tuple(("the film was good", text[0]) for text in problem.target_inputs)
    pairs = replace(
        problem, source_inputs=source, target_inputs=target, space=replace(problem.space, gradient=None, max_length=32)
    )
    pool, _ = draw(pairs, replace(CONFIG, operators={"source": 0, "augpro_fgsm": 0, "knn": 0}, target_share=0.0))
    first_side = {word for text in target for word in text[0].split()}
    for text, origin in zip(pool.inputs, pool.origins, strict=True):
        base = source[int(origin.removeprefix("source:"))]
        new = set(text[0].split()) - set(base[0].split())
        assert new <= first_side, "a word of the partner's second side came into the first"


def test_unlabelled_texts_are_bases_too_but_not_of_the_operator_that_reads_their_labels(problem):
    asked, more = [], sentences(["toaster", "kettle"], 300, seed=5)

    def gradient(inputs):
        asked.extend(inputs)
        return problem.space.gradient(inputs)

    watched = replace(problem, unlabelled_inputs=more, space=replace(problem.space, gradient=gradient))
    pool, _ = draw(watched, replace(CONFIG, tau=float("inf")), size=300)
    of = [int(origin.split(":")[1]) for origin in pool.origins if origin.startswith("unlabelled")]
    assert len(of) > 50 and asked and not set(asked) & set(more)
    unchanged = [i for i in range(len(pool)) if pool.operators[i] == "source" and "unlabelled" in pool.origins[i]]
    assert unchanged and all(pool.inputs[i] == more[int(pool.origins[i].split(":")[1])] for i in unchanged)


def test_one_pool_has_texts_of_several_degrees(problem):
    config = replace(CONFIG, degrees=(0.1, 0.9), operators={"source": 0, "augpro_fgsm": 0, "augpro_mix": 0})
    degrees = draw(problem, replace(config, tau=float("inf"), beta=0.0), size=150)[0].degrees
    assert (degrees < 0.35).mean() > 0.3 and (degrees > 0.65).mean() > 0.3
