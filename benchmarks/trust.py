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


def start_tests(report: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Run tests in a process of their own, which writes their outcomes to a file."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def outcomes(report: Path) -> tuple[int, list[str]]:
    """Give how many tests there were, and the names of those that failed."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    return len(cases), [f"{case.get('classname')}::{case.get('name')}" for case in failed]


def properties() -> list[str]:
    """The test files with properties."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "\n@given(" in file.read_text("utf-8")]


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of atheris")
    parser.add_argument("--profile", default="nightly", help="of hypothesis: nightly, or quick")
    parser.add_argument("--also", type=Path, nargs="*", default=[], help="outputs of benchmarks/fuzz.py that count too")
    parser.add_argument("--coverage", type=Path, help="record the branches of a report of `coverage json` alone")
    options = parser.parse_args()
    if options.coverage:
        totals = json.loads(options.coverage.read_text("utf-8"))["totals"]
        record(branch_coverage=round(totals["covered_branches"] / totals["num_branches"], 4))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        command = [sys.executable, str(ROOT / "benchmarks" / "fuzz.py"), "--minutes", str(options.minutes)]
        fuzzing = subprocess.Popen([*command, "--output", str(folder)]) if options.minutes else None
        chosen = ["-m", "hypothesis and not slow", f"--hypothesis-profile={options.profile}"]
        with tempfile.TemporaryDirectory() as reports:
            refusals, examples = Path(reports) / "refusals.xml", Path(reports) / "examples.xml"
            tests = [start_tests(refusals, REFUSALS)]
            tests += [start_tests(examples, "--hypothesis-show-statistics", *chosen, *properties())]
            shown = [test.communicate()[0] for test in tests]
            bad_inputs, unclear = outcomes(refusals)
            failed = outcomes(examples)[1]
        if fuzzing:
            fuzzing.wait()
        fuzzed = [*([folder] if fuzzing else []), *options.also]
        found = [json.loads((one / "fuzz.json").read_text("utf-8")) for one in fuzzed]
    tried = sum(int(passed) + int(failing) for passed, failing in EXAMPLES.findall(shown[1]))
    crashes = [*failed, *(crash for one in found for crash in one["crashes"])]
    executions = sum(one["executions"] for one in found)
    record(
        bad_inputs=bad_inputs, unclear=len(unclear), fuzz_cases=executions + tried, crashes=len(crashes),
        hypothesis_examples=tried, atheris_executions=executions,
    )  # fmt: skip
    print("\n".join([*unclear, *crashes, RESULT.read_text("utf-8")]))
    sys.exit(bool(unclear or crashes))


if __name__ == "__main__":
    main()
