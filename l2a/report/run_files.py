"""The comparison as a table: its cells for the terminal, and Markdown for pages."""

import math
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from l2a.evaluation.metrics import Interval, Row
from l2a.util.errors import RunError

HEADERS = ("classifier", "accuracy %", "macro-F1 %", "parameters", "ms", "ms in 32")
SHORT_HEADERS = ("classifier", "accuracy %", "F1 %", "size", "ms", "ms/32")


def table_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
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
            *(f"{row.latency_ms[name]:.2f}" for name in ("batch_1", "batch_32")),
        )
        for row in rows
    ]


def short_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
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


def markdown_table(rows: Sequence[Row]) -> str:
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


PACKAGES = ("l2a", "torch", "transformers", "gymnasium", "stable-baselines3", "scikit-learn", "numpy")


def metrics_content(
    rows: Sequence[Row],
    parameter_share: float,
    labels_used: int,
    seconds_by_stage: Mapping[str, float],
    seed: int,
    command: str,
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """Collect what a run measured; memory, versions and threads are read here.

    Args:
        rows: The comparison.
        parameter_share: The student's parameters over the teacher's.
        labels_used: Labelled target examples read for training, reward and validation together.
        seconds_by_stage: Wall seconds of each stage.
        seed: The run's seed.
        command: The command line, or how the run was called from Python.
        extra: Further facts, added at the top level.

    Returns:
        Plain values under ``rows``, ``parameter_share``, ``labels_used``, ``seconds_by_stage``, ``peak_memory_mb``,
        ``seed``, ``versions``, ``command``, ``threads`` and the keys of ``extra``.

    Raises:
        RunError: If a number of a row is not finite.
    """
    return {
        "rows": [_row_content(row) for row in rows],
        "parameter_share": parameter_share,
        "labels_used": labels_used,
        "seconds_by_stage": {name: round(seconds, 3) for name, seconds in seconds_by_stage.items()},
        "peak_memory_mb": round(peak_memory_mb(), 1),
        "seed": seed,
        "versions": versions(),
        "command": command,
        "threads": torch.get_num_threads(),
        **extra,
    }


def _row_content(row: Row) -> dict[str, Any]:
    metrics = asdict(row.metrics)
    numbers = [*metrics["accuracy"].values(), *metrics["macro_f1"].values(), *row.latency_ms.values()]
    if not all(map(math.isfinite, numbers)):
        raise RunError(
            f"rows: a number of {row.name} is not finite ({numbers}); look in log.jsonl for the stage it came from"
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


STUDENT = "l2a_student"
TEACHERS = {"minilm-l6": "sentence-transformers/all-MiniLM-L6-v2"}
"""Hub ids of the teachers that come without a Hub."""


def model_card(
    source: str, target: str, label_names: Sequence[str], teacher: str, rows: Sequence[Row], metrics: Mapping[str, Any]
) -> str:
    """Write the card of a distilled student.

    The header names no licence: it follows from the teacher's and the data's, which are the user's to state.

    Args:
        source: Source domain.
        target: Target domain.
        label_names: The C class names.
        teacher: A model folder, a Hub id or "minilm-l6".
        rows: The comparison on the target's test split, the student's among them.
        metrics: The content of ``metrics.json``.

    Returns:
        Markdown with a YAML header that a model hub reads.
    """
    return f"""{_header(teacher)}
# Classifier of {target}: {", ".join(label_names)}

A student distilled from the teacher `{teacher}`, with `{source}` as the source domain and
{metrics["labels_used"]} labelled examples of `{target}`. It has {metrics["parameter_share"]:.1%} of the teacher's
parameters.

```python
from transformers import pipeline

classify = pipeline("text-classification", model="student", truncation=True)
classify("...")
```

## Comparison on the test split of {target}

{markdown_table(rows)}
{_verdict(rows)}

Intervals are 95 % bootstrap intervals over the test examples; they do not cover the choice of the labelled examples
or the seed. Latency is CPU time per text, alone and in batches of 32, with {metrics["threads"]} threads.

## How it was made

- command: `{metrics["command"]}`, seed {metrics["seed"]}
- versions: {", ".join(f"{name} {number}" for name, number in metrics["versions"].items())}

## Limits

It was trained on few labels of one domain and on labels that a teacher made; it knows the classes above and nothing
else, and repeats the errors of its teacher. Test it on your own data before you rely on it. Its licence follows from
the teacher's and the data's.
"""


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


def _verdict(rows: Sequence[Row]) -> str:
    """Name the rows that were more accurate than the student, however many there are."""
    student = next(row for row in rows if row.name == STUDENT)
    ahead = [row for row in rows if row.metrics.accuracy.value > student.metrics.accuracy.value]
    if not ahead:
        return "No row was more accurate than the student on this test split."
    names = ", ".join(f"`{row.name}` ({row.metrics.accuracy.value:.1%})" for row in ahead)
    return f"More accurate than the student on this test split: {names}."
