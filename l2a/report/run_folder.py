"""What a run leaves behind: table, metrics file, augmentations, and the student as a transformers model."""

import math
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow.parquet import write_table

from l2a.data.encoding import encode, fit_tokenizer, model_inputs
from l2a.data.examples import TextInput
from l2a.evaluation.metrics import ClassificationMetrics
from l2a.generator.chain import CandidatePool
from l2a.selector.problem import Selection
from l2a.teacher.model import PACKAGED, usable_positions
from l2a.util.errors import RunError
from l2a.util.files import atomic_file, atomic_folder, atomic_write_text
from l2a.util.training import evaluating

SHORT_HEADERS = ("classifier", "accuracy %", "F1 %", "size", "ms", "ms/32")


@dataclass(frozen=True)
class MethodReport:
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

    def milliseconds(row: MethodReport, name: str) -> str:
        median, spread = row.latency_ms[name], row.latency_ms[f"{name}_spread"]
        digits = 2 if median < 10 else 1
        return f"{median:.{digits}f}±{spread:.{digits}f}"

    return [
        (
            row.name,
            "{:.1f} ({:.1f}-{:.1f})".format(*(100 * value for value in astuple(row.metrics.accuracy))),
            f"{100 * row.metrics.macro_f1.value:.1f}", f"{row.parameters / 1e6:.2f} M",
            milliseconds(row, "batch_1"), milliseconds(row, "batch_32"),
        )
        for row in rows
    ]  # fmt: skip


def metrics_content(rows: Sequence[MethodReport], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Collect what a run measured; memory, versions, the day and threads are read here.

    Args:
        rows: The comparison.
        facts: What the run knows of itself.

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
        if not math.isfinite(sum(numbers)):
            what = f"a number of {shown['name']} is not finite ({numbers})"
            raise RunError(f"rows: {what}; see log.jsonl for the stage that produced it")
    measured = {"peak_memory_mb": round(peak_memory_mb(), 1), "versions": versions(), "date": f"{date.today()}"}
    return {"rows": contents, **facts, **measured, "threads": torch.get_num_threads()}


def peak_memory_mb() -> float:
    """Measure the largest resident memory that this process has had, in MB (10^6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # macOS counts bytes, Linux KiB


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
    with atomic_folder(folder) as temporary:
        model.save_pretrained(str(temporary))
        kind.from_dict(known).save_pretrained(str(temporary))
        fit_tokenizer(tokenizer, model.config, length).save_pretrained(str(temporary))
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
    encoded = encode(tokenizer, probe, max_length)
    with evaluating(model), torch.inference_mode():
        logits = model(**model_inputs(model.config, encoded.padded(np.arange(len(probe))))).logits
    asked = [dict(zip(("text", "text_pair"), text, strict=False)) for text in probe]
    differences = []
    for expected, choice in ((logits.softmax(-1), {}), (logits, {"function_to_apply": "none"})):
        answers = [{each["label"]: each["score"] for each in answer} for answer in classify(asked, **choice)]
        scores = torch.tensor([[answer[names[i]] for i in range(len(names))] for answer in answers])
        differences.append(float((expected - scores).abs().max()))
    tolerance = 1e-3  # batches are padded to other lengths, which changes the last digits
    if not max(differences) <= tolerance:  # also true of a NaN
        raise RunError(
            f"student: the saved model's scores and logits differ from the trained one's by {differences[0]:.2g} and "
            f"{differences[1]:.2g} (allowed: {tolerance}), as settings are lost when saved; give another --student"
        )
    return differences[1]


def write_augmentations(path: Path, rounds: Sequence[tuple[CandidatePool, Selection]]) -> None:
    """Write all candidates, one a line, kept or not.

    Args:
        path: Destination, a Parquet file.
        rounds: What was drawn and what was kept of it, numbered from 0; none gives a file without lines.

    Raises:
        RunError: If the disk is full.
    """
    schema = pa.schema(
        dict.fromkeys(("text", "text_pair", "origin", "operator"), "string")
        | {"degree": "float32", "teacher_probabilities": pa.list_(pa.float32()), "selector_score": "float32"}
        | {"kept": "bool", "round": "int32"}
    )
    tables = [schema.empty_table()]
    for number, (pool, selection) in enumerate(rounds):
        # JSON sources may hold lone surrogates, which UTF-8, and so Parquet, cannot.
        texts = [[side.encode("utf-8", "replace").decode("utf-8") for side in text] for text in pool.inputs]
        columns = [
            [text[0] for text in texts], [(*text, None)[1] for text in texts], pool.origins, pool.operators,
            pool.degrees, list(pool.teacher.probabilities()), selection.scores, selection.kept, [number] * len(texts),
        ]  # fmt: skip
        tables.append(pa.table(dict(zip(schema.names, columns, strict=True)), schema=schema))
    with atomic_file(path) as file:
        write_table(pa.concat_tables(tables), file)
