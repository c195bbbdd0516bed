"""The registry of methods, linear ones among them: each is trained, then evaluated once on the test split."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import sparse
from sklearn import feature_extraction, model_selection, pipeline, preprocessing
from sklearn.linear_model import LogisticRegression
from torch import nn

from l2a.config import DistillConfig, override
from l2a.data import Examples, Floats, Ints, TextInput, encoding, normalised_hash
from l2a.kd.trainer import TEMPERATURES, mean_divergence, run_student
from l2a.pipeline import students
from l2a.pipeline.session import RunContext
from l2a.student.student import Student
from l2a.teacher import labelling, model
from l2a.util import SILENT, Progress, UsageError, did_you_mean

EmbedTexts = Callable[[Sequence[str]], Floats]
"""Embeds N strings as float32 (N, d)."""
Predict = Callable[[Sequence[TextInput]], Ints]
Logits = Callable[[Sequence[TextInput]], Floats]
Part = Literal["pretrained", "small", "target_only_teacher", "cross_domain_teacher", "labels", "unlabelled"]
"""What methods share: the encoder as it was pretrained, two fine-tuned teachers, the labels that one of them gives to
the source, and text without labels."""
SHARED = {"target_only_teacher": "target_only_teacher", "cross_domain_teacher": "teacher", "labels": "labeller"}
"""What ``RunContext`` calls the parts that take long."""


@dataclass(frozen=True)
class FittedMethod:
    """A trained classifier, not yet evaluated.

    Attributes:
        predict: Classifies texts as int64, indices into the run's label names.
        parameters: Numbers that it stores to do so.
        diagnostics: Facts of its training.
        logits: Scores texts as float32 (N, C), of which ``predict`` takes the highest; None where there are none.
        module: The network that ``predict`` runs, on whatever device it is; None where there is none.
        trained: The student with its rounds, where the method gives a student.
    """

    predict: Predict
    parameters: int
    diagnostics: Mapping[str, float | int | str] = field(default_factory=dict)
    logits: Logits | None = None
    module: nn.Module | None = None
    trained: students.TrainedStudent | None = None


Fit = Callable[[RunContext], FittedMethod]
"""Trains a method without a look at the test split."""
Train = Callable[[RunContext], students.TrainedStudent]
Students = dict[str, students.TrainedStudent]
Shown = Literal["always", "compare", "operator", "experiments"]


class Method(NamedTuple):
    """One way to get a classifier, and everything that the rest of the toolkit must know of it.

    Attributes:
        name: As in tables and results.
        help: What it is, in a line.
        fit: Trains it without a look at the test split.
        needs: What is shared with other methods and prepared before the clock runs.
        reads: Sections of the configuration that decide its result, beside the data, the seed and ``max_length``.
        shown: When a distillation compares with it: "always", with "compare", with "operator" where
            ``generator.operator`` is set as well, or in "experiments" alone.
    """

    name: str
    help: str
    fit: Fit
    needs: tuple[Part, ...] = ()
    reads: tuple[str, ...] = ()
    shown: Shown = "compare"


class MethodResult(NamedTuple):
    """One method on the test split.

    Attributes:
        name: The method.
        test: The N examples, with their true classes.
        predictions: int64 (N,).
        parameters: Numbers that the classifier stores.
        labels_used: Labelled target examples that the run reads, those of the reward and validation splits included.
        seconds: Wall time of its own training, shared parts aside.
        diagnostics: Facts of its training.
        logits: float32 (N, C), where the method gives some.
    """

    name: str
    test: Examples
    predictions: Ints
    parameters: int
    labels_used: int
    seconds: float
    diagnostics: Mapping[str, float | int | str]
    logits: Floats | None = None


DENSE_PENALTIES, SPARSE_PENALTIES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), (3.0, 10.0, 30.0, 100.0)
"""Values of C to try, for a total weight of 1000; the middle one is used while the target's weight is chosen."""


