"""One row of the comparison."""

from collections.abc import Mapping
from dataclasses import dataclass

from l2a.evaluation.metrics import ClassificationMetrics


@dataclass(frozen=True)
class Row:
    """A classifier on the test split.

    Attributes:
        name: As in ``metrics.json``.
        metrics: Accuracy and macro-F1 with 95 % bootstrap intervals.
        parameters: Numbers that the classifier stores.
        latency_ms: CPU milliseconds a sentence, "batch_1" and "batch_32".
    """

    name: str
    metrics: ClassificationMetrics
    parameters: int
    latency_ms: Mapping[str, float]
