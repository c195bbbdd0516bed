"""The rows of the comparison: each is trained without a look at the test split, then evaluated on it once."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l2a.config import DistillConfig
from l2a.data.encoding import encode
from l2a.data.examples import TextInput
from l2a.evaluation.baselines import FittedBaseline, frozen_teacher_logreg, tfidf_logreg, vector_sum_logreg
from l2a.kd.inference import run_student
from l2a.pipeline.session import RunContext
from l2a.pipeline.students import (
    TrainedStudent,
    train_augmented_student,
    train_fine_tuned_student,
    train_l2a_student,
    train_plain_student,
)
from l2a.student.student import Student
from l2a.teacher.labelling import predict, token_vectors
from l2a.teacher.model import Teacher
from l2a.util.cards import did_you_mean
from l2a.util.errors import UsageError
from l2a.util.progress import SILENT, Progress

Predict = Callable[[Sequence[TextInput]], NDArray[np.int64]]


@dataclass(frozen=True)
class FittedRow:
    """A trained classifier, not yet evaluated.

    Attributes:
        predict: Classifies texts as int64, indices into the run's label names.
        parameters: Numbers that it stores to do so.
        diagnostics: Facts of its training.
    """

    predict: Predict
    parameters: int
    diagnostics: Mapping[str, float | int | str]


@dataclass(frozen=True)
class RowResult:
    """One row on the test split.

    Attributes:
        name: The row.
        predictions: int64 (N,).
        labels: int64 (N,), the true classes.
        label_names: The C class names.
        parameters: Numbers that the classifier stores.
        seconds: Wall time of its own training, teachers and their labels apart when these were cached.
        diagnostics: Facts of its training.
    """

    name: str
    predictions: NDArray[np.int64]
    labels: NDArray[np.int64]
    label_names: tuple[str, ...]
    parameters: int
    seconds: float
    diagnostics: Mapping[str, float | int | str]


def fit_target_only_teacher(context: RunContext) -> FittedRow:
    """Take the teacher fine-tuned on the target's labels alone."""
    return _teacher_row(context.target_only_teacher, context.config.max_length)


def fit_cross_domain_teacher(context: RunContext) -> FittedRow:
    """Take the teacher that the student learns from."""
    return _teacher_row(context.teacher, context.config.max_length)


def fit_tfidf_logreg(context: RunContext) -> FittedRow:
    """Fit tf-idf and logistic regression on source and target."""
    data = context.data
    return _baseline_row(tfidf_logreg(data.source, data.target_labels, context.config.seed))


def fit_frozen_teacher_logreg(context: RunContext) -> FittedRow:
    """Fit logistic regression on the pretrained encoder's embeddings of the target's labels."""
    encoder, length = context.pretrained(), context.config.max_length

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        return predict(encoder, [(text,) for text in texts], length).embeddings

    labels = context.data.target_labels
    return _baseline_row(frozen_teacher_logreg(labels, embed, encoder.parameters_count, context.config.seed))


def fit_vector_sum_logreg(context: RunContext) -> FittedRow:
    """Fit logistic regression on sums of token vectors read from the fine-tuned teacher."""
    return _vector_sum_row(context, None)


def fit_cut_vector_sum_logreg(context: RunContext) -> FittedRow:
    """Fit the same on as many tokens of a text as teacher and students read; on as many of each side of a pair."""
    return _vector_sum_row(context, context.config.max_length - 2)  # [CLS] and [SEP]


def _vector_sum_row(context: RunContext, longest: int | None) -> FittedRow:
    data, teacher, seed = context.data, context.teacher, context.config.seed
    vectors = token_vectors(teacher, context.progress)
    return _baseline_row(vector_sum_logreg(data.source, data.target_labels, vectors, teacher.tokenizer, seed, longest))


def fit_plain_kd_student(context: RunContext) -> FittedRow:
    """Distil the student without augmentation and without unlabelled text."""
    return student_row(train_plain_student(context.without_unlabelled()), context.config.max_length)


def fit_plain_kd_unlabelled_student(context: RunContext) -> FittedRow:
    """Distil the student without augmentation, on the unlabelled text too."""
    _refuse_no_unlabelled(context)
    return student_row(train_plain_student(context), context.config.max_length)


def fit_l2a_without_unlabelled_student(context: RunContext) -> FittedRow:
    """Distil as ``l2a_student`` does, without the unlabelled text."""
    _refuse_no_unlabelled(context)
    return student_row(train_l2a_student(context.without_unlabelled()), context.config.max_length)


def fit_augmented_kd_student(context: RunContext) -> FittedRow:
    """Distil the student with every text of one operator, or of the chain, and without unlabelled text."""
    return student_row(train_augmented_student(context.without_unlabelled()), context.config.max_length)


def fit_augmented_fine_tuned_student(context: RunContext) -> FittedRow:
    """Fine-tune the student on the real labels, those of augmented texts inherited, without any teacher."""
    return student_row(train_fine_tuned_student(context.without_unlabelled()), context.config.max_length)


