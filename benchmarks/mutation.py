"""Mutation check: ``nox -s mutation -- --sample 400`` writes benchmarks/results/mutation.json.

The share also goes to benchmarks/results/trust.json, with the number of mutants that it is of.

mutmut makes the mutants of ``l2a/kd``, ``l2a/generator`` and ``l2a/selector`` (its settings are in pyproject.toml) and
runs on each the fast tests that reach the changed function, until one fails. A sample is drawn by a seed, since all of
them would take a day. Outcomes are kept in the result under a hash of the function, so that the command continues where
it was stopped: changed functions are tried again and, once a test has changed, the mutants that no test noticed.
"""

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from trust import record

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "mutation.json"
OUTCOMES = {0: "survived", 1: "killed", 3: "killed", 5: "untested", 33: "untested", 24: "timeout", 36: "timeout"}
"""By mutmut's exit codes; whatever else ends the tests is a crash of theirs."""
UNNOTICED = ("survived", "untested")
AT_ONCE = 40


def tests_hash(folder: Path) -> str:
    """Identify the tests that try mutants, by their code."""
    folders = (folder, *(folder / name for name in ("kd", "generator", "selector")))
    files = sorted(path for each in folders for path in each.glob("*.py"))
    parts = (f"{path.relative_to(folder)}\n{path.read_text('utf-8')}" for path in files)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def run_mutmut(names: list[str]) -> None:
    """Try some mutants, tried before or not; mutmut makes them and maps tests to functions first, where needed."""
    copy = ROOT / "mutants" / "tests"
    if tests_hash(copy) != tests_hash(ROOT / "tests"):  # mutmut maps new tests, but not those that were changed
        shutil.rmtree(copy, ignore_errors=True)
        (ROOT / "mutants" / "mutmut-stats.json").unlink(missing_ok=True)
    for path in (ROOT / "mutants" / "l2a").rglob("*.meta"):  # so that no outcome is an earlier one
        meta = json.loads(path.read_text("utf-8"))
        meta["exit_code_by_key"] |= dict.fromkeys(meta["exit_code_by_key"].keys() & set(names))
        path.write_text(json.dumps(meta, indent=4), "utf-8")
    subprocess.run([sys.executable, "-m", "mutmut", "run", "--max-children", "1", *names], cwd=ROOT, check=False)


def known_mutants() -> dict[str, tuple[str, int | None]]:
    """List every mutant with the hash of its function and mutmut's exit code."""
    found = {}
    for path in sorted((ROOT / "mutants" / "l2a").rglob("*.meta")):
        meta = json.loads(path.read_text("utf-8"))
        module = ".".join(path.relative_to(ROOT / "mutants").with_suffix("").with_suffix("").parts)
        for name, code in meta["exit_code_by_key"].items():
            function = name.removeprefix(f"{module}.").rpartition("__mutmut_")[0]
            found[name] = (meta["hash_by_function_name"].get(function, ""), code)
    return found


def summary(outcomes: dict[str, dict[str, str]], seed: int) -> dict[str, Any]:
    """Say what share of the mutants the tests noticed, in all and by module."""
    modules: dict[str, dict[str, int]] = {}
    for name, facts in outcomes.items():
        counts = modules.setdefault(name.rpartition(".")[0], {"noticed": 0, "mutants": 0})
        counts["noticed"] += facts["outcome"] not in UNNOTICED
        counts["mutants"] += 1
    noticed = sum(counts["noticed"] for counts in modules.values())
    left = sorted(name for name, facts in outcomes.items() if facts["outcome"] in UNNOTICED)
    share = round(noticed / max(1, len(outcomes)), 4)
    facts = {"killed_share": share, "sample": len(outcomes), "seed": seed, "modules": dict(sorted(modules.items()))}
    return {**facts, "survived": left, "mutants": outcomes}


def main() -> None:
    """Draw mutants, try those without an outcome, and write the result after every few."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=400, help="mutants in all")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after this time; run again to go on")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    run_mutmut(["l2a.kd.losses.x_soft_label_loss__mutmut_1"])  # makes all mutants and maps the tests
    every = known_mutants()
    if not every:
        sys.exit("mutmut made no mutants; read what it says above")
    chosen = random.Random(options.seed).sample(sorted(every), min(options.sample, len(every)))
    old = json.loads(options.output.read_text("utf-8"))["mutants"] if options.output.exists() else {}
    outcomes = {name: old[name] for name in chosen if name in old and old[name]["function"] == every[name][0]}
    tests = tests_hash(ROOT / "tests")
    passed = {name for name, facts in outcomes.items() if facts["outcome"] in UNNOTICED and facts.get("tests") != tests}
    todo = [name for name in chosen if name not in outcomes or name in passed]
    for start in range(0, len(todo), AT_ONCE):
        if time.monotonic() > deadline:
            break
        names = todo[start : start + AT_ONCE]
        run_mutmut(names)
        every = known_mutants()
        if any(every[name][1] is None for name in names):
            sys.exit("mutmut did not try all of the mutants it was given; read what it says above")
        for name in names:
            outcomes[name] = {"function": every[name][0], "outcome": OUTCOMES.get(every[name][1], "crashed")}
            if outcomes[name]["outcome"] in UNNOTICED:
                outcomes[name]["tests"] = tests  # to be tried again when they change
        found = summary(outcomes, options.seed)
        options.output.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        if options.output == RESULT:  # others are trials
            record(killed_share=found["killed_share"], mutants=found["sample"])
        print(f"{start + len(names)} of {len(todo)} tried, {len(outcomes)} known", flush=True)


if __name__ == "__main__":
    main()
