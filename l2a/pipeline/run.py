"""The second half of a run, from its data to its folder."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from l2a.config import DistillConfig, as_yaml
from l2a.data import domains, examples
from l2a.evaluation.metrics import classification_metrics, measure_latency
from l2a.pipeline.data import RunData
from l2a.pipeline.methods import MethodResult, compared_methods, evaluate_method, rescored, student_logits, tfidf_logreg
from l2a.pipeline.policies import headroom_note, known_headroom, training_facts
from l2a.pipeline.session import FEWEST_TO_CHOOSE, RunContext
from l2a.pipeline.students import Round, TrainedStudent
from l2a.report import page, run_folder
from l2a.selector import agents, algorithms, select
from l2a.serving.classifier import fit_temperature, write_temperature
from l2a.student.student import resolve_preset
from l2a.teacher.model import PACKAGED
from l2a.util import Progress, atomic_write_text, logger, process_rank, to_json


def train_and_write(
    config: DistillConfig, progress: Progress, data: RunData, folder: Path, client: Any, command: str
) -> tuple[str, tuple[run_folder.MethodReport, ...], dict[str, Any]]:
    """Train and evaluate every method of a run, choose a student and fill the folder.

    Args:
        config: The run.
        progress: Shows how far it is.
        data: Its data.
        folder: Where to write; it takes its final name later.
        client: Of a Dask cluster that labels texts; None for this process.
        command: What started the run.

    Returns:
        The method whose student was saved, the rows of the comparison, and the content of ``metrics.json``.

    Raises:
        UsageError: If a model cannot be used.
        RunError: If training fails, or the exported student does not reproduce the trained one.
    """
    context = RunContext(config, progress, data, client)
    with progress.stage("check the models"):
        context.check_models()
    headroom = known_headroom(context) if agents.load_agent(config.selector.agent).rule is None else {}
    if headroom:
        progress.say(f"note: {headroom_note(headroom)} (l2a selector headroom)")
    students, rows, results = _compare(context)
    students = rescored(context, students) if context.data.unlabelled and len(students) > 1 else students
    best = next(iter(students))
    for name, trained in students.items():
        best = name if trained.score.beats(students[best].score) else best
    count, whole = students[best].student.parameters_count, context.teacher.parameters_count
    progress.say(f"the student has {count:,} parameters, {count / whole:.1%} of the teacher's {whole:,}")
    if len(students) > 1:
        scores = ", ".join(f"{name} {trained.score}" for name, trained in students.items() if name != best)
        progress.say(f"{best} is saved: it follows the teacher best, {students[best].score} ({scores})")
    warn_of_student(context, students[best], results[best])
    # Of several processes the first one writes; transformers saves no model in the others.
    seconds = {name: round(value, 3) for name, value in progress.seconds_by_stage.items()}
    facts = {"student": best, "seconds_by_stage": seconds, "command": command, "headroom": headroom or None}
    return best, rows, {} if process_rank() else _write(context, facts, folder, students, rows, results)


Comparison = tuple[dict[str, TrainedStudent], tuple[run_folder.MethodReport, ...], dict[str, MethodResult]]


def _compare(context: RunContext) -> Comparison:
    """Train every method that a distillation shows, then evaluate each on the test split; students come by method."""
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
            results[name] = result = evaluate_method(context, name, one, 0.0)
            test, rng = result.test, np.random.default_rng([context.config.seed, 3])
            metrics = classification_metrics(test.labels, result.predictions, len(test.label_names), rng)
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
    test = result.test
    examples.warn_of_absent_classes("test split", test)
    counts = np.bincount(test.labels, minlength=len(test.label_names)) / len(test)
    if (right := float((result.predictions == test.labels).mean())) <= counts.max():
        constant = f"where the answer {test.label_names[counts.argmax()]!r} to every text is on {counts.max():.1%}"
        found = f"{result.name}: right on {right:.1%} of the test split, {constant}, so it learned nothing of use"
        logger.warning("%s; give more labels or another source, or raise kd.rounds", found)
    data, held_out = context.data, context.data.held_out_labels
    if len(held_out) < FEWEST_TO_CHOOSE:
        return
    linear = tfidf_logreg(data.source, data.splits.train, context.config.seed).predict(held_out.inputs)
    own = student_logits(context, student.student, held_out.inputs).argmax(axis=1)
    of_linear, of_student = (float((said == held_out.labels).mean()) for said in (linear, own))
    if of_linear > of_student:
        found = (
            f"right on {of_linear:.0%} of the {len(held_out)} held-out target labels, the student on {of_student:.0%}"
        )
        fix = "look at tfidf_logreg in the table before you ship the student"
        logger.warning("a linear model on words is %s: %s", found, fix)


def _write(
    context: RunContext, facts: Mapping[str, Any], folder: Path, students: Mapping[str, TrainedStudent],
    rows: tuple[run_folder.MethodReport, ...], results: Mapping[str, MethodResult],
) -> dict[str, Any]:  # fmt: skip
    """Write student, selector, candidates, metrics, model card and page; the content of ``metrics.json`` comes back."""
    # The facts are what that says beside what is known here; their "student" names the one to save.
    config, data, rounds = context.config, context.data, students["l2a_student"].rounds
    student = students[facts["student"]].student
    student.model.to("cpu")
    preset = resolve_preset(config.student, context.teacher).preset
    sides = {"target": [config.target], "source": [str(config.source)], "unlabelled": list(config.unlabelled)}
    start = config.student.model or (preset if preset in PACKAGED else config.teacher.model)
    scores = {name: trained.score for name, trained in students.items()}
    known = {
        "validation_log_likelihood": {k: s.log_likelihood for k, s in scores.items() if len(s.log_likelihoods)},
        "divergence": {name: score.divergence for name, score in scores.items()},
        "parameter_share": student.parameters_count / context.teacher.parameters_count,
        "labels_used": data.splits.labels_used, "labels_ignored": data.splits.labels_ignored, "seed": config.seed,
        "rounds": [{"generator": dict(done.chains), "selector": dict(done.selection.diagnostics)} for done in rounds],
        "files": data.files, "warnings": context.progress.warnings,
        "data": {side: [domains.provenance(name) for name in names] for side, names in sides.items()},
        "models": {"teacher": run_folder.model_facts(config.teacher.model), "start": run_folder.model_facts(start)},
    }  # fmt: skip
    metrics = run_folder.metrics_content(rows, {**facts, **known})
    temperature = 1.0
    if len(held_out := data.held_out_labels) >= FEWEST_TO_CHOOSE:
        temperature = fit_temperature(student_logits(context, student, held_out.inputs), held_out.labels)
    evidence = _evidence(context, results["cross_domain_teacher"], results[facts["student"]], rounds, temperature)
    own_card, card = (run_folder.model_card(metrics, evidence, {}, place) for place in (".", "student"))
    saved, probe = (student.model, student.tokenizer, folder / "student"), data.target_labels.inputs[:32]
    run_folder.export_student(*saved, own_card, config.max_length)
    if temperature != 1:
        write_temperature(folder / "student", temperature)
    metrics["export_logit_difference"] = run_folder.check_parity(*saved, probe, config.max_length)
    atomic_write_text(folder / "README.md", card)
    run_folder.write_augmentations(folder / "augmentations.parquet", [(done.pool, done.selection) for done in rounds])
    _write_selector(folder / "selector", config, rounds)
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
    config, data, classes = context.config, context.data, context.data.label_names
    names = {name: getattr(config, name) for name in ("target", "source", "unlabelled")}
    drawn = [(text, kept) for done in rounds for text, kept in zip(done.pool.inputs, done.selection.kept, strict=True)]
    kinds = {
        "source": data.source.inputs, "unlabelled": data.unlabelled, "target": data.target_labels.inputs,
        "dropped candidate": [text for text, kept in drawn if not kept],
        "kept candidate": [text for text, kept in drawn if kept],
    }  # fmt: skip
    assert teacher.logits is not None and student.logits is not None
    known = zip(data.held_out_labels.inputs, data.held_out_labels.labels, strict=True)
    return {
        "format": page.FORMAT, **names, "is_pair": data.target.is_pair, "teacher": config.teacher.model,
        "label_names": classes, "held_out": [[*page.storable(text), classes[label]] for text, label in known],
        "test": page.compare_on_test(student.test, teacher.logits, student.logits, temperature),
        "policy": _explained(config, rounds[-1]),
        "map": page.map_texts(kinds, context.labeller, classes, np.random.default_rng([config.seed, 9])),
    }  # fmt: skip


def _explained(config: DistillConfig, last: Round) -> list[dict[str, Any]]:
    """What the policy of the last round looks at, the most important feature first; nothing where a rule chose."""
    if last.problem is None or last.selection.policy is None:
        return []
    rng = np.random.default_rng([config.seed, 10])
    found = select.inspect_policy(last.problem, last.selection.policy, config.selector, rng)
    return [
        {"feature": name, "loss": loss, "changed": changed,
         "quartiles": [side.tolist() for side in found.quartiles.get(name, ())]}
        for name, (loss, changed) in found.importances.items()
    ]  # fmt: skip


def _write_selector(folder: Path, config: DistillConfig, rounds: Sequence[Round]) -> None:
    last, diagnostics = rounds[-1].selection, [dict[str, Any](done.selection.diagnostics) for done in rounds]
    if last.policy is not None:
        trained = last.policy.facts  # where it was trained elsewhere
        if "reward_curve" in last.diagnostics:  # each round trains on where the one before it ended
            curve = [value for known in diagnostics for value in known["reward_curve"]]
            steps = sum(known["training_steps"] for known in diagnostics)
            trained = training_facts([config], steps, diagnostics[-1]["steps_per_second"], curve)
        used = last.diagnostics.get("chosen", "learned policy")
        algorithms.save_policy(last.policy, folder, {**trained, "used_in_the_last_round": used})
    atomic_write_text(folder / "selection.json", to_json({"agent": last.agent, "rounds": diagnostics}, indent=1) + "\n")