def fit_l2a_student(context: RunContext) -> FittedRow:
    """Distil the student with drawn and selected candidates."""
    return student_row(train_l2a_student(context), context.config.max_length)


ROWS: Mapping[str, Callable[[RunContext], FittedRow]] = {
    "target_only_teacher": fit_target_only_teacher,
    "cross_domain_teacher": fit_cross_domain_teacher,
    "tfidf_logreg": fit_tfidf_logreg,
    "frozen_teacher_logreg": fit_frozen_teacher_logreg,
    "vector_sum_logreg": fit_vector_sum_logreg,
    "cut_vector_sum_logreg": fit_cut_vector_sum_logreg,
    "plain_kd_student": fit_plain_kd_student,
    "plain_kd_unlabelled_student": fit_plain_kd_unlabelled_student,
    "l2a_without_unlabelled_student": fit_l2a_without_unlabelled_student,
    "augmented_kd_student": fit_augmented_kd_student,
    "augmented_fine_tuned_student": fit_augmented_fine_tuned_student,
    "l2a_student": fit_l2a_student,
}


def run_row(config: DistillConfig, row: str, progress: Progress = SILENT) -> RowResult:
    """Train one row and evaluate it once on the target's test split.

    Args:
        config: The run; its data, shots and seed are the same for every row.
        row: A name in ``ROWS``.
        progress: Shows how far it is.

    Returns:
        Predictions and labels of the test split.

    Raises:
        UsageError: If the row or the data are unknown or do not fit.
        RunError: If training fails.
    """
    if row not in ROWS:
        raise UsageError(f"row: {row!r} is unknown{did_you_mean(row, ROWS)}; allowed: {', '.join(ROWS)}")
    context = RunContext(config, progress)
    _prepare(context, row)
    started = time.monotonic()
    fitted = ROWS[row](context)
    return evaluate_row(context, row, fitted, time.monotonic() - started)


def evaluate_row(context: RunContext, name: str, fitted: FittedRow, seconds: float) -> RowResult:
    """Open the test split and classify it: the only place of a run that does.

    Args:
        context: The run.
        name: The row.
        fitted: The trained classifier.
        seconds: What its training took.

    Returns:
        Predictions and labels.
    """
    test = context.data.target.test.reveal()
    predictions = fitted.predict(test.inputs)
    return RowResult(name, predictions, test.labels, test.label_names, fitted.parameters, seconds, fitted.diagnostics)


def student_row(trained: TrainedStudent, max_length: int) -> FittedRow:
    """Make a row of a distilled student.

    Args:
        trained: The student.
        max_length: Longest sequence in tokens.

    Returns:
        The row, with the facts of its rounds.
    """
    facts: dict[str, float | int | str] = {"validation_log_likelihood": trained.validation_log_likelihood}
    for number, done in enumerate(trained.rounds):
        scalars = {k: v for k, v in dataclasses.asdict(done.chains).items() if isinstance(v, int | float | str)}
        scalars |= {k: v for k, v in done.selection.diagnostics.items() if isinstance(v, int | float | str)}
        facts |= {f"round_{number}_{key}": value for key, value in scalars.items()}
    return FittedRow(student_predictor(trained.student, max_length), trained.student.parameters_count, facts)


def student_predictor(student: Student, max_length: int) -> Predict:
    """Wrap a student as a function from texts to classes.

    Args:
        student: Any student.
        max_length: Longest sequence in tokens.

    Returns:
        The function.
    """

    def classify(inputs: Sequence[TextInput]) -> NDArray[np.int64]:
        return classes_of(run_student(student, encode(student.tokenizer, inputs, max_length))[0])

    return classify


def classes_of(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """Take the likeliest class of each text.

    Args:
        logits: float32 (N, C).

    Returns:
        int64 (N,).
    """
    likeliest: NDArray[np.int64] = logits.argmax(axis=1)
    return likeliest


def _refuse_no_unlabelled(context: RunContext) -> None:
    if context.config.unlabelled is None:
        raise UsageError("unlabelled: none was given; this row needs a .txt file or a domain (--unlabelled)")


def _prepare(context: RunContext, row: str) -> None:
    """Do the shared, cached work first, so that a row's seconds are its own."""
    if row == "target_only_teacher":
        _ = context.target_only_teacher
    elif row not in ("tfidf_logreg", "frozen_teacher_logreg", "augmented_fine_tuned_student"):
        _ = context.teacher
    if row.endswith("_student"):
        context.labeller(context.data.source.inputs)


def _teacher_row(teacher: Teacher, max_length: int) -> FittedRow:
    def classify(inputs: Sequence[TextInput]) -> NDArray[np.int64]:
        return classes_of(predict(teacher, inputs, max_length).logits)

    return FittedRow(classify, teacher.parameters_count, {})


def _baseline_row(baseline: FittedBaseline) -> FittedRow:
    return FittedRow(baseline.predict, baseline.parameters, {})
