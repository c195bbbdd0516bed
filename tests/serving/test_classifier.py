"""A student in Python: the numbers of transformers, the habits of scikit-learn, temperatures and refusals."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import softmax
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import parametrize_with_checks
from transformers import BertForSequenceClassification, BertTokenizerFast, pipeline

import l2a
from l2a.report.run_folder import export_student
from l2a.serving.classifier import as_inputs, fit_temperature, write_temperature
from l2a.student.student import class_names
from l2a.util.errors import UsageError
from tests.conftest import LABELS, labelled, make_examples, tiny_bert_config

TEXTS = [text for (text,) in make_examples(40).inputs] + ["good " * 60]
PAIRS = list(make_examples(12, pairs=True).inputs)


@pytest.mark.parametrize("texts", [TEXTS, PAIRS], ids=["texts", "pairs"])
def test_probabilities_are_those_of_transformers(classifier, student, texts):
    found = classifier.predict_proba(texts)
    assert found.shape == (len(texts), 3) and found.dtype == np.float64
    classify = pipeline("text-classification", model=str(student), truncation=True, top_k=None, device="cpu")
    asked = [text if isinstance(text, str) else {"text": text[0], "text_pair": text[1]} for text in texts]
    expected = [{one["label"]: one["score"] for one in answer} for answer in classify(asked)]
    assert (names := classifier.classes_.tolist()) == ["mixed", "negative", "positive"]
    assert np.allclose(found, [[answer[name] for name in names] for answer in expected], atol=1e-5)
    assert list(classifier.predict(texts)) == [max(answer, key=answer.get) for answer in expected]
    assert len(classifier.predict([])) == 0 and classifier.predict_proba([]).shape == (0, 3)


def test_works_inside_scikit_learn(classifier):
    steps = make_pipeline(FunctionTransformer(lambda texts: [text.upper() for text in texts]), classifier)
    labels = classifier.predict(TEXTS)
    assert np.array_equal(steps.fit(TEXTS, ["mixed"] * 41).predict(TEXTS), labels)
    assert classifier.score(TEXTS, labels) == 1.0
    for copied in (clone(classifier), pickle.loads(pickle.dumps(classifier))):
        assert np.array_equal(copied.predict(TEXTS[:3]), labels[:3])
    calibrated = CalibratedClassifierCV(FrozenEstimator(classifier)).fit(TEXTS * 3, np.tile(labels, 3))
    assert calibrated.predict_proba(TEXTS).shape == (len(TEXTS), len(set(labels)))
    assert (calibrated.predict(TEXTS) == labels).mean() > 0.9


def test_arrays_series_and_frames_hold_texts():
    series = pd.Series(["a", "b"])
    for texts in (series, np.array(["a", "b"]), series.to_frame("text")):
        assert as_inputs(texts) == [("a",), ("b",)]
    assert as_inputs(pd.DataFrame(PAIRS)) == as_inputs([list(pair) for pair in PAIRS]) == PAIRS


@pytest.mark.parametrize("texts", ["one text", [3], [None], ["a", ("b", "c")], [("a", "b", "c")], [[]]])
def test_what_is_no_list_of_texts_is_refused(texts):
    with pytest.raises(UsageError, match="give a list of strings"):
        as_inputs(texts)


def test_the_temperature_of_miscalibrated_logits_is_found():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 3)) * 2
    labels = np.array([rng.choice(3, p=row) for row in softmax(logits, axis=1)])
    assert fit_temperature(logits * 2.5, labels) == pytest.approx(2.5, rel=0.08)
    assert fit_temperature(logits, labels) == pytest.approx(1.0, rel=0.08)
    assert fit_temperature(np.eye(3) * 9, np.arange(3)) >= 0.05


def test_a_kept_temperature_is_used(classifier, student, tmp_path):
    shutil.copytree(student, tmp_path / "warm")
    write_temperature(tmp_path / "warm", 2.0)
    warm = l2a.Classifier.from_pretrained(tmp_path / "warm")
    halved = softmax(np.log(classifier.predict_proba(TEXTS)) / 2, axis=1)
    assert np.allclose(warm.predict_proba(TEXTS), halved)
    assert np.array_equal(warm.predict(TEXTS), classifier.predict(TEXTS))


def test_a_wrong_temperature_is_refused(student, tmp_path):
    shutil.copytree(student, tmp_path / "student")
    for content in ('{"temperature": 0}', "{}", "no JSON", '{"temperature": NaN}'):
        (tmp_path / "student" / "l2a.json").write_text(content)
        with pytest.raises(UsageError, match="temperature is no positive number"):
            l2a.Classifier.from_pretrained(tmp_path)


def test_a_folder_without_a_student_is_refused(student, tmp_path):
    for _ in range(2):
        with pytest.raises(UsageError, match="with a model beside it"):
            l2a.Classifier.from_pretrained(tmp_path)
        shutil.copy(student / "config.json", tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(UsageError, match="write it again by l2a export"):
        l2a.Classifier.from_pretrained(tmp_path)


def test_an_estimator_is_cloned_with_its_settings_and_must_be_fitted():
    made = clone(l2a.L2AClassifier(source="movies", teacher="minilm-l6", shots=4)).set_params(shots=5)
    assert made.get_params() == {"source": "movies", "output_dir": None, "teacher": "minilm-l6", "shots": 5}
    with pytest.raises(NotFittedError):
        made.predict(["good"])


class OfNumbers(l2a.L2AClassifier):
    """Reads rows of numbers as texts and has an untrained student: the checks of scikit-learn know no texts."""

    def fit(self, X, y):  # noqa: N803
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("l2a.pipeline.estimator.distill", self.untrained)
            return super().fit(list(map(str, np.asarray(X).tolist())), y)

    def untrained(self, target, output_dir, **_):
        torch.manual_seed(0)
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"0123456789.-e", *(f"##{i}" for i in range(10))]
        tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
        config = tiny_bert_config(tokenizer, **class_names(tuple(sorted({label for _, label in target}))))
        student = Path(output_dir) / "student"
        export_student(BertForSequenceClassification(config).eval(), tokenizer, student, "a card", 24)

    def predict_proba(self, X):  # noqa: N803
        return super().predict_proba(list(map(str, np.asarray(X).tolist())))

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = tags.no_validation = True
        return tags


EXPECTED_FAILURES = {
    "check_no_attributes_set_in_init": "settings of l2a.distill are taken as they come, and kept together",
    "check_dont_overwrite_parameters": "the student is public, as engine",
    **{f"check_estimator_sparse_{kind}": "texts are never sparse" for kind in ("tag", "array", "matrix")},
    "check_classifiers_train": "the student of this test is not trained",
    "check_fit2d_1sample": "l2a.distill refuses a single class in its own words",
}


@pytest.mark.slow
@parametrize_with_checks([OfNumbers()], expected_failed_checks=lambda _: EXPECTED_FAILURES)
def test_an_estimator_passes_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.slow
def test_numbers_as_labels_come_back_as_numbers_from_cross_validation_and_calibration():
    rows, labels = np.arange(24).reshape(12, 2), np.array([9, 10] * 6)
    assert OfNumbers().fit(rows, labels).predict(rows).dtype == labels.dtype
    assert np.isfinite(cross_val_score(OfNumbers(), rows, labels, cv=2, error_score="raise")).all()
    calibrated = CalibratedClassifierCV(OfNumbers(), cv=2).fit(rows, labels)
    assert calibrated.classes_.tolist() == [9, 10] and calibrated.predict_proba(rows).shape == (12, 2)


@pytest.mark.slow
def test_an_estimator_distils_and_classifies(encoder_folder):
    texts, labels = map(list, zip(*labelled(120, 2, "this "), strict=True))
    made = l2a.L2AClassifier(
        source=labelled(150, 1, "the "),
        teacher={"model": str(encoder_folder), "learning_rate": 1e-3, "frozen_layers": 0}, student={"max_share": 0.9},
        generator={"chains": 8}, selector={"agent": "random"}, max_length=32, dev_shots=6, compare=False,
        kd={"warmup_steps": 40, "rounds": 1, "round_steps": 10, "pool_size": 48},
    )  # fmt: skip
    assert made.fit(texts, labels).classes_.tolist() == list(LABELS)
    assert set(made.predict(texts)) <= set(LABELS) and 0 <= made.score(texts, labels) <= 1
    assert not made.result_.output_dir.exists()
    assert made.result_.metrics["labels_used"] > 60
