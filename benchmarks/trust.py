"""Measures of trust, all in benchmarks/results/trust.json: one line of docs/trust.md each."""

import json
from pathlib import Path
from typing import Any

from filelock import FileLock

from l2a.util.files import atomic_write_text

RESULT = Path(__file__).parent / "results" / "trust.json"


def record(path: Path = RESULT, **values: Any) -> None:
    """Set some keys of the file of measures in one step and keep the others, also when several processes do so."""
    with FileLock(path.with_name(f".{path.name}.lock")):
        known = json.loads(path.read_text("utf-8")) if path.exists() else {}
        atomic_write_text(path, json.dumps(dict(sorted((known | values).items())), indent=1) + "\n")


if __name__ == "__main__":
    print(RESULT.read_text("utf-8"))
