"""The registry of methods: each is trained without a look at the test split, then evaluated on it once."""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from torch import nn

from l2a.config import DistillConfig, as_yaml, override
from l2a.data import examples
from l2a.data.domains import provenance
from l2a.data.encoding import encode
from l2a.data.examples import Examples, TextInput
from l2a.evaluation.baselines import frozen_teacher_logreg, tfidf_logreg, vector_sum_logreg
from l2a.evaluation.metrics import classification_metrics, measure_latency
from l2a.kd.trainer import run_student
from l2a.pipeline import students as student_training
from l2a.pipeline.policies import open_policy, training_facts
from l2a.pipeline.session import FEWEST_TO_CHOOSE, RunContext
from l2a.pipeline.students import Round, TrainedStudent
from l2a.report import page, run_folder
from l2a.selector.algorithms import save_policy
from l2a.selector.problem import Selection, kl_divergence
from l2a.selector.select import inspect_policy
from l2a.serving.classifier import fit_temperature, write_temperature
from l2a.student.student import Student, resolve_preset
from l2a.teacher.labelling import predict, token_vectors
from l2a.teacher.model import PACKAGED, Teacher
from l2a.util.errors import UsageError, did_you_mean
from l2a.util.files import atomic_write_text, to_json
from l2a.util.progress import SILENT, Progress

logger = logging.getLogger(__name__)
Predict = Callable[[Sequence[TextInput]], NDArray[np.int64]]
Logits = Callable[[Sequence[TextInput]], NDArray[np.float32]]
Part = Literal["pretrained", "small", "target_only_teacher", "cross_domain_teacher", "labels", "unlabelled"]
"""What methods share: the encoder as it was pretrained, two fine-tuned teachers, the labels that one of them gives to
the source, and text without labels."""


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
    trained: TrainedStudent | None = None


@dataclass(frozen=True)
class Method:
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
    fit: Callable[[RunContext], FittedMethod]
    needs: tuple[Part, ...] = ()
    reads: tuple[str, ...] = ()
    shown: Literal["always", "compare", "operator", "experiments"] = "compare"

    @property
    def teacher(self) -> str | None:
        """The method that is the teacher trained for it, if one is."""
        return next((part for part in self.needs if part.endswith("_teacher")), None)


@dataclass(frozen=True)
class MethodResult:
    """One method on the test split.

    Attributes:
        name: The method.
        predictions: int64 (N,).
        labels: int64 (N,), the true classes.
        label_names: The C class names.
        parameters: Numbers that the classifier stores.
        labels_used: Labelled target examples that the run reads, those of the reward and validation splits included.
        seconds: Wall time of its own training, shared parts aside.
        diagnostics: Facts of its training.
        inputs: The N texts.
        logits: float32 (N, C), where the method gives some.
    """

    name: str
    predictions: NDArray[np.int64]
    labels: NDArray[np.int64]
    label_names: tuple[str, ...]
    parameters: int
    labels_used: int
    seconds: float
    diagnostics: Mapping[str, float | int | str]
    inputs: tuple[TextInput, ...] = ()
    logits: NDArray[np.float32] | None = None


def _fitted_teacher(context: RunContext, teacher: Teacher) -> FittedMethod:
    def score(inputs: Sequence[TextInput]) -> NDArray[np.float32]:
        return predict(teacher, inputs, context.config.max_length).logits

    return FittedMethod(_likeliest(score), teacher.parameters_count, logits=score, module=teacher)


def _fit_tfidf_logreg(context: RunContext) -> FittedMethod:
    baseline = tfidf_logreg(context.data.source, context.data.target_labels, context.config.seed)
    return FittedMethod(baseline.predict, baseline.parameters)


def _fit_frozen_teacher_logreg(context: RunContext) -> FittedMethod:
    encoder, length = context.pretrained(), context.config.max_length

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        return predict(encoder, [(text,) for text in texts], length).embeddings

    labels = context.data.target_labels
    baseline = frozen_teacher_logreg(labels, embed, encoder.parameters_count, context.config.seed)
    return FittedMethod(baseline.predict, baseline.parameters, module=encoder)


SMALL_TEACHER = "minilm-l6"


def _with_small_teacher(context: RunContext) -> RunContext:
    return RunContext(override(context.config, {"teacher.model": SMALL_TEACHER}), context.progress, context.data)


