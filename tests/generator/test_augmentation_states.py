"""The moves on lifted states: reversible with respect to the base law, deterministic texts, and the exact law."""

from dataclasses import replace

import numpy as np
import pytest

from l2a.config import GeneratorConfig
from l2a.data.examples import normalised_hash
from l2a.generator.chain import FORBIDDEN, MOVES, AugmentationSpace, metropolis_hastings
from l2a.generator.operators import CHAIN_OPERATORS, SOURCE
from l2a.util.errors import UsageError

from .conftest import embed_toy


class Recorder:
    """Keeps what a function is asked for."""

    def __init__(self, function):
        self.function, self.asked = function, []

    def __call__(self, inputs):
        self.asked.extend(inputs)
        return self.function(inputs)


def open_space(problem, config):
    space = AugmentationSpace(problem, replace(config, degree=0.4))
    return space, space.visited


def test_draws_follow_the_base_law(problem):
    config = GeneratorConfig(operators={"source": 2, "knn": 0}, target_share=0.25)
    space, _ = open_space(problem, config)
    states = space.draw(4000, np.random.default_rng(0))
    sources = len(problem.source_inputs)
    shares = np.bincount(states.operator, minlength=4) / 4000
    assert shares == pytest.approx([0.5, 0.25, 0.25, 0.0], abs=0.03)
    assert len(np.unique(states.base)) == len(np.unique(states.partner)) == sources + 12, "every text is drawn"
    from_target = states.base >= sources
    assert from_target[states.operator != SOURCE].mean() == pytest.approx(0.25, abs=0.03)
    assert not from_target[states.operator == SOURCE].any()
    assert ((states.partner >= sources) != from_target).all(), "a partner is from the same domain"
    assert (states.degree[states.operator == SOURCE] == 0).all()


@pytest.mark.parametrize(("operators", "unchanged"), [({}, 0.75 + 0.25 / 4), ({"source": 1}, 0.25)])
def test_unlabelled_text_mostly_comes_unchanged_unless_it_is_said_how_often(problem, operators, unchanged):
    some = replace(problem, unlabelled_inputs=tuple((f"a {i}",) for i in range(3 * len(problem.source_inputs))))
    space, _ = open_space(some, GeneratorConfig(operators=operators))
    states = space.draw(4000, np.random.default_rng(0))
    assert (states.operator == SOURCE).mean() == pytest.approx(unchanged, abs=0.03)


def test_each_move_changes_its_part_and_no_other_and_local_moves_one_block(problem):
    space, _ = open_space(problem, GeneratorConfig())
    rng = np.random.default_rng(0)
    states = space.draw(600, rng)
    proposed, moves = space.propose(states, rng)
    for move, kept in (("local", {"base", "operator", "partner"}), ("partner", {"base", "operator", "u"})):
        chains = moves == MOVES.index(move)
        for name in ("base", "operator", "partner", "u"):
            assert np.array_equal(getattr(proposed, name)[chains], getattr(states, name)[chains]) == (name in kept)
    chains = moves == MOVES.index("local")
    redrawn = (proposed.u != states.u).any(axis=2)[chains]
    edges = np.abs(np.diff(np.pad(redrawn.astype(int), ((0, 0), (1, 1))), axis=1)).sum(axis=1)
    assert (edges == 2).all()
    last = space._store.lengths[states.base[chains]] - 1
    assert not redrawn[np.arange(len(last)), last].all(), "every block goes on to the end of the text"


def test_a_state_decides_its_text(problem):
    space, labelled = open_space(problem, GeneratorConfig())
    states = space.draw(50, np.random.default_rng(0))
    again, other = open_space(problem, GeneratorConfig())
    (texts, degrees), (same, same_degrees) = space.project(states), again.project(states)
    assert texts == same and np.array_equal(degrees, same_degrees)
    assert len(labelled.inputs) > len(other.inputs) == 0


def cell_of(states, problem):
    return 4 * (states.base >= len(problem.source_inputs)) + states.operator


