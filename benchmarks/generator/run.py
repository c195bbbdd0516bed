"""Measures the generator against its reference and its peers, and its share of a run: one run, one JSON file.

    python benchmarks/generator/run.py --peers-python PYTHON [--run runs/latest] [--smoke]

PYTHON has nlpaug and TextAttack (``nox -s bench_generator`` makes such an environment).
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from augmenting import measure_augmenting
from costs import measure_fgsm_cost, measure_generator_share
from projection import measure_projection

from l2a.util.files import atomic_write_text, to_json

RESULTS = Path(__file__).parents[1] / "results" / "generator.json"
PACKAGES = ("l2a", "torch", "transformers", "tokenizers", "numpy")
SEED = 0


def main() -> None:
    """Run every measurement and write the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter with nlpaug and TextAttack")
    parser.add_argument("--run", type=Path, help="finished run of l2a distill; without it one is made")
    parser.add_argument("--preset", default="screening", help="budget of the run that is made")
    parser.add_argument("--smoke", action="store_true", help="a little of everything: does it work at all?")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measured: dict[str, Any] = {}
        for measure in (
            lambda: measure_projection(SEED, options.smoke),
            lambda: measure_fgsm_cost(SEED, options.smoke),
            lambda: measure_augmenting(folder, options.peers_python, options.smoke),
            lambda: measure_generator_share(options.run, folder, "fast" if options.smoke else options.preset),
        ):
            found = measure()
            measured |= found
            for metric, facts in found.items():
                if "target" in facts:
                    print(f"{metric}: {facts['value']:.3g} (target {facts['target']})", flush=True)
    content = {**measured, **conditions(), "smoke": options.smoke, "seconds": time.perf_counter() - started}
    atomic_write_text(options.output, to_json(content, indent=1) + "\n")
    print(f"wrote {options.output}")


def conditions() -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    processor = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), processor)
    return {
        "seed": SEED,
        "threads": torch.get_num_threads(),
        "processor": processor,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


if __name__ == "__main__":
    main()
