"""The rows of one operator without a selector and of linear models."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import l2a.pipeline.students as augmented
from l2a.config import override
from l2a.data.examples import Examples, normalised_hash
from l2a.pipeline import methods
from l2a.pipeline.data import load_run_data
from l2a.pipeline.methods import METHODS, prepare, run_method
from l2a.pipeline.session import RunContext, TrainingSession
from l2a.pipeline.students import train_augmented_student, train_fine_tuned_student
from l2a.util.errors import UsageError
from tests.conftest import LABELS, make_examples

OPERATORS = (None, "augpro_mix", "augpro_fgsm", "knn", "source", "target_only", "mixkd", "unprojected_fgsm")
TRAINED = [*(("augmented_kd_student", it) for it in OPERATORS), ("plain_kd_student", None), ("l2a_student", None)]


@pytest.fixture
def context(config):
    return RunContext(override(config, {"generator.degree": 0.5, "selector.agent": "random"}))


def with_operator(context, operator, copies=1):
    return RunContext(override(context.config, {"generator.operator": operator, "generator.copies": copies}))


@pytest.fixture
def no_teacher(monkeypatch):
    for name in ("fine_tuned", "cached_labeller", "refuse_useless_teacher"):
        monkeypatch.setattr(f"l2a.pipeline.session.{name}", lambda *_: pytest.fail("a teacher was trained or checked"))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "operator"), TRAINED)
def test_every_method_and_operator_trains_as_long_as_plain_distillation(context, monkeypatch, method, operator):
    steps, finish = [], augmented.finish
    monkeypatch.setattr(augmented, "finish", lambda it, *a: steps.append(it.trainer.steps_done) or finish(it, *a))
    trained = METHODS[method].fit(with_operator(context, operator)).trained
    assert steps == [context.config.kd.total_steps]
    assert np.isfinite(trained.score.log_likelihood) and not trained.student.model.training


@pytest.fixture
def watched(monkeypatch):
    """What is drawn from now on, and the sessions that distil with the candidates that they get, if any."""
    made, distilled, draw, distil = [], [], augmented.draw_texts, TrainingSession.distil
    monkeypatch.setattr(augmented, "draw_texts", lambda *given: made.append(draw(*given)) or made[-1])
    monkeypatch.setattr(TrainingSession, "distil", lambda it, *a: distilled.append((it, a[0])) or distil(it, *a))
    return made, distilled


def drawn(context, watched):
    for seen in watched:
        seen.clear()
    train_augmented_student(context)
    made, distilled = watched
    assert [len(kept) for _, kept in distilled if kept is not None] == [len(inputs) for inputs, _ in made]
    return [inputs for inputs, _ in made]


@pytest.mark.parametrize(("operator", "copies"), [("augpro_mix", 1), ("knn", 2)])
def test_candidates_are_new_and_as_many_as_asked(context, watched, operator, copies):
    context = with_operator(context, operator, copies)
    own = {normalised_hash(text) for text in context.data.splits.train.inputs}
    for inputs in drawn(context, watched):
        hashes = {normalised_hash(text) for text in inputs}
        assert len(inputs) == len(hashes) == copies * context.config.kd.pool_size
        assert not hashes & (own | context.data.target.test.hashes | context.data.forbidden)


@pytest.mark.slow
def test_copies_come_from_the_domain_that_the_operator_names(context, watched):
    for operator, inputs in (("source", context.data.source.inputs), ("target_only", context.data.splits.train.inputs)):
        for texts in drawn(with_operator(context, operator), watched):
            assert set(texts) <= set(inputs)


@pytest.mark.slow
def test_fine_tuning_learns_from_inherited_labels_and_asks_no_teacher(context, no_teacher, watched):
    context, (made, distilled) = with_operator(context, "augpro_mix"), watched
    result = run_method(context.config, "augmented_fine_tuned_student")
    assert (result.predictions == result.test.labels).mean() > 0.8
    assert {(it.trainer.config.alpha, it.trainer.config.hidden_weight) for it, _ in distilled} == {(0, 0)}
    parts, sets = (context.data.source, context.data.splits.train), [kept for _, kept in distilled if kept is not None]
    real = {text: label for part in parts for text, label in zip(part.inputs, part.labels.tolist(), strict=True)}
    assert len(sets) == context.config.kd.rounds
    for kept, (inputs, bases) in zip(sets, made, strict=True):
        assert kept.labels.tolist() == [real[base] for base in bases] and inputs != bases
        assert all(len(one[0].split()) == len(base[0].split()) for one, base in zip(inputs, bases, strict=True))


@pytest.mark.parametrize("operator", [None, "augpro_fgsm", "mixkd"])
def test_fine_tuning_refuses_operators_that_ask_a_teacher(context, operator):
    with pytest.raises(UsageError, match=r"generator\.operator.*needs a teacher.*augpro_mix"):
        train_fine_tuned_student(with_operator(context, operator))


def test_the_source_can_be_cut_to_a_size(context):
    cut, again, more = (load_run_data(override(context.config, {"source_size": n})).source for n in (20, 20, 10_000))
    assert more.inputs == context.data.source.inputs
    assert len(cut) == 20 < len(more) and cut.inputs == again.inputs and set(cut.inputs) <= set(more.inputs)
    with pytest.raises(UsageError, match="source_size"):
        override(context.config, {"source_size": 1})


def test_nothing_of_a_teacher_is_prepared_for_fine_tuning_alone(context, no_teacher):
    prepare(context, METHODS["augmented_fine_tuned_student"])
    with pytest.raises(pytest.fail.Exception, match="a teacher"):
        prepare(RunContext(context.config), METHODS["augmented_kd_student"])


SOURCE, TARGET, TEST = make_examples(80, 1), make_examples(30, 2), make_examples(60, 3)


@pytest.fixture(scope="module")
def vectors(tokenizer):
    return np.random.default_rng(0).normal(size=(len(tokenizer), 24)).astype(np.float32)


@pytest.fixture(scope="module")
def fit(tokenizer, vectors):
    """Every baseline by name: from source and target to the fitted baseline."""

    def embed(texts):
        return np.asarray(methods.bag_of_tokens(tokenizer, texts, len(vectors)) @ vectors, np.float32)

    return {
        "tfidf": lambda source, target: methods.tfidf_logreg(source, target, 0),
        "frozen_teacher": lambda source, _: methods.frozen_teacher_logreg(source, embed, 1000, 0),
        "vector_sum": lambda *sets: methods.vector_sum_logreg(*sets, vectors, tokenizer, 0),
    }


@pytest.fixture(scope="module")
def fitted(fit):
    """Each of them, fitted on single texts."""
    return {name: train(SOURCE, TARGET) for name, train in fit.items()}


def accuracy(baseline, examples):
    return float((baseline.predict(examples.inputs) == examples.labels).mean())


@pytest.mark.parametrize("name", ["tfidf", "frozen_teacher", "vector_sum"])
def test_every_baseline_learns_what_one_word_decides_and_repeats_it(fit, fitted, name):
    source, target, test = (make_examples(n, seed, pairs=True) for n, seed in ((60, 1), (30, 2), (40, 3)))
    assert accuracy(fitted[name], TEST) > 0.9 and accuracy(fit[name](source, target), test) > 0.9
    found, again = (each.predict(TEST.inputs) for each in (fitted[name], fit[name](SOURCE, TARGET)))
    assert np.array_equal(found, again) and found.dtype == np.int64


def test_parameters_count_what_prediction_needs(fitted, vectors):
    width = methods.fit_tfidf((*SOURCE.inputs, *TARGET.inputs))(TARGET.inputs).shape[1]
    stored = {"tfidf": 0, "frozen_teacher": 1000, "vector_sum": vectors.size}
    expected = {name: stored[name] + (width if name == "tfidf" else 24) + 1 for name in fitted}
    assert {name: each.parameters for name, each in fitted.items()} == expected


def test_labels_of_the_target_outweigh_a_source_that_contradicts_them(fit):
    contradicting = Examples(SOURCE.inputs, 1 - SOURCE.labels, LABELS)
    assert accuracy(fit["tfidf"](contradicting, make_examples(60, 2)), TEST) > 0.9


def test_a_source_of_the_same_law_is_used():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(816, 40)).astype(np.float32)
    labels = (features @ rng.normal(size=40) > 0).astype(np.int64)
    with_source, without = (
        methods.tuned_logistic_regression(features[rows], labels[rows], sources, 0)
        for rows, sources in ((slice(0, 416), 400), (slice(400, 416), 0))
    )
    assert with_source.score(features[416:], labels[416:]) > 0.9 > without.score(features[416:], labels[416:])


def test_folds_hold_out_each_target_example_once_and_nothing_else(fit, monkeypatch):
    judged, ask = [], LogisticRegression.predict_proba
    monkeypatch.setattr(LogisticRegression, "predict_proba", lambda it, x: judged.append(x.shape[0]) or ask(it, x))
    fit["tfidf"](SOURCE, TARGET)
    assert sum(judged) == len(TARGET) * (5 + 4)  # shares of the target, then penalties


@pytest.mark.parametrize("copies", [1, 2])
def test_one_or_two_labels_per_class_are_enough(fit, copies):
    target = Examples((("good film",), ("bad film",)) * copies, np.array([1, 0] * copies), LABELS)
    assert accuracy(fit["tfidf"](SOURCE, target), target) == 1.0


def test_three_classes(fit, vectors):
    words, rng = ("good", "bad", "phone"), np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    inputs = tuple((f"the {words[label]} {rng.choice(['story', 'battery', 'film'])}",) for label in labels)
    examples = Examples(inputs, labels.astype(np.int64), words)
    source, target, test = (examples.take(np.arange(start, start + 30)) for start in (0, 30, 60))
    assert accuracy(fit["tfidf"](source, target), test) == 1.0
    baseline = fit["vector_sum"](source, target)
    assert accuracy(baseline, test) > 0.9 and baseline.parameters == vectors.size + 3 * 24 + 3


def test_a_bag_counts_all_tokens_but_special_ones(tokenizer):
    tokenizer(["good"], truncation=True, max_length=2)  # as an earlier caller may have left it
    texts = ["good good film", "bad story", ""]
    counts = methods.bag_of_tokens(tokenizer, texts, len(tokenizer)).toarray()
    assert counts[0, tokenizer.convert_tokens_to_ids(["good", "film"])].tolist() == [2, 1]
    assert counts[[0, 2]].sum(axis=1).tolist() == [3, 0]


def test_sides_of_a_pair_are_embedded_apart():
    def embed(texts):
        return np.array([[len(text), 1.0] for text in texts], np.float32)

    features = methods.pair_features([("abc", "abcd"), ("a", "a")], embed)
    assert features.tolist() == [[3, 1, 4, 1, 1, 0, 12, 1], [1, 1, 1, 1, 0, 0, 1, 1]]


def test_pair_features_tell_shared_words_from_different_ones():
    pairs = (("good film", "good film"), ("good film", "bad story"), ("bad story", "good film"))
    cosines = methods.fit_tfidf(pairs)(pairs).toarray()[:, -2:]
    assert cosines[0] == pytest.approx([1.0, 1.0], abs=1e-5) and (cosines[1:] < 0.2).all()


@pytest.mark.parametrize("name", ["tfidf", "vector_sum"])
def test_unusual_texts_are_classified(fitted, name):
    assert set(fitted[name].predict([("",), ("   ",), ("\u2603",), ("x" * 20_000,)]).tolist()) <= {0, 1}
