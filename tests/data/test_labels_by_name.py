from dataclasses import replace

import pytest

from l2a.data.examples import align_labels
from l2a.util.errors import UsageError


def named(domain, part):
    return [(text, domain.label_names[label]) for text, label in zip(part.inputs, part.labels, strict=True)]


def test_labels_are_matched_by_name_in_every_split(make_domain):
    source = make_domain({"positive": 2, "negative": 3}, {"positive": 1, "negative": 2}, {"positive": 2, "negative": 1})
    target = make_domain({"negative": 1, "positive": 1}, {"negative": 1, "positive": 1}, {"negative": 1, "positive": 1})
    aligned, same = align_labels(source, target)
    assert same is target
    assert aligned.label_names == aligned.train.label_names == target.label_names
    assert named(aligned, aligned.train) == named(source, source.train)
    assert named(aligned, aligned.dev) == named(source, source.dev)
    assert named(aligned, aligned.test.reveal()) == named(source, source.test.reveal())
    assert aligned.train.labels.tolist() == [1, 1, 0, 0, 0]
    assert aligned.test.hashes == source.test.hashes


def test_a_label_that_one_domain_lacks_is_named(make_domain):
    source = make_domain({"Negative": 1, "positive": 1}, {"Negative": 1}, {"Negative": 1}, name="films")
    target = make_domain({"negative": 1, "positive": 1}, {"negative": 1}, {"negative": 1}, name="posts")
    message = r"posts lacks the label 'Negative' of films \(did you mean 'negative'\?\); films lacks the label 'nega"
    with pytest.raises(UsageError, match=message):
        align_labels(source, target)


def test_integers_never_match_names(make_domain):
    source = make_domain({"0": 1, "1": 1}, {"0": 1}, {"0": 1})
    target = make_domain({"negative": 1, "positive": 1}, {"negative": 1}, {"negative": 1})
    with pytest.raises(UsageError, match="matched by name"):
        align_labels(source, target)


def test_pairs_and_single_texts_do_not_go_together(make_domain):
    domain = make_domain({"a": 1, "b": 1}, {"a": 1}, {"a": 1}, name="single")
    with pytest.raises(UsageError, match="pairs has pairs of texts and single single ones"):
        align_labels(replace(domain, is_pair=True, name="pairs"), domain)
