"""What a run leaves behind: table, metrics file, model card, augmentations and the student's folder.

The folder is an ordinary, complete transformers model that loads without this package.
"""

import math
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from l2a.config import DistillConfig
from l2a.data.encoding import encode, fit_tokenizer, model_inputs
from l2a.data.examples import TextInput
from l2a.evaluation.metrics import ClassificationMetrics, Interval
from l2a.generator.chain import CandidatePool
from l2a.selector.problem import Selection
from l2a.teacher.model import usable_positions
from l2a.util.errors import RunError
from l2a.util.files import atomic_folder, atomic_write_bytes, atomic_write_text

HEADERS = ("classifier", "accuracy %", "macro-F1 %", "parameters", "ms", "ms in 32")
SHORT_HEADERS = ("classifier", "accuracy %", "F1 %", "size", "ms", "ms/32")
PACKAGES = ("l2a", "torch", "transformers", "gymnasium", "stable-baselines3", "scikit-learn", "numpy")
TEACHERS = {"minilm-l6": "sentence-transformers/all-MiniLM-L6-v2"}
"""Hub ids of the teachers that come without a Hub."""


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


def table_cells(rows: Sequence[MethodReport]) -> list[tuple[str, ...]]:
    """Format rows, one cell for each of ``HEADERS``.

    Args:
        rows: In the order to show.

    Returns:
        A tuple of strings for each row.
    """
    return [
        (
            row.name,
            _percent(row.metrics.accuracy),
            _percent(row.metrics.macro_f1),
            f"{row.parameters / 1e6:.2f} M",
            *(_milliseconds(row.latency_ms, name) for name in ("batch_1", "batch_32")),
        )
        for row in rows
    ]


def short_cells(rows: Sequence[MethodReport]) -> list[tuple[str, ...]]:
    """Format rows for a terminal of 80 columns, one cell for each of ``SHORT_HEADERS``.

    Args:
        rows: In the order to show.

    Returns:
        A tuple of strings for each row.
    """
    return [
        (name, accuracy, f"{100 * row.metrics.macro_f1.value:.1f}", *rest)
        for row, (name, accuracy, _, *rest) in zip(rows, table_cells(rows), strict=True)
    ]


