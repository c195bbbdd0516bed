import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l2a.config import TeacherConfig
from l2a.data.examples import Examples, concatenate, normalised_hash
from l2a.teacher.crossfit import assign_folds, cross_fitted_labeller
from l2a.teacher.finetune import fine_tuned
from l2a.teacher.labelling import cached_labeller
from l2a.teacher.load import load_encoder
from l2a.teacher.store import TeacherOutputs
from l2a.util.errors import UsageError
from tests.conftest import LABELS, make_examples


def distinct(count: int) -> Examples:
    labels = np.arange(count) % 3 // 2  # two thirds are of the first class
    return Examples(tuple((f"text {i}",) for i in range(count)), labels.astype(np.int64), LABELS)


def constant_labeller(value: float):
    return lambda inputs: TeacherOutputs(
        np.full((len(inputs), 2), value, np.float32), np.full((len(inputs), 4), value, np.float32)
    )


@settings(deadline=None)
@given(st.integers(2, 60), st.integers(2, 6), st.integers(0, 20))
def test_folds_are_of_almost_equal_size_and_balance(count, folds, seed):
    folds, examples = min(folds, count), distinct(count)
    fold_of = assign_folds(examples, folds, np.random.default_rng(seed))
    assert np.ptp(np.bincount(fold_of, minlength=folds)) <= 1
    for label in (0, 1):
        assert np.ptp(np.bincount(fold_of[examples.labels == label], minlength=folds)) <= 1


def test_copies_of_a_text_share_a_fold():
    examples = distinct(40)
    copies = Examples(tuple((text[0].upper() + "  ",) for text in examples.inputs), examples.labels, LABELS)
    fold_of = assign_folds(concatenate(examples, copies), 3, np.random.default_rng(0))
    assert np.array_equal(fold_of[:40], fold_of[40:])


def test_the_seed_decides_the_folds():
    first, same, other = (assign_folds(distinct(40), 2, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


def test_no_teacher_labels_a_text_that_it_was_trained_on():
    source, asked = make_examples(60), []

    def train(examples: Examples):
        seen = {normalised_hash(text) for text in examples.inputs}

        def label(inputs):
            asked.extend(inputs)
            assert not seen & {normalised_hash(text) for text in inputs}
            return constant_labeller(1.0)(inputs)

        return label

    label = cross_fitted_labeller(source, constant_labeller(0.0), train, 3, np.random.default_rng(0))
    outputs = label([*source.inputs, source.inputs[0]])
    assert len(asked) == 61
    assert (outputs.logits == 1).all()


def test_the_folds_teachers_are_trained_on_everything_else_and_once():
    source, trained = distinct(31), []

    def train(examples: Examples):
        trained.append(set(examples.inputs))
        return constant_labeller(1.0)

    label = cross_fitted_labeller(source, constant_labeller(0.0), train, 2, np.random.default_rng(0))
    label([("elsewhere",)])
    assert not trained
    for _ in range(2):
        label(source.inputs)
    assert len(trained) == 2
    assert trained[0] | trained[1] == set(source.inputs)
    assert not trained[0] & trained[1]


def test_other_texts_and_all_embeddings_are_the_main_teachers():
    source = distinct(10)
    label = cross_fitted_labeller(
        source, constant_labeller(0.0), lambda examples: constant_labeller(1.0), 2, np.random.default_rng(0)
    )
    outputs = label([("new text",), source.inputs[3], ("TEXT 4",), ("another",)])
    assert outputs.logits[:, 0].tolist() == [0, 1, 1, 0]
    assert (outputs.embeddings == 0).all()


def test_labels_stay_with_their_texts_in_any_order(teacher):
    source = make_examples(24)
    rows = {text: float(i) for i, text in enumerate(source.inputs)}

    def by_text(inputs):
        return TeacherOutputs(np.array([[rows[text], 0] for text in inputs], np.float32), np.zeros((len(inputs), 4)))

    label = cross_fitted_labeller(source, by_text, lambda examples: by_text, 3, np.random.default_rng(0))
    assert np.array_equal(label(source.inputs[::-1]).logits, label(source.inputs).logits[::-1])
    assert np.array_equal(label(source.inputs).logits, by_text(source.inputs).logits)


@pytest.mark.parametrize("folds", [0, 1, 11])
def test_too_few_or_too_many_folds_are_refused(folds):
    with pytest.raises(UsageError, match=rf"kd.folds: {folds} came for 10 different source texts"):
        assign_folds(distinct(10), folds, np.random.default_rng(0))


@pytest.mark.slow
def test_held_out_soft_labels_are_less_certain_than_memorised_ones(encoder_folder, monkeypatch):
    source, shots = make_examples(48), make_examples(8, seed=3)
    source = Examples(source.inputs, np.random.default_rng(0).permutation(source.labels), LABELS)  # only memory helps
    config = TeacherConfig(learning_rate=3e-3, head_learning_rate=5e-3, batch_size=16, frozen_layers=0)

    def train(examples: Examples):
        base = load_encoder(str(encoder_folder), LABELS, 0)
        first = fine_tuned(base, examples, config, 25, 24, 0, "source")
        return cached_labeller(fine_tuned(first, shots, config, 1, 24, 0, "target"), 24)

    main = train(source)
    crossed = cross_fitted_labeller(source, main, train, 2, np.random.default_rng(0))(source.inputs)
    right = [float((outputs.logits.argmax(1) == source.labels).mean()) for outputs in (main(source.inputs), crossed)]
    assert right[0] > right[1] + 0.1
    assert np.array_equal(crossed.embeddings, main(source.inputs).embeddings)
    monkeypatch.setattr("l2a.teacher.finetune.fine_tune", lambda *rest: pytest.fail("trained again"))
    again = cross_fitted_labeller(source, main, train, 2, np.random.default_rng(0))(source.inputs)
    assert np.array_equal(again.logits, crossed.logits)