def _fit_small_encoder(context: RunContext) -> FittedMethod:
    small = _with_small_teacher(context)
    return _fitted_teacher(small, small.teacher)


def _fit_vector_sum_logreg(context: RunContext, longest: int | None = None) -> FittedMethod:
    data, teacher, seed = context.data, context.teacher, context.config.seed
    vectors = token_vectors(teacher, context.progress)
    baseline = vector_sum_logreg(data.source, data.target_labels, vectors, teacher.tokenizer, seed, longest)
    return FittedMethod(baseline.predict, baseline.parameters)


def _student_logits(context: RunContext, student: Student, inputs: Sequence[TextInput]) -> NDArray[np.float32]:
    return run_student(student, encode(student.tokenizer, inputs, context.config.max_length))[0]


def _student(
    train: Callable[[RunContext], TrainedStudent], with_unlabelled: bool = False
) -> Callable[[RunContext], FittedMethod]:
    """Make a method of a student's training; the facts of its rounds come with it."""

    def fit(context: RunContext) -> FittedMethod:
        trained = train(context if with_unlabelled else context.without_unlabelled())
        student = trained.student

        def score(inputs: Sequence[TextInput]) -> NDArray[np.float32]:
            return _student_logits(context, student, inputs)

        facts: dict[str, float | int | str] = {"validation_log_likelihood": trained.score.log_likelihood}
        facts |= {} if trained.score.divergence is None else {"divergence": trained.score.divergence}
        for number, done in enumerate(trained.rounds):
            known = {**dataclasses.asdict(done.chains), **done.selection.diagnostics}
            scalars = {key: value for key, value in known.items() if isinstance(value, int | float | str)}
            facts |= {f"round_{number}_{key}": value for key, value in scalars.items()}
        return FittedMethod(_likeliest(score), student.parameters_count, facts, score, student.model, trained)

    return fit


def _likeliest(score: Logits) -> Predict:
    return lambda inputs: score(inputs).argmax(axis=1)


LABELLED: tuple[Part, ...] = ("cross_domain_teacher", "labels")
PLAIN, AUGMENTED = ("teacher", "student", "kd"), ("teacher", "student", "kd", "generator")
METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(
            "target_only_teacher", "the teacher, fine-tuned on the target's labels alone",
            lambda run: _fitted_teacher(run, run.target_only_teacher), ("target_only_teacher",), ("teacher",), "always",
        ),
        Method(
            "cross_domain_teacher", "the teacher that the students learn from: source, then target",
            lambda run: _fitted_teacher(run, run.teacher), ("cross_domain_teacher",), ("teacher",), "always",
        ),
        Method(
            "tfidf_logreg", "logistic regression on words and character n-grams of both domains",
            _fit_tfidf_logreg, shown="always",
        ),
        Method(
            "frozen_teacher_logreg", "logistic regression on the pretrained encoder's embeddings of the target",
            _fit_frozen_teacher_logreg, ("pretrained",), ("teacher",),
        ),
        Method(
            "fine_tuned_minilm", "MiniLM-L6 fine-tuned without a teacher: source, then target",
            _fit_small_encoder, ("small",), ("teacher",),
        ),
        Method(
            "frozen_minilm_logreg", "logistic regression on the embeddings of MiniLM-L6 as it was pretrained",
            lambda run: _fit_frozen_teacher_logreg(_with_small_teacher(run)), ("small", "pretrained"),
        ),
        Method(
            "vector_sum_logreg", "logistic regression on sums of token vectors read from the teacher",
            _fit_vector_sum_logreg, ("cross_domain_teacher",), ("teacher",),
        ),
        Method(
            "cut_vector_sum_logreg", "the same on as many tokens of a text as teacher and students read",
            lambda run: _fit_vector_sum_logreg(run, run.config.max_length - 2),  # [CLS] and [SEP]
            ("cross_domain_teacher",), ("teacher",), "experiments",
        ),
        Method(
            "plain_kd_student", "the student, distilled without augmentation and without unlabelled text",
            _student(student_training.train_plain_student), LABELLED, PLAIN,
        ),
        Method(
            "plain_kd_unlabelled_student", "the student, distilled on unlabelled texts too, as they are",
            _student(student_training.train_unlabelled_student, with_unlabelled=True), (*LABELLED, "unlabelled"),
            (*AUGMENTED, "unlabelled"),
        ),
        Method(
            "l2a_without_unlabelled_student", "the l2a_student without the unlabelled text",
            _student(student_training.train_l2a_student), (*LABELLED, "unlabelled"), (*AUGMENTED, "selector"),
        ),
        Method(
            "augmented_kd_student", "the student, distilled on every text that one operator, or the chain, makes",
            _student(student_training.train_augmented_student), LABELLED, AUGMENTED, "operator",
        ),
        Method(
            "augmented_fine_tuned_student", "the student, fine-tuned on real and inherited labels without a teacher",
            _student(student_training.train_fine_tuned_student), ("pretrained",), AUGMENTED, "experiments",
        ),
        Method(
            "l2a_student", "the student, distilled on candidates that the generator draws and the selector keeps",
            _student(student_training.train_l2a_student, with_unlabelled=True), LABELLED,
            (*AUGMENTED, "selector", "unlabelled"), "always",
        ),
    )
}  # fmt: skip
"""Every method, in the order of the tables."""


