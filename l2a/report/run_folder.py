"""What a run leaves behind: its table and files, the student with its model card, and the student's way to the Hub."""

import platform
import resource
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub.errors
import huggingface_hub.utils
import numpy as np
import pyarrow.parquet
import torch
import yaml

from l2a.data import TextInput, encoding
from l2a.evaluation.metrics import ClassificationMetrics
from l2a.generator.chain import CandidatePool
from l2a.report import page
from l2a.selector.problem import Selection
from l2a.teacher.model import PACKAGED, usable_positions
from l2a.util import RunError, UsageError, atomic_write_text, files, sha256_file, training

SHORT_HEADERS = ("classifier", "accuracy %", "F1 %", "size", "ms", "ms/32")
CARDS = {"README.md": "student", "student/README.md": "."}
"""The two copies of a model card, and where the student lies as seen from each."""
LICENCES = {"MIT": "mit", "Apache-2.0": "apache-2.0"}
"""Licences with their names on the Hub; what is made of several may be given on under the last of them."""


class MethodReport(NamedTuple):
    """A method's classifier on the test split.

    Attributes:
        name: The method.
        metrics: Accuracy and macro-F1 with 95 % bootstrap intervals.
        parameters: Numbers that the classifier stores.
        latency_ms: As ``measure_latency`` gives it: "batch_1", "batch_32" and their spreads.
    """

    name: str
    metrics: ClassificationMetrics
    parameters: int
    latency_ms: Mapping[str, float]


def short_cells(rows: Sequence[MethodReport]) -> list[tuple[str, ...]]:
    """Format rows for a terminal of 80 columns, one string for each of ``SHORT_HEADERS``."""
    cells = []
    for row in rows:
        accuracy = "{:.1f} ({:.1f}-{:.1f})".format(*(100 * value for value in astuple(row.metrics.accuracy)))
        f1, size, times = f"{100 * row.metrics.macro_f1.value:.1f}", f"{row.parameters / 1e6:.2f} M", []
        for name in ("batch_1", "batch_32"):
            digits = 2 if row.latency_ms[name] < 10 else 1
            times.append(f"{row.latency_ms[name]:.{digits}f}±{row.latency_ms[f'{name}_spread']:.{digits}f}")
        cells.append((row.name, accuracy, f1, size, *times))
    return cells