def markdown_table(rows: Sequence[MethodReport]) -> str:
    """Lay rows out as a Markdown table.

    Args:
        rows: In the order to show.

    Returns:
        The table's lines, ending with a newline.
    """
    lines = [HEADERS, ("---", *["---:"] * (len(HEADERS) - 1)), *table_cells(rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _milliseconds(latency: Mapping[str, float], name: str) -> str:
    median, spread = latency[name], latency[f"{name}_spread"]
    digits = 2 if median < 10 else 1  # the table fits a terminal of 80 columns
    return f"{median:.{digits}f}±{spread:.{digits}f}"


def _percent(interval: Interval) -> str:
    value, low, high = (100.0 * number for number in (interval.value, interval.low, interval.high))
    return f"{value:.1f} ({low:.1f}-{high:.1f})"


def verdict(rows: Sequence[MethodReport], student: str) -> str:
    """Name the rows that were more accurate than the saved student, however many there are.

    Args:
        rows: The comparison, the student's row among them.
        student: The student's row.

    Returns:
        One sentence.
    """
    own = next(row for row in rows if row.name == student)
    ahead = [row for row in rows if row.metrics.accuracy.value > own.metrics.accuracy.value]
    if not ahead:
        return f"No row was more accurate than {student} on this test split."
    names = ", ".join(f"{row.name} ({row.metrics.accuracy.value:.1%})" for row in ahead)
    return f"More accurate than {student} on this test split: {names}."


def metrics_content(rows: Sequence[MethodReport], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Collect what a run measured; memory, versions and threads are read here.

    Args:
        rows: The comparison.
        facts: What the run knows of itself, added at the top level.

    Returns:
        Plain values under ``rows``, ``peak_memory_mb``, ``versions``, ``threads`` and the keys of ``facts``.

    Raises:
        RunError: If a number of a row is not finite.
    """
    for row in rows:
        accuracy, macro_f1 = asdict(row.metrics.accuracy), asdict(row.metrics.macro_f1)
        numbers = [*accuracy.values(), *macro_f1.values(), *row.latency_ms.values()]
        if not all(map(math.isfinite, numbers)):
            raise RunError(
                f"rows: a number of {row.name} is not finite ({numbers}); see log.jsonl for the stage that produced it"
            )
    contents = [
        {"name": row.name, **asdict(row.metrics), "parameters": row.parameters, "latency_ms": dict(row.latency_ms)}
        for row in rows
    ]
    measured = {"peak_memory_mb": round(peak_memory_mb(), 1), "versions": versions()}
    return {"rows": contents, **facts, **measured, "threads": torch.get_num_threads()}


def peak_memory_mb() -> float:
    """Measure the largest resident memory that this process has had.

    Returns:
        MB (10^6 bytes).
    """
    if sys.platform == "win32":
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # macOS counts bytes, Linux KiB


def versions() -> dict[str, str]:
    """List the versions of Python and of the packages that decide the numbers.

    Returns:
        Name to version.
    """
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def model_card(
    config: DistillConfig,
    label_names: Sequence[str],
    is_pair: bool,
    rows: Sequence[MethodReport],
    metrics: Mapping[str, Any],
    model: str,
) -> str:
    """Write the card of a distilled student.

    The header names no licence: it follows from the teacher's and the data's, which are the user's to state.

    Args:
        config: The run.
        label_names: The C class names.
        is_pair: Whether the student reads pairs of texts.
        rows: The comparison on the target's test split, the student's among them.
        metrics: The content of ``metrics.json``.
        model: Where the student lies, seen from the card's folder.

    Returns:
        Markdown with a YAML header that a model hub reads.
    """
    scores = ", ".join(f"`{name}` {score:.3f}" for name, score in metrics["validation_log_likelihood"].items())
    teacher, share = config.teacher.model, metrics["parameter_share"]
    example = '{"text": "the first text", "text_pair": "the second text"}' if is_pair else '"a text"'
    return f"""{_header(teacher)}
# Classifier of {config.target}: {", ".join(label_names)}

A student distilled from the teacher `{teacher}`, with `{config.source}` as the source domain and
{metrics["labels_used"]} labelled examples of `{config.target}`. It has {share:.1%} of the teacher's
parameters.

Run this in the folder of this file:

```python
from transformers import pipeline

classify = pipeline("text-classification", model="{model}", truncation=True)
print(classify({example}))
```

## Comparison on the test split of {config.target}

{markdown_table(rows)}
This is the student of `{metrics["student"]}`, chosen by the log-likelihood on the validation split: {scores}.
{verdict(rows, metrics["student"])}

Intervals are 95 % bootstrap intervals over the test examples; they do not cover the choice of the labelled examples
or the seed. ms is CPU time per text on one thread, alone and in batches of 32: the median of repeated calls ± half
their interquartile range.

## How it was made

- command: `{metrics["command"]}`, seed {metrics["seed"]}
- versions: {", ".join(f"{name} {number}" for name, number in metrics["versions"].items())}

## Limits

It was trained on few labels of one domain and on labels that a teacher made; it knows the classes above and nothing
else, and repeats the errors of its teacher. Test it on your own data before you rely on it. Its licence follows from
the teacher's and the data's.
"""


def _header(teacher: str) -> str:
    tags = ["knowledge-distillation", "few-shot", "l2a"]
    header = {"library_name": "transformers", "pipeline_tag": "text-classification", "tags": tags}
    base_model = TEACHERS.get(teacher, teacher)
    is_folder = base_model.startswith((".", "/", "~")) or Path(base_model).exists()
    if base_model.count("/") == 1 and not is_folder:
        header["base_model"] = base_model  # hubs accept nothing but an id here
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n"


TOLERANCE = 1e-3
"""Batches are padded to other lengths, which changes the last digits."""


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
    names = model.config.id2label
    if classify.model.config.id2label != names:
        raise RunError(f"student: it was saved with the classes {classify.model.config.id2label}, not {names}")
    sides = [" ".join(side) for side in zip(*inputs, strict=True)]
    long = tuple(" ".join([side] * (1 + max_length // max(1, len(side.split())))) for side in sides)
    probe = [*inputs, long]
    logits = _logits(model, tokenizer, probe, max_length)
    asked = [dict(zip(("text", "text_pair"), text, strict=False)) for text in probe]
    differences = []
    for expected, choice in ((logits.softmax(-1), {}), (logits, {"function_to_apply": "none"})):
        found = [{each["label"]: each["score"] for each in answer} for answer in classify(asked, **choice)]
        scores = torch.tensor([[answer[names[i]] for i in range(len(names))] for answer in found])
        differences.append(float((expected - scores).abs().max()))
    if not max(differences) <= TOLERANCE:  # also true of a NaN
        raise RunError(
            f"student: the saved model's scores and logits differ from the trained one's by {differences[0]:.2g} and "
            f"{differences[1]:.2g} (allowed: {TOLERANCE}), as settings are lost when saved; give another --student"
        )
    return differences[1]


def _logits(model: Any, tokenizer: Any, inputs: Sequence[TextInput], max_length: int) -> torch.Tensor:
    """Classify in memory, as in training and measuring."""
    encoded, was_training = encode(tokenizer, inputs, max_length), model.training
    model.eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(**model_inputs(model.config, encoded.padded(np.arange(len(encoded))))).logits
    model.train(was_training)
    return logits


SCHEMA = pa.schema(
    dict.fromkeys(("text", "text_pair", "origin", "operator"), pa.string())
    | {"degree": pa.float32(), "teacher_probabilities": pa.list_(pa.float32()), "selector_score": pa.float32()}
    | {"kept": pa.bool_(), "round": pa.int32()}
)


def write_augmentations(path: Path, rounds: Sequence[tuple[CandidatePool, Selection]]) -> None:
    """Write all candidates, one a line, kept or not.

    Args:
        path: Destination, a Parquet file.
        rounds: What was drawn and what was kept of it, numbered from 0; none gives a file without lines.

    Raises:
        RunError: If the disk is full.
    """
    tables = [SCHEMA.empty_table()]
    for number, (pool, selection) in enumerate(rounds):
        # JSON sources may hold lone surrogates, which UTF-8, and so Parquet, cannot.
        texts = [[side.encode("utf-8", "replace").decode("utf-8") for side in text] for text in pool.inputs]
        columns = {
            "text": [text[0] for text in texts],
            "text_pair": [text[1] if len(text) == 2 else None for text in texts],
            "origin": list(pool.origins),
            "operator": list(pool.operators),
            "degree": pool.degrees,
            "teacher_probabilities": list(pool.teacher.probabilities()),
            "selector_score": selection.scores,
            "kept": selection.kept,
            "round": np.full(len(texts), number, dtype=np.int32),
        }
        tables.append(pa.table(columns, schema=SCHEMA))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.concat_tables(tables), sink)
    atomic_write_bytes(path, sink.getvalue().to_pybytes())