def fit_tfidf(inputs: Sequence[TextInput]) -> Callable[[Sequence[TextInput]], sparse.csr_matrix]:
    """Weigh words, word pairs and character n-grams inside words by training texts; of over 200, those in two or more.

    Returns:
        Features of N texts, float32 (N, F), sparse; for pairs, the words of both sides, the words that they share, and
        their cosine similarities by words and by characters.
    """
    texts = [side for text in inputs for side in text]
    how = {"sublinear_tf": True, "min_df": 2 if len(texts) > 200 else 1, "dtype": np.float32}
    by_word = feature_extraction.text.TfidfVectorizer(ngram_range=(1, 2), **how).fit(texts)
    by_character = feature_extraction.text.TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), **how).fit(texts)

    def features(inputs: Sequence[TextInput]) -> sparse.csr_matrix:
        sides = list(zip(*inputs, strict=True))
        words, characters = ([each.transform(side) for side in sides] for each in (by_word, by_character))
        if len(sides) == 1:
            return sparse.hstack([*words, *characters], format="csr")
        # What the sides share tells more than what they are, and all character n-grams of both would cost too much.
        shared = [first.multiply(second) for first, second in (words, characters)]
        cosines = [sparse.csr_matrix(block.sum(axis=1)) for block in shared]
        return sparse.hstack([*words, shared[0], *cosines], format="csr", dtype=np.float32)

    return features


def pair_features(inputs: Sequence[TextInput], embed: EmbedTexts) -> Floats:
    """Embed N texts as float32 (N, d), or pairs (u, v) as [u; v; |u - v|; u * v], (N, 4 d) (Conneau et al., 2017)."""
    first, *second = (embed(list(side)) for side in zip(*inputs, strict=True))
    return np.concatenate([first, *(part for v in second for part in (v, np.abs(first - v), first * v))], axis=1)


