"""What a run reports: the comparison as a table, the content of metrics.json and the model card."""

import math
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from l2a.evaluation.metrics import ClassificationMetrics, Interval
from l2a.util.errors import RunError

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
            *(f"{row.latency_ms[name]:.2f}±{row.latency_ms[f'{name}_spread']:.2f}" for name in ("batch_1", "batch_32")),
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
    measured = {"peak_memory_mb": round(peak_memory_mb(), 1), "versions": versions()}
    return {"rows": [_row_content(row) for row in rows], **facts, **measured, "threads": torch.get_num_threads()}


def _row_content(row: MethodReport) -> dict[str, Any]:
    metrics = asdict(row.metrics)
    numbers = [*metrics["accuracy"].values(), *metrics["macro_f1"].values(), *row.latency_ms.values()]
    if not all(map(math.isfinite, numbers)):
        raise RunError(
            f"rows: a number of {row.name} is not finite ({numbers}); see log.jsonl for the stage that produced it"
        )
    return {"name": row.name, **metrics, "parameters": row.parameters, "latency_ms": dict(row.latency_ms)}


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


@dataclass(frozen=True)
class CardFacts:
    """What a model card says beside the numbers.

    Attributes:
        source: Name of the source domain.
        target: Name of the target domain.
        label_names: The C class names.
        teacher: A model folder, a Hub id or "minilm-l6".
        is_pair: Whether the student reads pairs of texts.
    """

    source: str
    target: str
    label_names: Sequence[str]
    teacher: str
    is_pair: bool


def model_card(facts: CardFacts, rows: Sequence[MethodReport], metrics: Mapping[str, Any], model: str) -> str:
    """Write the card of a distilled student.

    The header names no licence: it follows from the teacher's and the data's, which are the user's to state.

    Args:
        facts: What the run was about.
        rows: The comparison on the target's test split, the student's among them.
        metrics: The content of ``metrics.json``.
        model: Where the student lies, seen from the card's folder.

    Returns:
        Markdown with a YAML header that a model hub reads.
    """
    scores = ", ".join(f"`{name}` {score:.3f}" for name, score in metrics["validation_log_likelihood"].items())
    return f"""{_header(facts.teacher)}
# Classifier of {facts.target}: {", ".join(facts.label_names)}

A student distilled from the teacher `{facts.teacher}`, with `{facts.source}` as the source domain and
{metrics["labels_used"]} labelled examples of `{facts.target}`. It has {metrics["parameter_share"]:.1%} of the teacher's
parameters.

Run this in the folder of this file:

```python
from transformers import pipeline

classify = pipeline("text-classification", model="{model}", truncation=True)
{_call(facts.is_pair)}
```

## Comparison on the test split of {facts.target}

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


def _call(is_pair: bool) -> str:
    if is_pair:
        return 'print(classify({"text": "the first text", "text_pair": "the second text"}))'
    return 'print(classify("a text"))'


def _header(teacher: str) -> str:
    header: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["knowledge-distillation", "few-shot", "l2a"],
    }
    base_model = TEACHERS.get(teacher, teacher)
    is_folder = base_model.startswith((".", "/", "~")) or Path(base_model).exists()
    if base_model.count("/") == 1 and not is_folder:
        header["base_model"] = base_model  # hubs accept nothing but an id here
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n"
