"""The moves on augmentation states: reversible, exact in law, deterministic in text; operators on words."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from transformers import BertForMaskedLM

from l2a.config import GeneratorConfig
from l2a.data import normalised_hash
from l2a.generator import chain, operators
from l2a.generator.operators import SOURCE, MaskedLanguageModel, NearestWords, build_operator, find_words
from l2a.util import UsageError
from tests.conftest import tiny_bert_config

from .conftest import FILM, MARKS, PHONE, SPECIALS, WORDS, Recorder, batches_of, embed_toy


def open_space(problem, config):
    return chain.AugmentationSpace(problem, replace(config, degree=0.4))


def test_draws_follow_the_base_law(problem):
    space = open_space(problem, GeneratorConfig(operators={"source": 2, "knn": 0}, target_share=0.25))
    states, sources = space.draw(4000, np.random.default_rng(0)), len(problem.source_inputs)
    assert np.bincount(states.operator, minlength=4) / 4000 == pytest.approx([0.5, 0.25, 0.25, 0.0], abs=0.03)
    assert len(np.unique(states.base)) == len(np.unique(states.partner)) == sources + 12, "every text is drawn"
    from_target = states.base >= sources
    assert from_target[states.operator != SOURCE].mean() == pytest.approx(0.25, abs=0.03)
    assert not from_target[states.operator == SOURCE].any()
    assert ((states.partner >= sources) != from_target).all(), "a partner is from the same domain"
    assert (states.degree[states.operator == SOURCE] == 0).all()


@pytest.mark.parametrize(("weights", "unchanged"), [({}, 0.75 + 0.25 / 4), ({"source": 1}, 0.25)])
def test_unlabelled_text_mostly_comes_unchanged_unless_it_is_said_how_often(problem, weights, unchanged):
    some = replace(problem, unlabelled={(f"a {i}",): "a" for i in range(3 * len(problem.source_inputs))})
    states = open_space(some, GeneratorConfig(operators=weights)).draw(4000, np.random.default_rng(0))
    assert (states.operator == SOURCE).mean() == pytest.approx(unchanged, abs=0.03)


def test_each_move_changes_its_part_and_no_other_and_local_moves_one_block(problem):
    space, rng = open_space(problem, GeneratorConfig()), np.random.default_rng(0)
    states = space.draw(600, rng)
    proposed, moves = space.propose(states, rng)
    for move, kept in (("local", {"base", "operator", "partner"}), ("partner", {"base", "operator", "u"})):
        chains = moves == list(chain.MOVES).index(move)
        for name in ("base", "operator", "partner", "u"):
            assert np.array_equal(getattr(proposed, name)[chains], getattr(states, name)[chains]) == (name in kept)
    chains = moves == list(chain.MOVES).index("local")
    redrawn = (proposed.u != states.u).any(axis=2)[chains]
    edges = np.abs(np.diff(np.pad(redrawn.astype(int), ((0, 0), (1, 1))), axis=1)).sum(axis=1)
    assert (edges == 2).all()
    last = space._store.lengths[states.base[chains]] - 1
    assert not redrawn[np.arange(len(last)), last].all(), "every block goes on to the end of the text"


def test_a_state_decides_its_text(problem):
    space, again = (open_space(problem, GeneratorConfig()) for _ in range(2))
    states = space.draw(50, np.random.default_rng(0))
    (texts, degrees), (same, same_degrees) = space.project(states), again.project(states)
    assert texts == same and np.array_equal(degrees, same_degrees)
    assert len(space.visited.inputs) > len(again.visited.inputs) == 0


def cell_of(states, problem):
    return 4 * (states.base >= len(problem.source_inputs)) + states.operator


def test_the_law_of_the_chain_is_the_reweighted_base_law(problem):
    """Plain draws, weighted by exp(score), estimate the same stationary law as the chain does."""
    space, rng = open_space(problem, GeneratorConfig(tau=0.5, beta=5.0, max_degree=0.2)), np.random.default_rng(0)
    plain = space.draw(12_000, rng)
    weights = np.exp(space.score(plain))
    expected = np.bincount(cell_of(plain, problem), weights=weights, minlength=8) / weights.sum()
    counts = np.zeros(8)
    steps = chain.metropolis_hastings(space.draw(500, rng), space.propose, space.score, rng)
    for number, step in zip(range(45), steps, strict=False):
        if number >= 5:
            counts += np.bincount(cell_of(step[0], problem), minlength=8)
    assert 0.5 * np.abs(counts / counts.sum() - expected).sum() < 0.05
    unweighted = np.bincount(cell_of(plain, problem), minlength=8) / len(plain.base)
    assert 0.5 * np.abs(unweighted - expected).sum() > 0.2, "the test would not notice a chain that ignores the score"


def test_an_infinite_temperature_leaves_only_the_limit_on_the_degree(problem):
    space = open_space(problem, GeneratorConfig(tau=float("inf"), beta=2.0, max_degree=0.3))
    states = space.draw(200, np.random.default_rng(0))
    allowed = states.row != chain.FORBIDDEN
    expected = -2.0 * np.maximum(0.0, states.degree - 0.3)
    assert space.score(states)[allowed] == pytest.approx(expected[allowed])
    assert (space.score(states)[~allowed] == -np.inf).all()


def test_test_texts_are_never_embedded_or_visited(problem):
    embed, free = Recorder(embed_toy), open_space(problem, GeneratorConfig())
    free.draw(300, np.random.default_rng(0))
    texts = set(free.visited.inputs) - set(problem.source_inputs + problem.target_inputs)
    made = {normalised_hash(text) for text in sorted(texts)[:30]}
    guarded = open_space(replace(problem, embed=embed, forbidden_hashes=made), GeneratorConfig())
    states = guarded.draw(300, np.random.default_rng(0))
    assert (states.row == chain.FORBIDDEN).any()
    assert not made & {normalised_hash(text) for text in embed.asked}
    assert (guarded.score(states)[states.row == chain.FORBIDDEN] == -np.inf).all()


def test_each_text_is_embedded_once_and_each_gradient_asked_for_once(problem):
    embed, gradient = Recorder(embed_toy), Recorder(problem.space.gradient)
    watched = replace(problem, embed=embed, space=replace(problem.space, gradient=gradient))
    space = open_space(watched, GeneratorConfig())
    states, rng = space.draw(200, np.random.default_rng(0)), np.random.default_rng(1)
    for _ in range(3):
        states = space.propose(states, rng)[0]
    asked, differentiated = embed.asked[72:], gradient.asked  # the first are those that the density is fitted on
    assert asked == list(dict.fromkeys(asked)) == space.visited.inputs
    assert len(differentiated) == len(set(differentiated)) > 0


def test_fgsm_needs_a_gradient(problem):
    without = replace(problem, space=replace(problem.space, gradient=None))
    states = open_space(without, GeneratorConfig()).draw(300, np.random.default_rng(0))
    assert not (states.operator == operators.CHAIN_OPERATORS.index("augpro_fgsm")).any()
    with pytest.raises(UsageError, match="without a student's gradient"):
        open_space(without, GeneratorConfig(operators={"source": 0, "augpro_mix": 0, "knn": 0}))


def test_a_gradient_of_the_wrong_shape_is_refused(problem):
    space = replace(problem.space, gradient=lambda inputs: [np.zeros((3, 8), np.float32) for _ in inputs])
    with pytest.raises(ValueError, match="one row for each token"):
        open_space(replace(problem, space=space), GeneratorConfig()).draw(100, np.random.default_rng(0))


def test_rows_keep_their_own_density(problem):
    space = open_space(problem, GeneratorConfig())
    texts = [("a very new phone !",), problem.source_inputs[3], ("another phone !",), ("a very new phone !",)]
    rows = space.visited.rows(texts)
    assert rows.tolist() == [0, 1, 2, 0]
    assert space.visited.densities(rows) == pytest.approx(space.density.log_density(embed_toy(texts)))
    assert space.visited.densities(np.array([[chain.FORBIDDEN, 0]]))[0, 0] == -np.inf


OPERATORS = ("augpro_mix", "augpro_fgsm", "knn", "eda", "tinybert", "masked", "source", "target_only")
batches = batches_of(*WORDS, *MARKS, *SPECIALS[:5], "don't", "10th", "#film", "good-bad", "Filming")
SYNONYMS = {word: [other for other in group if other != word] for group in (FILM, PHONE) for word in group}


@pytest.fixture(scope="module")
def masked(word_tokenizer):
    torch.manual_seed(0)
    config = tiny_bert_config(word_tokenizer, hidden_size=16, num_hidden_layers=1, intermediate_size=16)
    return MaskedLanguageModel(BertForMaskedLM(config).eval(), word_tokenizer, 14, count=5)


@pytest.fixture(scope="module")
def rewrites(space, masked):
    vectors = torch.nn.functional.normalize(torch.randn(len(WORDS), 6, generator=torch.Generator().manual_seed(1)))
    sources, with_model = operators.WordSources(lambda: None), operators.WordSources(lambda: masked)
    sources.nearest = with_model.nearest = lambda: NearestWords(WORDS, vectors.numpy(), count=4)
    sources.synonyms = lambda: SYNONYMS
    made = {name: partial(operators.OPERATORS[name].rewrite, sources) for name in ("eda", "tinybert")}
    made |= {"masked": partial(operators.tinybert, with_model)}
    return made | {name: build_operator(name, lambda: space, lambda: None) for name in OPERATORS if name not in made}


def closed_words(side, name):
    """Token operators reach into words that marks join; word operators leave these alone."""
    by_word = name in ("eda", "tinybert", "masked")
    return [word for word in side.split() if word in {*MARKS, *SPECIALS} or (by_word and not find_words(word))]


@pytest.mark.parametrize("name", OPERATORS)
@given(batch=batches, seed=st.integers(0, 10_000), degree=st.floats(0.05, 1.0))
def test_guards(rewrites, name, batch, seed, degree):
    partners = batch[::-1]
    made = rewrites[name](batch, partners, degree, np.random.default_rng(seed))
    assert made == rewrites[name](batch, partners, degree, np.random.default_rng(seed)), "the seed decides"
    assert len(made) == len(batch)
    for base, partner, rewrite in zip(batch, partners, made, strict=True):
        kept = partner if name == "source" else base
        assert 0 <= rewrite.changed_share <= 1
        assert len(rewrite.text) == len(base), "a side came or went"
        assert (rewrite.changed_share == 0) >= (rewrite.text == kept), "a changed share of an unchanged text"
        for old, new in zip(kept, rewrite.text, strict=True):
            assert name == "eda" or len(new.split()) == len(old.split()), "a word came or went"
            assert closed_words(new, name) == closed_words(old, name), "a special token, number or mark came or went"


@given(text=st.lists(st.sampled_from(WORDS), min_size=1, max_size=30), seed=st.integers(0, 10_000))
def test_eda_changes_as_many_words_as_its_degree_says(rewrites, text, seed):
    base = (" ".join(text),)
    (rewrite,) = rewrites["eda"]([base], [base], 0.2, np.random.default_rng(seed))
    allowed, after = max(1, int(0.2 * len(text))), rewrite.text[0].split()
    assert len(after) <= len(text) + allowed, "more words were inserted"
    assert len(after) >= 1, "all words were deleted"
    if len(after) == len(text):
        moved = sum(one != other for one, other in zip(text, after, strict=True))
        assert moved <= 2 * allowed, "more words were replaced or moved"
        assert rewrite.changed_share == pytest.approx(moved / len(text))


@pytest.mark.parametrize("name", ["augpro_mix", "augpro_fgsm", "knn", "tinybert", "masked"])
def test_the_changed_share_is_the_degree_on_the_average(rewrites, name):
    base, partner = (" ".join(FILM),), (" ".join(PHONE),)
    made = rewrites[name]([base] * 400, [partner] * 400, 0.3, np.random.default_rng(0))
    changed = [np.mean([old not in (new,) for old, new in zip(FILM, one.text[0].split(), strict=True)]) for one in made]
    assert np.mean([one.changed_share for one in made]) == pytest.approx(0.3, abs=0.03)
    assert np.mean(changed) == pytest.approx(0.3, abs=0.03)


def test_tinybert_leaves_stop_words_and_takes_only_candidates(rewrites):
    base = ("This Film was very GOOD",)
    made = rewrites["tinybert"]([base] * 50, [base] * 50, 1.0, np.random.default_rng(0))
    for rewrite in made:
        this, film, was, very, good = rewrite.text[0].split()
        assert (this, was, very) == ("This", "was", "very"), "a stop word changed"
        assert film.istitle() and film != "Film" and good.isupper() and good != "GOOD"
        assert rewrite.changed_share == pytest.approx(2 / 5)


def test_masked_words_are_asked_with_their_text(masked):
    texts = [("the film was bad", "my phone"), ("the film was bad", "my phone"), ("filming it",)]
    first, second, several = masked(texts, [(0, (4, 8)), (1, (3, 8)), (0, (0, 7))])
    assert len(first) == len(second) == 5 and "film" not in first and "phone" not in second
    assert {*first, *second} <= set(WORDS), "whole words of two letters or more"
    assert several == [], "a word of several tokens is for the word vectors"


def test_a_text_beyond_the_longest_sequence_keeps_its_end(rewrites):
    base = (" ".join(FILM * 5),)
    for name in ("augpro_mix", "augpro_fgsm", "knn"):
        (rewrite,) = rewrites[name]([base], [(" ".join(PHONE * 5),)], 1.0, np.random.default_rng(0))
        assert rewrite.text[0].split()[14:] == base[0].split()[14:]
        assert rewrite.text[0].split()[:14] != base[0].split()[:14]


def test_augpro_fgsm_without_gradients_is_refused(space):
    operator = build_operator("augpro_fgsm", lambda: replace(space, gradient=None), lambda: None)
    with pytest.raises(UsageError, match="teacher and a student"):
        operator([("film",)], [("film",)], 1.0, np.random.default_rng(0))


def test_neighbouring_words_can_both_be_deleted(rewrites):
    base = ("film good bad",)
    made = rewrites["eda"]([base] * 200, [base] * 200, 0.6, np.random.default_rng(0))
    texts = {rewrite.text[0] for rewrite in made}
    assert {"bad", "good", "film"} <= {text.strip() for text in texts}
    assert {"good bad", "film bad", "film good"} <= texts, "one blank goes with a word"


def test_synonyms_are_the_other_words_of_a_synset():
    lines = [
        "  1 This software and database is being provided to you",
        "06613686 10 n 05 movie 0 film 0 picture 0 moving_picture 0 flick 1 000 | a form of entertainment",
        "00001740 00 a 02 Able(p) 0 24-hour 0 000 | having the means",
        "00002000 00 v 02 film 0 shoot 4 000 | make a film",
    ]
    synonyms = operators.read_synsets(lines)
    assert synonyms["film"] == ["movie", "picture", "moving picture", "flick", "shoot"]
    assert "able" not in synonyms and synonyms["shoot"] == ["film"]


def test_nearest_words_are_those_of_an_exhaustive_search():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = [f"w{i}" for i in range(300)]
    found = NearestWords(names, vectors, count=7)([*names[:200], "unknown"])
    assert found[200] == []
    for row in range(200):
        cosine = vectors @ vectors[row]
        cosine[row] = -np.inf
        assert found[row] == [names[i] for i in np.argsort(-cosine)[:7]]


@pytest.mark.parametrize("side", ["[SEP] it [CLS]", "don't won\u2019t", "@user #topic a/b well-made 10th x2", "! 4 a"])
def test_what_is_no_plain_word_stays(side):
    assert [side[start:end] for start, end in find_words(side)] in ([], ["it"])


def test_words_are_counted_over_both_sides():
    assert operators.count_words(("one two", "three")) == 3 and operators.count_words(("",)) == 1


def test_damaged_texts_have_fewer_of_the_same_words_in_another_order():
    text = ("one two three four five six seven eight nine ten", "single")
    (made,) = build_operator("damaged", lambda: None, lambda: None)([text], [text], 0.3, np.random.default_rng(0))
    words = made.text[0].split()
    assert len(words) == 7 and set(words) < set(text[0].split()) and words != sorted(words, key=text[0].split().index)
    assert made.text[1] == "single" and made.changed_share == 1