def tuned_logistic_regression(features: Any, labels: Ints, source_size: int, seed: int) -> LogisticRegression:
    """Choose the weight of the target and then the penalty by the target's held-out log-likelihood, and fit on all.

    Args:
        features: float32 (N, F), dense or sparse: first the source, then the target, the only one that is held out.
        labels: int64 (N,), the classes.
        source_size: Rows of the source; 0 uses the target alone.
        seed: Order of the folds.
    """
    source, target = np.split(np.arange(len(labels)), [source_size])
    few = np.sort(np.random.default_rng(seed).permutation(source_size)[:2000])  # enough: weights are relative
    shares = (0.1, 0.3, 0.6, 0.9, 1.0) if source_size else (1.0,)
    penalties = SPARSE_PENALTIES if sparse.issparse(features) else DENSE_PENALTIES
    share, penalty = shares[len(shares) // 2], penalties[(len(penalties) - 1) // 2]

    def fit(classifier: LogisticRegression, source: Ints, target: Ints, share: float, penalty: float) -> Any:
        rows = target if share == 1.0 else np.concatenate([source, target])
        weights = np.full(len(rows), share * 1000.0 / len(target), np.float32)
        weights[: -len(target)] = (1.0 - share) * 1000.0 / max(1, len(source))
        return classifier.set_params(C=penalty).fit(features[rows], labels[rows], sample_weight=weights)

    def best(settings: list[tuple[float, float]]) -> tuple[float, float]:
        losses = np.zeros(len(settings))
        for train, held_out in folds.split(target, labels[target]):
            classifier, judged = _new_classifier(), target[held_out]  # warm: a fit starts from the one before
            for number, setting in enumerate(settings):
                probabilities = fit(classifier, few, target[train], *setting).predict_proba(features[judged])
                right = probabilities[labels[judged, None] == classifier.classes_]
                losses[number] -= np.log(np.maximum(right, 1e-12)).sum()
        return settings[int(losses.argmin())]

    rarest = int(np.unique(labels[target], return_counts=True)[1].min())
    if rarest > 1:  # else nothing can be held out
        folds = model_selection.StratifiedKFold(min(5, rarest), shuffle=True, random_state=seed)
        share, _ = best([(share, penalty) for share in shares])
        share, penalty = best([(share, penalty) for penalty in penalties])
    return fit(_new_classifier(), source, target, share, penalty)


def _new_classifier() -> LogisticRegression:
    # Newton-CG needs a handful of passes where L-BFGS needs dozens, on sparse and on dense features.
    return LogisticRegression(solver="newton-cg", tol=3e-4, max_iter=100, warm_start=True)


def _fitted(source: Examples | None, target: Examples, features: Any, stored: int, seed: int) -> FittedMethod:
    """Fit on what a transformer of scikit-learn makes of texts; ``stored`` numbers are needed for that."""
    parts = [part for part in (source, target) if part is not None]
    rows = features.fit_transform([text for part in parts for text in part.inputs])
    labels = np.concatenate([part.labels for part in parts])
    classifier = tuned_logistic_regression(rows, labels, len(labels) - len(target), seed)
    parameters = stored + int(classifier.coef_.size + classifier.intercept_.size)
    return FittedMethod(lambda inputs: classifier.predict(features.transform(inputs)), parameters)


def tfidf_logreg(source: Examples, target: Examples, seed: int) -> FittedMethod:
    """Fit logistic regression on tf-idf of words and character n-grams; its parameters are the coefficients.

    The target, here and below, is all labelled examples but the test split; weight and penalty are tuned on it, in
    folds whose order the seed decides.
    """
    features = preprocessing.FunctionTransformer(fit_tfidf((*source.inputs, *target.inputs)))
    return _fitted(source, target, features, 0, seed)


def frozen_teacher_logreg(target: Examples, embed: EmbedTexts, encoder_parameters: int, seed: int) -> FittedMethod:
    """Fit logistic regression on a frozen encoder's embeddings; its parameters are the encoder's and the coefficients.

    The sides of a pair are embedded one by one.
    """
    return _fitted(None, target, _standardised(embed), encoder_parameters, seed)


def vector_sum_logreg(source: Examples, target: Examples, vectors: Floats, tokenizer: Any, seed: int) -> FittedMethod:
    """Fit logistic regression on sums of token vectors; its parameters are the whole table and the coefficients.

    Args:
        source: Labelled source examples.
        target: All labelled target examples but the test split.
        vectors: float32 (V, d), one for each token of the tokenizer.
        tokenizer: A fast tokenizer of transformers.
        seed: Order of the folds.
    """

    def embed(texts: Sequence[str]) -> Any:
        return bag_of_tokens(tokenizer, texts, len(vectors)) @ vectors

    return _fitted(source, target, _standardised(embed), vectors.size, seed)


def _standardised(embed: EmbedTexts) -> Any:
    features = preprocessing.FunctionTransformer(pair_features, kw_args={"embed": embed})
    return pipeline.make_pipeline(features, preprocessing.StandardScaler())


def bag_of_tokens(tokenizer: Any, texts: Sequence[str], vocabulary: int) -> sparse.csr_matrix:
    """Count the tokens of N texts, none special, as float32 (N, V), sparse."""
    ids = tokenizer(list(texts), add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    offsets = np.cumsum([0, *map(len, ids)])
    columns = np.array([token for row in ids for token in row], dtype=np.int64)
    return sparse.csr_matrix((np.ones(len(columns), np.float32), columns, offsets), shape=(len(ids), vocabulary))


def student_logits(context: RunContext, student: Student, inputs: Sequence[TextInput]) -> Floats:
    """Score N texts by a student of a run, as float32 (N, C)."""
    return run_student(student, encoding.encode(student.tokenizer, inputs, context.config.max_length))[0]


def _likeliest(score: Logits) -> Predict:
    return lambda inputs: score(inputs).argmax(axis=1)


def _fitted_teacher(context: RunContext, teacher: model.Teacher) -> FittedMethod:
    def score(inputs: Sequence[TextInput]) -> Floats:
        return labelling.predict(teacher, inputs, context.config.max_length).logits

    return FittedMethod(_likeliest(score), teacher.parameters_count, logits=score, module=teacher)


def _fitted_student(context: RunContext, train: Train, with_unlabelled: bool = False) -> FittedMethod:
    """Train a student; the facts of its rounds come with it."""
    trained = train(context if with_unlabelled or not context.data.unlabelled else context.without_unlabelled)
    student, score = trained.student, partial(student_logits, context, trained.student)
    judged = trained.score
    known: dict[str, Any] = {"validation_log_likelihood": judged.log_likelihood, "divergence": judged.divergence}
    for number, done in enumerate(trained.rounds):
        of_round = {**done.chains, **done.selection.diagnostics}
        known |= {f"round_{number}_{key}": value for key, value in of_round.items()}
    facts = {key: value for key, value in known.items() if isinstance(value, int | float | str)}
    return FittedMethod(_likeliest(score), student.parameters_count, facts, score, student.model, trained)


METHODS: dict[str, Method] = {}
"""Every method, in the order of the tables, which is that of the functions below."""
SMALL_TEACHER = "minilm-l6"
LABELLED: tuple[Part, ...] = ("cross_domain_teacher", "labels")
PLAIN, AUGMENTED = ("teacher", "student", "kd"), ("teacher", "student", "kd", "generator")


def register_method(*needs: Part, reads: tuple[str, ...] = (), shown: Shown = "compare") -> Callable[[Fit], Fit]:
    """Enter a function into ``METHODS``, by its name without the underscore, its docstring as help; see ``Method``."""

    def enter(fit: Fit) -> Fit:
        name = fit.__name__.removeprefix("_")
        METHODS[name] = Method(name, str(fit.__doc__).removesuffix("."), fit, needs, reads, shown)
        return fit

    return enter


@register_method("target_only_teacher", reads=("teacher",), shown="always")
def _target_only_teacher(context: RunContext) -> FittedMethod:
    """The teacher, fine-tuned on the target's labels alone."""
    return _fitted_teacher(context, context.target_only_teacher)


@register_method("cross_domain_teacher", reads=("teacher",), shown="always")
def _cross_domain_teacher(context: RunContext) -> FittedMethod:
    """The teacher that the students learn from: source, then target."""
    return _fitted_teacher(context, context.teacher)


@register_method(shown="always")
def _tfidf_logreg(context: RunContext) -> FittedMethod:
    """Logistic regression on words and character n-grams of both domains."""
    return tfidf_logreg(context.data.source, context.data.target_labels, context.config.seed)


@register_method("pretrained", reads=("teacher",))
def _frozen_teacher_logreg(context: RunContext) -> FittedMethod:
    """Logistic regression on the pretrained encoder's embeddings of the target."""
    encoder, length = context.pretrained(), context.config.max_length

    def embed(texts: Sequence[str]) -> Floats:
        return labelling.predict(encoder, [(text,) for text in texts], length).embeddings

    data, seed = context.data, context.config.seed
    return replace(frozen_teacher_logreg(data.target_labels, embed, encoder.parameters_count, seed), module=encoder)


def _with_small_teacher(context: RunContext) -> RunContext:
    config = override(context.config, {"teacher.model": SMALL_TEACHER, "teacher.fine_tuned": False})
    return replace(context, config=config, loaded=context.data)


@register_method("small", reads=("teacher",))
def _fine_tuned_minilm(context: RunContext) -> FittedMethod:
    """MiniLM-L6 fine-tuned without a teacher: source, then target."""
    small = _with_small_teacher(context)
    return _fitted_teacher(small, small.teacher)


@register_method("small", "pretrained")
def _frozen_minilm_logreg(context: RunContext) -> FittedMethod:
    """Logistic regression on the embeddings of MiniLM-L6 as it was pretrained."""
    return _frozen_teacher_logreg(_with_small_teacher(context))


@register_method("cross_domain_teacher", reads=("teacher",))
def _vector_sum_logreg(context: RunContext) -> FittedMethod:
    """Logistic regression on sums of token vectors read from the teacher."""
    data, teacher, seed = context.data, context.teacher, context.config.seed
    vectors = labelling.token_vectors(teacher, context.progress)
    return vector_sum_logreg(data.source, data.target_labels, vectors, teacher.tokenizer, seed)


@register_method(*LABELLED, reads=PLAIN)
def _plain_kd_student(context: RunContext) -> FittedMethod:
    """The student, distilled without augmentation and without unlabelled text."""
    return _fitted_student(context, students.train_plain_student)


@register_method(*LABELLED, "unlabelled", reads=(*AUGMENTED, "unlabelled"))
def _plain_kd_unlabelled_student(context: RunContext) -> FittedMethod:
    """The student, distilled on unlabelled texts too, as they are."""
    return _fitted_student(context, students.train_unlabelled_student, with_unlabelled=True)


@register_method(*LABELLED, "unlabelled", reads=(*AUGMENTED, "selector"))
def _l2a_without_unlabelled_student(context: RunContext) -> FittedMethod:
    """The l2a_student without the unlabelled text."""
    return _fitted_student(context, students.train_l2a_student)


@register_method(*LABELLED, reads=AUGMENTED, shown="operator")
def _augmented_kd_student(context: RunContext) -> FittedMethod:
    """The student, distilled on every text that one operator, or the chain, makes."""
    return _fitted_student(context, students.train_augmented_student)


@register_method("pretrained", reads=AUGMENTED, shown="experiments")
def _augmented_fine_tuned_student(context: RunContext) -> FittedMethod:
    """The student, fine-tuned on real and inherited labels without a teacher."""
    return _fitted_student(context, students.train_fine_tuned_student)


@register_method(*LABELLED, reads=(*AUGMENTED, "selector", "unlabelled"), shown="always")
def _l2a_student(context: RunContext) -> FittedMethod:
    """The student, distilled on candidates that the generator draws and the selector keeps."""
    return _fitted_student(context, students.train_l2a_student, with_unlabelled=True)


def compared_methods(config: DistillConfig) -> tuple[Method, ...]:
    """Choose what a distillation trains and shows, in the order of the table."""
    shown = {"always", *(("compare",) if config.compare else ())}
    shown |= {"operator"} if config.compare and config.generator.operator is not None else set()
    return tuple(
        method for method in METHODS.values() if method.shown in shown
        and not ("unlabelled" in method.needs and not config.unlabelled)
        and not ("small" in method.needs and config.teacher.model == SMALL_TEACHER)
        # It would be unfair with a teacher that was fine-tuned elsewhere, perhaps on this very target.
        and not (config.teacher.fine_tuned and {"pretrained", "small", "target_only_teacher"} & set(method.needs))
    )  # fmt: skip


def run_method(config: DistillConfig, name: str, progress: Progress = SILENT) -> MethodResult:
    """Train one method and evaluate it once on the target's test split.

    Args:
        config: The run; its data, shots and seed are the same for every method.
        name: A name in ``METHODS``.
        progress: Shows how far it is.

    Returns:
        Predictions and labels of the test split.

    Raises:
        UsageError: If the method or the data are unknown or do not fit.
        RunError: If training fails.
    """
    if name not in METHODS:
        raise UsageError(f"method: {name!r} is unknown{did_you_mean(name, METHODS)}; give one of {', '.join(METHODS)}")
    method, context = METHODS[name], RunContext(config, progress)
    prepare(context, method)
    started = time.monotonic()
    fitted = method.fit(context)
    result = evaluate_method(context, name, fitted, time.monotonic() - started)
    if fitted.trained is None or result.logits is None or "labels" not in method.needs:
        return result
    divergence = mean_divergence(result.logits, context.labeller(result.test.inputs).logits)
    return result._replace(diagnostics={**result.diagnostics, "test_divergence": divergence})


def rescored(context: RunContext, trained: Students) -> Students:
    """Score the students of a run with unlabelled text on the same texts; those that learned without set others apart.

    The divergences are measured on texts that none of them was trained on.
    """
    read = set(map(normalised_hash, context.without_unlabelled.source.inputs))
    texts = tuple(text for text in context.set_apart[0] if normalised_hash(text) not in read)

    def measured(student: Student) -> float | None:
        if not texts:
            return None
        return mean_divergence(student_logits(context, student, texts), context.labeller(texts).logits, TEMPERATURES)

    scores = {name: replace(one.score, divergence=measured(one.student)) for name, one in trained.items()}
    return {name: replace(one, score=scores[name]) for name, one in trained.items()}


def prepare(context: RunContext, method: Method) -> None:
    """Do the shared, cached work first, so that a method's seconds are its own.

    Raises:
        UsageError: If the method needs unlabelled text and the run has none.
        RunError: If a teacher cannot be trained.
    """
    if "unlabelled" in method.needs and not context.config.unlabelled:
        raise UsageError(f"unlabelled: {method.name} needs a file, a folder or a domain; give one by --unlabelled")
    for part, made in SHARED.items():
        if part in method.needs:
            getattr(context, made)


def evaluate_method(context: RunContext, name: str, fitted: FittedMethod, seconds: float) -> MethodResult:
    """Open the test split and classify it, the only place of a run that does; ``seconds`` is what training took."""
    test = context.data.target.test.reveal()
    logits = None if fitted.logits is None else fitted.logits(test.inputs)
    predictions = fitted.predict(test.inputs) if logits is None else logits.argmax(axis=1)
    used = context.data.splits.labels_used
    return MethodResult(name, test, predictions, fitted.parameters, used, seconds, fitted.diagnostics, logits)
