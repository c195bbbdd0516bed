"""Runs one cell and writes down what it gave, with what is needed to judge and repeat it."""

import functools
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING

import psutil
import torch
from sklearn.metrics import accuracy_score, f1_score

from l2a import __version__
from l2a.cache import fingerprint
from l2a.config import DistillConfig
from l2a.experiments.cells import Cell, DataFiles
from l2a.experiments.isolation import isolated
from l2a.experiments.results import CellResult

if TYPE_CHECKING:
    from l2a.pipeline.rows import RowResult

RunRow = Callable[[DistillConfig, str], "RowResult"]
"""Trains and evaluates one row of one configuration; it alone opens the test split, at its end."""

PACKAGES = ("torch", "transformers", "tokenizers", "stable-baselines3", "scikit-learn", "numpy")


def measure(cell: Cell, key: str, data: DataFiles, run_row: RunRow) -> CellResult:
    """Run one cell by itself: one thread, its own seed.

    Args:
        cell: The cell.
        key: Fingerprint that its result will have.
        data: Its data files.
        run_row: Runs the row.

    Returns:
        The finished cell.

    Raises:
        UsageError: If the row refuses its data or settings.
        RunError: If the row fails.
    """
    started = time.perf_counter()
    with isolated(cell.config.seed):
        row = run_row(cell.config, cell.row)
    wall_seconds = time.perf_counter() - started
    config = cell.config
    return CellResult(
        **cell.place._asdict(),
        method=cell.method,
        row=cell.row,
        key=key,
        preset=cell.preset,
        accuracy=float(accuracy_score(row.labels, row.predictions)),
        macro_f1=float(f1_score(row.labels, row.predictions, average="macro")),
        test_examples=len(row.labels),
        predictions=fingerprint(row.predictions),
        parameters=row.parameters,
        labels_used=(config.shots + 2 * config.dev_shots) * len(row.label_names),
        seconds=round(row.seconds, 2),
        wall_seconds=round(wall_seconds, 2),
        data=dict(data),
        versions=_versions(),
        machine=describe_machine(),
        diagnostics=dict(row.diagnostics),
    )


def describe_machine() -> dict[str, str | int | float]:
    """Describe the machine as far as it bears on time and rounding; nothing in it names the machine.

    Returns:
        Processor architecture, cores, memory in GiB and device.
    """
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count() or 1,
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


@functools.cache
def _versions() -> dict[str, str]:
    installed = {name: version(name) for name in PACKAGES}
    return {"l2a": __version__, "python": platform.python_version(), **installed}
