"""Texts near the target are found by their words alone."""

import numpy as np
import pytest

from l2a.generator.chain import choose_texts, fit_word_average

from .conftest import COMMON, FILM, PHONE, sentences


@pytest.fixture
def embed(word_tokenizer, embeddings):
    return fit_word_average(word_tokenizer, embeddings, sentences(FILM, 60, seed=1), 16)


def test_a_text_is_the_direction_of_its_rare_words(word_tokenizer, embeddings):
    common = tuple((" ".join([*COMMON, word]),) for word in FILM)
    embed = fit_word_average(word_tokenizer, embeddings, common, 16)
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
    bank = tuple(np.random.default_rng(0).permutation(np.array(near + far)).reshape(-1, 1).tolist())
    bank = tuple(map(tuple, bank))
    target = sentences(PHONE, 12, seed=2)
    chosen = choose_texts(bank, target, 60, choice, embed, np.random.default_rng(0))
    chosen = [bank[i] for i in chosen]
    assert len(set(chosen)) == 60 and [text for text in bank if text in set(chosen)] == chosen
    assert least <= np.mean([text in set(near) for text in chosen]) <= most


def test_a_bank_that_is_small_enough_is_taken_whole(embed):
    bank = sentences(FILM, 5, seed=1)
    chosen = choose_texts(bank, sentences(PHONE, 4, seed=2), 5, "near", embed, np.random.default_rng(0))
    assert chosen.tolist() == [0, 1, 2, 3, 4]
