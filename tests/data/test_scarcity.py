from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, strategies as st

from l2a.data.examples import Domain, Examples, HeldOut, concatenate, few_shot_splits, normalised_hash, words_key
from l2a.util.errors import UsageError

BALANCED = {"negative": 40, "positive": 40}


def draw(domain, shots, dev_shots, seed=0):
    return few_shot_splits(domain, shots, dev_shots, np.random.default_rng(seed))


def test_every_part_has_its_examples_of_each_class_and_unlabelled_is_the_rest(make_domain):
    domain = make_domain(BALANCED, BALANCED, BALANCED)
    label_of, splits = dict(zip(domain.train.inputs, domain.train.labels, strict=True)), draw(domain, 8, 4)
    parts = (splits.train, splits.reward, splits.validation)
    assert [np.bincount(part.labels).tolist() for part in parts] == [[8, 8], [4, 4], [4, 4]]
    assert (splits.labels_used, splits.labels_ignored) == (32, 160 - 32)
    assert splits.train.labels.tolist()[:4] == [0, 1, 0, 1]
    for part in parts:
        assert all(label_of[text] == label for text, label in zip(part.inputs, part.labels, strict=True))
    assert set(splits.unlabelled) == set(domain.train.inputs) - {text for part in parts for text in part.inputs}


def test_one_seed_gives_one_draw_and_another_gives_another(make_domain):
    domain = make_domain(BALANCED, BALANCED, BALANCED)
    assert draw(domain, 8, 4).train.inputs == draw(domain, 8, 4).train.inputs
    assert draw(domain, 8, 4).train.inputs != draw(domain, 8, 4, seed=1).train.inputs


def test_more_shots_keep_the_earlier_examples_and_the_other_parts(make_domain):
    domain = make_domain(BALANCED, BALANCED, BALANCED)
    few, many = draw(domain, 4, 4), draw(domain, 16, 4)
    assert set(few.train.inputs) < set(many.train.inputs)
    assert few.reward.inputs == many.reward.inputs and few.validation.inputs == many.validation.inputs


def test_dev_helps_out_when_train_is_short(make_domain):
    domain = make_domain({"negative": 9, "positive": 40}, {"negative": 20, "positive": 20}, BALANCED)
    splits = draw(domain, 8, 4)
    held_out = concatenate(splits.reward, splits.validation)
    negative = [held_out.inputs[i][0] for i in np.flatnonzero(held_out.labels == 0)]
    assert sum(text.startswith("dev") for text in negative) == 7


@pytest.mark.parametrize(("train", "dev"), [(7, 40), (9, 6), (15, 0)])
def test_too_few_examples_are_refused_with_the_counts(make_domain, train, dev):
    domain = make_domain({"negative": 40, "positive": train}, {"negative": 40, "positive": dev}, BALANCED)
    message = f"need 16 different .* positive has {train} in train and {dev} in dev.*--shots"
    with pytest.raises(UsageError, match=message):
        draw(domain, 8, 4)


def test_exactly_enough_is_enough(make_domain):
    domain = make_domain({"negative": 16, "positive": 16}, {"negative": 0, "positive": 0}, BALANCED)
    assert draw(domain, 8, 4).labels_used == 32


def test_all_labels_are_used_when_no_number_of_shots_is_given(make_domain):
    domain = make_domain({"negative": 100, "positive": 9}, {"negative": 10, "positive": 0}, BALANCED)
    splits = draw(domain, None, 16)
    parts = (splits.train, splits.reward, splits.validation)
    assert [np.bincount(part.labels).tolist() for part in parts] == [[78, 5], [16, 2], [16, 2]]
    assert (splits.labels_used, splits.labels_ignored, splits.unlabelled) == (119, 0, ())
    assert len({text for part in parts for text in part.inputs}) == 119
    dev = sum(text.startswith("dev") for part in parts[1:] for (text,) in part.inputs)
    assert dev == 10 and splits.train.labels.tolist()[:4] == [0, 1, 0, 1]


@pytest.mark.parametrize(("size", "parts"), [(3, [1, 1, 1]), (7, [5, 1, 1]), (8, [4, 2, 2])])
def test_small_classes_keep_at_least_half_for_training(make_domain, size, parts):
    splits = draw(make_domain({"a": size, "b": size}, {"a": 0, "b": 0}, BALANCED), None, 16)
    assert [len(part) // 2 for part in (splits.train, splits.reward, splits.validation)] == parts


def test_a_class_of_two_examples_is_refused(make_domain):
    with pytest.raises(UsageError, match=r"target: the class 'b' has 2 different labelled .* at least 3"):
        draw(make_domain({"a": 9, "b": 2}, {"a": 0, "b": 0}, BALANCED), None, 16)


def test_copies_do_not_count_and_never_stand_in_two_parts(make_domain):
    domain = make_domain({"negative": 16, "positive": 16}, {"negative": 0, "positive": 0}, BALANCED)
    inputs = tuple((text[0].upper(),) if i % 2 else text for i, text in enumerate(domain.train.inputs))
    copies = Examples(domain.train.inputs[:1] * 32, domain.train.labels, domain.label_names)
    draw(replace(domain, train=Examples(inputs, domain.train.labels, domain.label_names)), 8, 4)
    with pytest.raises(UsageError, match="different examples"):
        draw(replace(domain, train=copies), 8, 4)


@pytest.mark.parametrize(("shots", "dev_shots"), [(0, 4), (8, -1), (-1, 4)])
def test_numbers_that_make_no_sense_and_a_target_without_test_are_refused(make_domain, shots, dev_shots):
    with pytest.raises(UsageError, match=r"shots is .* at least [01] "):
        draw(make_domain(BALANCED, BALANCED, BALANCED), shots, dev_shots)
    with pytest.raises(UsageError, match="no test split, so it can only be a source"):
        draw(make_domain(BALANCED, BALANCED, {"negative": 0, "positive": 0}), 8, 4)


NUMBERED = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 1)), max_size=80)


@given(
    NUMBERED, NUMBERED, st.lists(st.integers(0, 30), min_size=1, max_size=10), st.integers(0, 5),
    st.sampled_from([2, None]),
)  # fmt: skip
def test_parts_are_disjoint_and_free_of_test_texts(train, dev, test, seed, shots):
    def examples(pairs):
        inputs = tuple((f"Text  {number}" if label else f"text, {number}!",) for number, label in pairs)
        return Examples(inputs, np.array([label for _, label in pairs], dtype=np.int64), ("a", "b"))

    held_out = HeldOut.of(examples([(number, 0) for number in test]))
    domain = Domain("d", ("a", "b"), False, examples(train), examples(dev), held_out, {})
    try:
        splits = draw(domain, shots, 1, seed)
    except UsageError:
        return
    parts = (splits.train.inputs, splits.reward.inputs, splits.validation.inputs, splits.unlabelled)
    hashes = [{normalised_hash(text) for text in part} for part in parts]
    assert sum(map(len, parts)) == len(set().union(*hashes))
    keys = {words_key(*text) for part in parts for text in part}
    assert not set().union(*hashes) & held_out.hashes and not keys & held_out.words