def metrics_content(rows: Sequence[MethodReport], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Collect what a run measured; memory, versions, the day and threads are read here.

    Returns:
        The facts with ``rows``, ``peak_memory_mb``, ``versions``, ``date`` and ``threads``.

    Raises:
        RunError: If a number of a row is not finite.
    """
    contents: list[dict[str, Any]] = [
        {"name": row.name, **asdict(row.metrics), "parameters": row.parameters, "latency_ms": dict(row.latency_ms)}
        for row in rows
    ]
    for shown in contents:
        numbers = [*shown["accuracy"].values(), *shown["macro_f1"].values(), *shown["latency_ms"].values()]
        if not np.isfinite(numbers).all():
            fix = "see log.jsonl for the stage that produced it"
            raise RunError(f"rows: a number of {shown['name']} is not finite ({numbers}); {fix}")
    measured = {"peak_memory_mb": round(peak_memory_mb(), 1), "versions": versions(), "date": f"{date.today()}"}
    return {"rows": contents, **facts, **measured, "threads": torch.get_num_threads()}


def peak_memory_mb() -> float:
    """Measure the largest resident memory that this process has had, in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if platform.system() == "Darwin" else peak * 1024 / 1e6  # macOS counts bytes, Linux KiB


def versions() -> dict[str, str]:
    """List the versions of Python and of the packages that decide the numbers, by name."""
    packages = ("l2a", "torch", "transformers", "gymnasium", "stable-baselines3", "scikit-learn", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def model_facts(name: str) -> dict[str, str | None]:
    """Say of a model that a setting names what it is called, its id on the Hub and its licence, each where known."""
    if name in PACKAGED:
        return {"name": name, "hub": PACKAGED[name].hub, "licence": PACKAGED[name].licence}
    is_folder = name.startswith((".", "/", "~")) or Path(name).exists()
    is_id = name.count("/") == 1 and not is_folder  # hubs accept nothing but an id
    return {"name": Path(name).name if is_folder else name, "hub": name if is_id else None, "licence": None}


def export_student(model: Any, tokenizer: Any, folder: Path, card: str, max_length: int) -> None:
    """Save a classifier with its tokenizer and its card.

    Args:
        model: A sequence classification model of transformers whose config names the classes.
        tokenizer: Its tokenizer.
        folder: Destination; an existing one is replaced.
        card: The text of README.md.
        max_length: Longest sequence in tokens that it was trained with; the saved tokenizer cuts there.

    Raises:
        RunError: If the disk is full; nothing is left behind.
    """
    length = min(max_length, usable_positions(model) or max_length)
    # The saved config keeps what the architecture defines: nothing of another task that the base was trained for.
    kind = type(model.config)
    known = {name: value for name, value in model.config.to_dict().items() if name in kind().to_dict()}
    known |= {"problem_type": "single_label_classification", "architectures": [type(model).__name__]}
    with files.atomic_folder(folder) as temporary:
        model.save_pretrained(str(temporary))
        kind.from_dict(known).save_pretrained(str(temporary))
        encoding.fit_tokenizer(tokenizer, model.config, length).save_pretrained(str(temporary))
        atomic_write_text(temporary / "README.md", card)
        for path in temporary.iterdir():
            path.chmod(0o644)  # weights are written for their owner alone


def check_parity(model: Any, tokenizer: Any, folder: Path, inputs: Sequence[TextInput], max_length: int) -> float:
    """Compare a model with its saved copy, which is used as its card says: by a pipeline and its tokenizer's own call.

    Args:
        model: The model in memory, on the CPU; it keeps the mode, training or not, that it came in.
        tokenizer: Its tokenizer.
        folder: The saved copy.
        inputs: Texts to compare on, at least one; a text longer than the model reads is added.
        max_length: Longest sequence in tokens that the model was trained with.

    Returns:
        The largest absolute difference of the logits.

    Raises:
        RunError: If the classes have other names, or scores or logits differ by more than 1e-3 or are no numbers.
    """
    from transformers import pipeline

    classify: Any = pipeline(
        "text-classification", model=str(folder), device="cpu", truncation=True, top_k=None, trust_remote_code=False
    )
    names, found = model.config.id2label, classify.model.config.id2label
    if found != names:
        raise RunError(f"student: it was saved with the classes {found}, not {names}")
    sides = [" ".join(side) for side in zip(*inputs, strict=True)]
    probe = [*inputs, tuple(" ".join([side] * (1 + max_length // max(1, len(side.split())))) for side in sides)]
    encoded = encoding.encode(tokenizer, probe, max_length)
    with training.evaluating(model), torch.inference_mode():
        logits = model(**encoding.model_inputs(model.config, encoded.padded(np.arange(len(probe))))).logits
    asked, differences = [dict(zip(("text", "text_pair"), text, strict=False)) for text in probe], []
    for expected, choice in ((logits.softmax(-1), {}), (logits, {"function_to_apply": "none"})):
        answers = [{each["label"]: each["score"] for each in answer} for answer in classify(asked, **choice)]
        scores = torch.tensor([[answer[names[i]] for i in range(len(names))] for answer in answers])
        differences.append(float((expected - scores).abs().max()))
    tolerance = 1e-3  # batches are padded to other lengths, which changes the last digits
    if not max(differences) <= tolerance:  # also true of a NaN
        found = f"by {differences[0]:.2g} and {differences[1]:.2g} (allowed: {tolerance})"
        fix = "as settings are lost when saved; give another --student"
        raise RunError(f"student: the saved model's scores and logits differ from the trained one's {found}, {fix}")
    return differences[1]


def write_augmentations(path: Path, rounds: Sequence[tuple[CandidatePool, Selection]]) -> None:
    """Write all candidates, one a line, kept or not.

    Args:
        path: Destination, a Parquet file.
        rounds: What was drawn and what was kept of it, numbered from 0; none gives a file without lines.

    Raises:
        RunError: If the disk is full.
    """
    texts = dict.fromkeys(("text", "text_pair", "origin", "operator"), "string")
    numbers = {"degree": "float32", "teacher_probabilities": pyarrow.list_(pyarrow.float32())}
    kinds = {**texts, **numbers, "selector_score": "float32", "kept": "bool", "round": "int32"}
    rows = []
    for number, (pool, selection) in enumerate(rounds):
        probabilities, scores, kept = pool.teacher.probabilities(), selection.scores, selection.kept
        known = zip(pool.inputs, pool.origins, pool.operators, pool.degrees, probabilities, scores, kept, strict=True)
        for text, *facts in known:
            sides = (*page.storable(text), None)[:2]
            rows.append(dict(zip(kinds, (*sides, *facts, number), strict=True)))
    with files.atomic_file(path) as file:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, pyarrow.schema(kinds)), file)


def model_card(metrics: Mapping[str, Any], facts: Mapping[str, Any], export: Any, place: str) -> str:
    """Write the card of a distilled student: Markdown with a YAML header that the Hub reads.

    Args:
        metrics: The content of ``metrics.json``.
        facts: The content of ``report.json``.
        export: The content of ``export.json``; an empty mapping before an export.
        place: Where the student lies, seen from the card's folder.
    """
    data, models = metrics["data"], metrics["models"]
    target, rows = data["target"][0], {row["name"]: row for row in metrics["rows"]}
    student = rows[metrics["student"]]
    licence, reason = _licence(data, models)
    split: dict[str, Any] = {"dataset_split": "test", "dataset_args": {"examples": facts["test"]["tested"]}}
    task, results = ("text-classification", target["name"], target["name"]), []
    for metric, field, name in (("accuracy", "accuracy", "Accuracy"), ("f1", "macro_f1", "Macro-F1")):
        value = round(student[field]["value"], 4)
        results.append(huggingface_hub.EvalResult(*task, metric, value, metric_name=name, **split))
    header = huggingface_hub.ModelCardData(
        model_name=f"Classifier of {target['name']}", eval_results=results, license=licence,
        license_name="see-the-card" if licence == "other" else None, language=target["language"] or None,
        library_name="transformers", pipeline_tag="text-classification", base_model=models["start"]["hub"],
        tags=["l2a", "knowledge-distillation", "few-shot"], metrics=["accuracy", "f1"],
    )  # fmt: skip
    return page.render(
        Path(__file__).with_name("card.md.jinja"), header=header.to_yaml(), metrics=metrics, facts=facts, data=data,
        models=models, export=export, place=place, reason=reason, rows=rows,
        verdict=page.verdict(metrics), scores=page.class_scores(facts["test"]["student"]["confusion"]),
    )  # fmt: skip


def _licence(data: Mapping[str, Any], models: Mapping[str, Any]) -> tuple[str, str]:
    """The Hub's name of the licence that follows from the parts, and why."""
    parts = [*(part for side in data.values() for part in side), *models.values()]
    if unclear := ", ".join(dict.fromkeys(part["name"] for part in parts if part["licence"] not in LICENCES)):
        fix = "Before you give it on, find out what they allow, and name the licence in the header of this file."
        return "other", f"No licence of the student follows from what is known of {unclear}. {fix}"
    found = [name for name in LICENCES if name in {part["licence"] for part in parts}]
    why = f"follows from those of its parts: {' and '.join(found)}."
    return LICENCES[found[-1]], f"The licence of the student, {found[-1]}, {why}"


def refresh(run: Path) -> None:
    """Draw the page and the model cards of a finished run again after an export; what a user has changed stays.

    Without the evidence of a page nothing is drawn.

    Raises:
        RunError: If the files of the run are not as it left them.
    """
    try:
        owned = page.check_run(run)
    except UsageError:  # there is no such evidence
        return
    metrics, facts, export = page.read_evidence(run)
    for name, place in {**CARDS, page.PAGE: ""}.items():
        if (run / name).is_file() and sha256_file(run / name) == owned.get(name):
            drawn = model_card(metrics, facts, export, place) if place else page.render_page(run)
            files.add_to_folder(run, name, drawn.encode("utf-8"))


def files_to_push(run: Path, repo: str) -> dict[str, Path]:
    """Choose and check what a push uploads: the student, its card and its export, nothing of the run's data.

    Args:
        run: The output folder of a finished run.
        repo: Where they would go, "name" or "owner/name".

    Returns:
        Files by their names in the repository.

    Raises:
        UsageError: If the run is not finished, the name is not valid or the card's header cannot be read.
        RunError: If a file is not as the run left it; the card may have been edited.
    """
    try:
        huggingface_hub.utils.validate_repo_id(repo)  # type: ignore[attr-defined]
    except huggingface_hub.errors.HFValidationError as error:
        raise UsageError(f"REPO is {repo!r}; give owner/name, of letters, digits, '-', '_' and '.'") from error
    wanted = [name for name in page.check_run(run, ()) if name.split("/")[0] in ("student", "onnx")]
    page.check_run(run, [name for name in wanted if name not in CARDS])
    card = run / "student" / "README.md"
    try:
        huggingface_hub.ModelCard.load(card)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{card}: its header cannot be read ({' '.join(str(error).split())}); correct it") from error
    return {name.removeprefix("student/"): run / name for name in wanted}


def push(files: Mapping[str, Path], repo: str, private: bool = False) -> str:
    """Upload a student in one commit and return its address; what an interrupted push has uploaded is not sent again.

    Args:
        files: As ``files_to_push`` gives them.
        repo: "name" or "owner/name"; made where it does not exist.
        private: Whether nobody else may see it.

    Raises:
        UsageError: If there is no token, or a private repository is wanted and it is public.
        RunError: If the Hub refuses or cannot be reached.
    """
    import httpx2

    if (token := huggingface_hub.get_token()) is None:
        raise UsageError("there is no token of the Hub; log in by `hf auth login`, or set HF_TOKEN")
    api = huggingface_hub.HfApi(token=token)
    try:
        place = api.create_repo(repo, private=private or None, exist_ok=True)
        found = api.model_info(place.repo_id)
        if private and not found.private:
            raise UsageError(f"{place.repo_id} exists and is public; make it private on the Hub, or drop --private")
        # An older student's export would not belong to this one.
        old = [one.rfilename for one in found.siblings or () if one.rfilename.startswith("onnx/")]
        gone = [huggingface_hub.CommitOperationDelete(name) for name in old if name not in files]
        added = [huggingface_hub.CommitOperationAdd(name, path) for name, path in files.items()]
        api.create_commit(place.repo_id, [*added, *gone], commit_message="Upload a student of l2a")
    except UsageError:
        raise
    except huggingface_hub.errors.HfHubHTTPError as error:
        code = error.response.status_code
        reason = {401: "the token is not valid; log in again by `hf auth login`",
                  403: "the token may not write there; give one that may, or another repository"}  # fmt: skip
        said = reason.get(code, error.server_message or str(error))
        raise RunError(f"{repo}: the Hub answers {code}: {' '.join(said.split())[:200]}") from error
    except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        why = f"({' '.join(str(error).split())}); run the same command again to go on"
        raise RunError(f"{repo}: the upload broke off {why}") from error
    return str(place)
