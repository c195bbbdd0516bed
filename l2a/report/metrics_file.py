"""The content of metrics.json: all that a run measured, and what is needed to repeat it."""

import math
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch

from l2a.errors import RunError
from l2a.report.row import Row

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
        labels_used: Labelled target examples read for training, reward and model choice together.
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
