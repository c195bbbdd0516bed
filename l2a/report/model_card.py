"""The student's model card: what it is, how good it is, what beat it, and how to make it again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from l2a.report.row import Row
from l2a.report.table import markdown_table

STUDENT = "l2a_student"
TEACHERS = {"minilm-l6": "sentence-transformers/all-MiniLM-L6-v2"}
"""Hub ids of the teachers that come without a Hub."""


def model_card(
    source: str,
    target: str,
    label_names: Sequence[str],
    teacher: str,
    rows: Sequence[Row],
    metrics: Mapping[str, Any],
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