def compared_methods(config: DistillConfig) -> tuple[Method, ...]:
    """Choose what a distillation trains and shows.

    Args:
        config: The run.

    Returns:
        The methods, in the order of the table.
    """
    shown = {"always", *(("compare",) if config.compare else ())}
    shown |= {"operator"} if config.compare and config.generator.operator is not None else set()
    return tuple(
        method for method in METHODS.values() if method.shown in shown
        and not ("unlabelled" in method.needs and not config.unlabelled)
        and not ("small" in method.needs and config.teacher.model == SMALL_TEACHER)
        # It would be unfair with a teacher that was fine-tuned elsewhere, perhaps on this very target.
        and not (config.teacher.fine_tuned and {"pretrained", "target_only_teacher"} & set(method.needs))
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
        hint = did_you_mean(name, METHODS)
        raise UsageError(f"method: {name!r} is unknown{hint}; give one of {', '.join(METHODS)}")
    method, context = METHODS[name], RunContext(config, progress)
    prepare(context, method)
    started = time.monotonic()
    fitted = method.fit(context)
    result = evaluate_method(context, name, fitted, time.monotonic() - started)
    if fitted.trained is None or result.logits is None or "labels" not in method.needs:
        return result
    teacher, student = (softmax(one, axis=1) for one in (context.labeller(result.inputs).logits, result.logits))
    divergence = float(kl_divergence(teacher, student).mean())
    return dataclasses.replace(result, diagnostics={**result.diagnostics, "test_divergence": divergence})


def prepare(context: RunContext, method: Method) -> None:
    """Do the shared, cached work first, so that a method's seconds are its own.

    Args:
        context: The run.
        method: What will be trained.

    Raises:
        UsageError: If the method needs unlabelled text and the run has none.
        RunError: If a teacher cannot be trained.
    """
    if "unlabelled" in method.needs and not context.config.unlabelled:
        raise UsageError(f"unlabelled: {method.name} needs a file, a folder or a domain; give one by --unlabelled")
    if "target_only_teacher" in method.needs:
        _ = context.target_only_teacher
    if "cross_domain_teacher" in method.needs:
        _ = context.teacher
    if "labels" in method.needs:
        _ = context.labeller


def evaluate_method(context: RunContext, name: str, fitted: FittedMethod, seconds: float) -> MethodResult:
    """Open the test split and classify it: the only place of a run that does.

    Args:
        context: The run.
        name: The method.
        fitted: The trained classifier.
        seconds: What its training took.

    Returns:
        Predictions and labels.
    """
    test = context.data.target.test.reveal()
    logits = None if fitted.logits is None else fitted.logits(test.inputs)
    predictions = fitted.predict(test.inputs) if logits is None else logits.argmax(axis=1)
    return MethodResult(
        name, predictions, test.labels, test.label_names, fitted.parameters, context.data.splits.labels_used, seconds,
        fitted.diagnostics, test.inputs, logits,
    )  # fmt: skip


Comparison = tuple[dict[str, TrainedStudent], tuple[run_folder.MethodReport, ...], dict[str, MethodResult]]


def compare_methods(context: RunContext) -> Comparison:
    """Train every method that a distillation shows, then evaluate each on the test split.

    Args:
        context: The run.

    Returns:
        The students by the name of their method, "l2a_student" among them, the rows of the table, and each method on
        the test split by its name.
    """
    methods, fitted = compared_methods(context.config), {}
    advance_whole = context.progress.whole("methods", len(methods))
    for number, method in enumerate(methods, 1):
        context.progress.say(f"[{number}/{len(methods)}] {method.name}: {method.help}")
        started = time.monotonic()
        fitted[method.name] = method.fit(context)
        context.progress.event("fitted", row=method.name, row_seconds=round(time.monotonic() - started, 3))
        advance_whole(1)
    few, rows, results = context.data.target_labels.inputs[:64], [], {}
    with context.progress.stage("evaluate", len(fitted)) as advance:
        for name, one in fitted.items():
            result, rng = evaluate_method(context, name, one, 0.0), np.random.default_rng([context.config.seed, 3])
            results[name] = result
            metrics = classification_metrics(result.labels, result.predictions, len(result.label_names), rng)
            latency = measure_latency(one.predict, few, one.module)
            rows.append(run_folder.MethodReport(name, metrics, one.parameters, latency))
            advance(1)
    return {name: one.trained for name, one in fitted.items() if one.trained is not None}, tuple(rows), results


def warn_of_student(context: RunContext, student: TrainedStudent, result: MethodResult) -> None:
    """Warn where a linear model is right more often on the held-out labels, or a constant answer on the test split.

    Args:
        context: The run.
        student: The one to save; too few held-out labels do not judge it.
        result: The same on the test split.
    """
    examples.warn_of_absent_classes("test split", Examples(result.inputs, result.labels, result.label_names))
    counts = np.bincount(result.labels, minlength=len(result.label_names)) / len(result.labels)
    if (right := float((result.predictions == result.labels).mean())) <= counts.max():
        logger.warning(
            "%s: right on %.1f%% of the test split, where the answer %r to every text is on %.1f%%, so it learned "
            "nothing of use; give more labels or another source, or raise kd.rounds",
            result.name, 100 * right, result.label_names[counts.argmax()], 100 * counts.max(),
        )  # fmt: skip
    data, held_out = context.data, context.data.held_out_labels
    if len(held_out) < FEWEST_TO_CHOOSE:
        return
    linear = tfidf_logreg(data.source, data.splits.train, context.config.seed).predict(held_out.inputs)
    own = _student_logits(context, student.student, held_out.inputs)
    accuracies = [float((found == held_out.labels).mean()) for found in (linear, own.argmax(axis=1))]
    if accuracies[0] > accuracies[1]:
        logger.warning(
            "a linear model on words is right on %.0f%% of the %d held-out target labels, the student on %.0f%%: look "
            "at tfidf_logreg in the table before you ship the student",
            100 * accuracies[0], len(held_out), 100 * accuracies[1],
        )  # fmt: skip


def write_run(
    context: RunContext, facts: Mapping[str, Any], folder: Path, students: Mapping[str, TrainedStudent],
    rows: tuple[run_folder.MethodReport, ...], results: Mapping[str, MethodResult],
) -> dict[str, Any]:  # fmt: skip
    """Write student, selector, candidates, metrics, model card and page.

    Args:
        context: The run.
        facts: What ``metrics.json`` says beside what is known here; "student" names the one to save.
        folder: Where to write; it takes its final name later.
        students: All students by the name of their method, "l2a_student" among them.
        rows: The comparison.
        results: Each method on the test split, by its name.

    Returns:
        The content of ``metrics.json``.

    Raises:
        RunError: If the exported student does not reproduce the trained one.
    """
    config, data, rounds = context.config, context.data, students["l2a_student"].rounds
    student = students[facts["student"]].student
    student.model.to("cpu")
    preset = resolve_preset(config.student, context.teacher).preset
    sides = {"target": [config.target], "source": [str(config.source)], "unlabelled": list(config.unlabelled)}
    start = config.student.model or (preset if preset in PACKAGED else config.teacher.model)
    known = {
        "validation_log_likelihood": {name: trained.score.log_likelihood for name, trained in students.items()},
        "divergence": {name: trained.score.divergence for name, trained in students.items()},
        "parameter_share": student.parameters_count / context.teacher.parameters_count,
        "labels_used": data.splits.labels_used,
        "labels_ignored": data.splits.labels_ignored,
        "seed": config.seed,
        "rounds": [{"generator": dataclasses.asdict(done.chains), "selector": dict(done.selection.diagnostics)}
                   for done in rounds],
        "files": data.files,
        "warnings": context.progress.warnings,
        "data": {side: [provenance(name) for name in names] for side, names in sides.items()},
        "models": {"teacher": run_folder.model_facts(config.teacher.model), "start": run_folder.model_facts(start)},
    }  # fmt: skip
    metrics = run_folder.metrics_content(rows, {**facts, **known})
    temperature = 1.0
    if len(held_out := data.held_out_labels) >= FEWEST_TO_CHOOSE:
        temperature = fit_temperature(_student_logits(context, student, held_out.inputs), held_out.labels)
    evidence = _evidence(context, results["cross_domain_teacher"], results[facts["student"]], rounds, temperature)
    own_card, card = (run_folder.model_card(metrics, evidence, {}, place) for place in (".", "student"))
    run_folder.export_student(student.model, student.tokenizer, folder / "student", own_card, config.max_length)
    if temperature != 1:
        write_temperature(folder / "student", temperature)
    probe = data.target_labels.inputs[:32]
    parity = run_folder.check_parity(student.model, student.tokenizer, folder / "student", probe, config.max_length)
    metrics["export_logit_difference"] = parity
    atomic_write_text(folder / "README.md", card)
    run_folder.write_augmentations(folder / "augmentations.parquet", [(done.pool, done.selection) for done in rounds])
    _write_selector(folder / "selector", config, [done.selection for done in rounds])
    atomic_write_text(folder / "metrics.json", to_json(metrics, indent=1) + "\n")
    atomic_write_text(folder / "config.yaml", as_yaml(config))
    atomic_write_text(folder / page.EVIDENCE, to_json(evidence) + "\n")
    if config.report:
        atomic_write_text(folder / page.PAGE, page.render_page(folder))
    return metrics


def _evidence(
    context: RunContext, teacher: MethodResult, student: MethodResult, rounds: Sequence[Round], temperature: float
) -> dict[str, Any]:
    """What the page shows and no other file has."""
    config, data = context.config, context.data
    names = {name: getattr(config, name) for name in ("target", "source", "unlabelled")}
    drawn = [(text, kept) for done in rounds for text, kept in zip(done.pool.inputs, done.selection.kept, strict=True)]
    kinds = {
        "source": data.source.inputs, "unlabelled": data.unlabelled, "target": data.target_labels.inputs,
        "dropped candidate": [text for text, kept in drawn if not kept],
        "kept candidate": [text for text, kept in drawn if kept],
    }  # fmt: skip
    tested = Examples(student.inputs, student.labels, student.label_names)
    assert teacher.logits is not None and student.logits is not None
    return {
        "format": page.FORMAT, **names, "is_pair": data.target.is_pair, "teacher": config.teacher.model,
        "label_names": data.label_names,
        "test": page.compare_on_test(tested, teacher.logits, student.logits, temperature),
        "policy": _explained(config, rounds[-1]),
        "map": page.map_texts(kinds, context.labeller, data.label_names, np.random.default_rng([config.seed, 9])),
    }  # fmt: skip


def _explained(config: DistillConfig, last: Round) -> list[dict[str, Any]]:
    """What the policy of the last round looks at, the most important feature first; nothing where a rule chose."""
    if last.problem is None or last.selection.policy is None:
        return []
    rng = np.random.default_rng([config.seed, 10])
    found = inspect_policy(last.problem, last.selection.policy, config.selector, rng)
    return [
        {"feature": name, "loss": loss, "changed": changed,
         "quartiles": [side.tolist() for side in found.quartiles.get(name, ())]}
        for name, (loss, changed) in found.importances.items()
    ]  # fmt: skip


def _write_selector(folder: Path, config: DistillConfig, selections: Sequence[Selection]) -> None:
    last = selections[-1]
    diagnostics: list[dict[str, Any]] = [dict(selection.diagnostics) for selection in selections]
    if last.policy is not None:  # it replaces the folder, so it comes first
        if "reward_curve" in last.diagnostics:  # each round trains on where the one before it ended
            curve = [value for known in diagnostics for value in known["reward_curve"]]
            steps = sum(known["training_steps"] for known in diagnostics)
            trained = training_facts([config], steps, diagnostics[-1]["steps_per_second"], curve)
        else:  # it was trained elsewhere
            trained = open_policy(config.selector.agent)[1]
        used = last.diagnostics.get("chosen", "learned policy")
        save_policy(last.policy, folder, {**trained, "used_in_the_last_round": used})
    facts = {"agent": last.agent, "rounds": diagnostics}
    atomic_write_text(folder / "selection.json", to_json(facts, indent=1) + "\n")
