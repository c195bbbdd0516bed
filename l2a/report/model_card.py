"""The student's model card."""

from collections.abc import Mapping, Sequence
from typing import Any

from l2a.report.row import Row
from l2a.report.table import markdown_table


def model_card(
    source: str,
    target: str,
    label_names: Sequence[str],
    teacher: str,
    rows: Sequence[Row],
    metrics: Mapping[str, Any],
) -> str:
    """Write the card of a distilled student.

    Args:
        source: Source domain.
        target: Target domain.
        label_names: The C class names.
        teacher: The teacher's name.
        rows: The comparison on the target's test split.
        metrics: The content of ``metrics.json``.

    Returns:
        Markdown with a YAML header.
    """
    packages = ", ".join(f"{name} {number}" for name, number in metrics["versions"].items())
    labels = ", ".join(label_names)
    return f"""---
library_name: transformers
pipeline_tag: text-classification
tags: [knowledge-distillation, few-shot, l2a]
---

# Classifier of {target}: {labels}

A student distilled by l2a from the teacher `{teacher}`, with `{source}` as the source domain and
{metrics["labels_used"]} labelled examples of `{target}`. It has {metrics["parameter_share"]:.1%} of the teacher's
parameters.

```python
from transformers import pipeline

classify = pipeline("text-classification", model="student")
classify("...")
```

## Comparison on the test split of {target}

{markdown_table(rows)}

Intervals are 95 % bootstrap intervals over the test examples; they do not cover the choice of the labelled examples
or the seed. Latency is CPU time with {metrics["threads"]} threads.

## How it was made

- command: `{metrics["command"]}`, seed {metrics["seed"]}
- versions: {packages}

## Limits

It was trained on few labels of one domain and on labels that a teacher made; it knows the classes above and nothing
else. Test it on your own data before you rely on it.
"""