def test_the_law_of_the_chain_is_the_reweighted_base_law(problem):
    """Plain draws, weighted by exp(score), estimate the same stationary law as the chain does."""
    config = GeneratorConfig(tau=0.5, beta=5.0, max_degree=0.2)
    space, _ = open_space(problem, config)
    rng = np.random.default_rng(0)
    plain = space.draw(12_000, rng)
    weights = np.exp(space.score(plain))
    expected = np.bincount(cell_of(plain, problem), weights=weights, minlength=8) / weights.sum()
    counts = np.zeros(8)
    steps = metropolis_hastings(space.draw(500, rng), space.propose, space.score, rng)
    for number, step in zip(range(45), steps, strict=False):
        if number >= 5:
            counts += np.bincount(cell_of(step.states, problem), minlength=8)
    assert 0.5 * np.abs(counts / counts.sum() - expected).sum() < 0.05
    unweighted = np.bincount(cell_of(plain, problem), minlength=8) / len(plain.base)
    assert 0.5 * np.abs(unweighted - expected).sum() > 0.2, "the test would not notice a chain that ignores the score"


def test_an_infinite_temperature_leaves_only_the_limit_on_the_degree(problem):
    space, _ = open_space(problem, GeneratorConfig(tau=float("inf"), beta=2.0, max_degree=0.3))
    states = space.draw(200, np.random.default_rng(0))
    allowed = states.row != FORBIDDEN
    expected = -2.0 * np.maximum(0.0, states.degree - 0.3)
    assert space.score(states)[allowed] == pytest.approx(expected[allowed])
    assert (space.score(states)[~allowed] == -np.inf).all()


def test_test_texts_are_never_embedded_or_visited(problem):
    embed = Recorder(embed_toy)
    plain = open_space(problem, GeneratorConfig())[0]
    plain.draw(300, np.random.default_rng(0))
    free, labelled = open_space(problem, GeneratorConfig())
    free.draw(300, np.random.default_rng(0))
    texts = set(labelled.inputs) - set(problem.source_inputs + problem.target_inputs)
    made = {normalised_hash(text) for text in sorted(texts)[:30]}
    guarded, _ = open_space(replace(problem, embed=embed, forbidden_hashes=made), GeneratorConfig())
    states = guarded.draw(300, np.random.default_rng(0))
    assert (states.row == FORBIDDEN).any()
    assert not made & {normalised_hash(text) for text in embed.asked}
    assert (guarded.score(states)[states.row == FORBIDDEN] == -np.inf).all()


def test_each_text_is_embedded_once_and_each_gradient_asked_for_once(problem):
    embed, gradient = Recorder(embed_toy), Recorder(problem.space.gradient)
    watched = replace(problem, embed=embed, space=replace(problem.space, gradient=gradient))
    space, labelled = open_space(watched, GeneratorConfig())
    states, rng = space.draw(200, np.random.default_rng(0)), np.random.default_rng(1)
    for _ in range(3):
        states = space.propose(states, rng)[0]
    asked, differentiated = embed.asked[72:], gradient.asked  # the first are those that the density is fitted on
    assert asked == list(dict.fromkeys(asked)) == labelled.inputs
    assert len(differentiated) == len(set(differentiated)) > 0


def test_fgsm_needs_a_gradient(problem):
    without = replace(problem, space=replace(problem.space, gradient=None))
    states = open_space(without, GeneratorConfig())[0].draw(300, np.random.default_rng(0))
    assert not (states.operator == CHAIN_OPERATORS.index("augpro_fgsm")).any()
    with pytest.raises(UsageError, match="without a student's gradient"):
        open_space(without, GeneratorConfig(operators={"source": 0, "augpro_mix": 0, "knn": 0}))


def test_a_gradient_of_the_wrong_shape_is_refused(problem):
    wrong = replace(
        problem, space=replace(problem.space, gradient=lambda inputs: [np.zeros((3, 8), np.float32) for _ in inputs])
    )
    with pytest.raises(ValueError, match="one row for each token"):
        open_space(wrong, GeneratorConfig())[0].draw(100, np.random.default_rng(0))


def test_rows_keep_their_own_density(problem):
    space, visited = open_space(problem, GeneratorConfig())
    texts = [("a very new phone !",), problem.source_inputs[3], ("another phone !",), ("a very new phone !",)]
    rows = visited.rows(texts)
    assert rows.tolist() == [0, 1, 2, 0]
    assert visited.densities(rows) == pytest.approx(space.density.log_density(embed_toy(texts)))
    assert visited.densities(np.array([[FORBIDDEN, 0]]))[0, 0] == -np.inf
