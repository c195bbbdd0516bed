"""l2a: distil a small text classifier for a domain with few labels.

The package imports nothing heavy until a function is used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l2a.config import DistillConfig
    from l2a.pipeline.distill import DistillResult, distill
    from l2a.pipeline.estimator import L2AClassifier
    from l2a.serving.classifier import Classifier

__version__ = "0.1.0"
__all__ = ["Classifier", "DistillConfig", "DistillResult", "L2AClassifier", "distill"]

_HOMES = {
    "Classifier": "l2a.serving.classifier", "DistillConfig": "l2a.config", "DistillResult": "l2a.pipeline.distill",
    "L2AClassifier": "l2a.pipeline.estimator", "distill": "l2a.pipeline.distill",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'l2a' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
