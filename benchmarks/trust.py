"""Measures of trust, in benchmarks/results/trust.json; ``nox -s trust`` counts bad inputs and fuzz cases.

``bad_inputs`` are the wrong requests of tests/cli/test_bad_inputs.py, and ``unclear`` those that gave a traceback, a
wrong exit code, or no sentence that names what is wrong and a fix. ``fuzz_cases`` are the inputs that atheris tried
(benchmarks/fuzz.py) and the examples that hypothesis tried in the fast suite; ``crashes`` are those that gave anything
but a clear refusal. Other commands set other keys.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from filelock import FileLock

from l2a.util.files import atomic_write_text

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "trust.json"
REFUSALS = "tests/cli/test_bad_inputs.py"
EXAMPLES = re.compile(r"- (\d+) passing, (\d+) failing, and \d+ invalid test cases")


def record(path: Path = RESULT, **values: Any) -> None:
    """Set some keys of the file of measures in one step and keep the others, also when several processes do so."""
    with FileLock(path.with_name(f".{path.name}.lock")):
        known = json.loads(path.read_text("utf-8")) if path.exists() else {}
        atomic_write_text(path, json.dumps(dict(sorted((known | values).items())), indent=1) + "\n")


def run_tests(report: Path, *arguments: str) -> tuple[str, int, int]:
    """Run tests in a process of their own; give their output, and how many there were and failed."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    for case in cases:
        if case.find("failure") is not None or case.find("error") is not None:
            print(f"failed: {case.get('classname')}::{case.get('name')}", flush=True)
    return shown, len(cases), failed


def properties() -> list[str]:
    """The test files with properties."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "\n@given(" in file.read_text("utf-8")]


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of atheris")
    parser.add_argument("--profile", default="nightly", help="of hypothesis: nightly, or quick")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        fuzz = [sys.executable, str(ROOT / "benchmarks" / "fuzz.py"), "--minutes", str(options.minutes)]
        fuzzing = subprocess.Popen([*fuzz, "--output", str(folder / "fuzz")], stdout=subprocess.DEVNULL)
        started = time.monotonic()
        _, bad_inputs, unclear = run_tests(folder / "bad.xml", REFUSALS)
        record(bad_inputs=bad_inputs, unclear=unclear)
        print(f"{bad_inputs} bad inputs, {unclear} unclear, {time.monotonic() - started:.0f} s", flush=True)
        chosen = ["-m", "not slow", "--hypothesis-show-statistics", f"--hypothesis-profile={options.profile}"]
        shown, _, failed = run_tests(folder / "properties.xml", *chosen, *properties())
        examples = sum(int(passed) + int(failing) for passed, failing in EXAMPLES.findall(shown))
        fuzzing.wait()
        found = json.loads((folder / "fuzz" / "fuzz.json").read_text("utf-8"))
    crashes = len(found["crashes"]) + failed
    record(fuzz_cases=found["executions"] + examples, fuzz_by_target=found["by_target"], hypothesis_examples=examples,
           crashes=crashes)  # fmt: skip
    print("\n".join([*found["crashes"], RESULT.read_text("utf-8")]))
    sys.exit(bool(unclear or crashes))


if __name__ == "__main__":
    main()
