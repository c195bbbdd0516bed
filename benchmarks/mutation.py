"""Mutation check: ``nox -s mutation -- --sample 400`` writes benchmarks/results/mutation.json.

The share also goes to benchmarks/results/trust.json, with the number of mutants that it is of.

mutmut makes the mutants of ``l2a/kd``, ``l2a/generator`` and ``l2a/selector`` (its settings are in pyproject.toml) and
runs on each the fast tests that reach the changed function, until one fails. A sample is drawn by a seed, since all of
them would take a day. Outcomes are kept in ``mutants/`` and in the result under a hash of the function, so that the
command goes on where it was stopped and only changed functions are tried again.
"""

import argparse
import json
import random
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
AT_ONCE = 40


def run_mutmut(names: list[str]) -> None:
    """Try some mutants; mutmut makes them and maps tests to functions first, where that is not done yet."""
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
        counts["noticed"] += facts["outcome"] not in ("survived", "untested")
        counts["mutants"] += 1
    noticed = sum(counts["noticed"] for counts in modules.values())
    left = sorted(name for name, facts in outcomes.items() if facts["outcome"] in ("survived", "untested"))
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
    while (left := [name for name in chosen if name not in outcomes][:AT_ONCE]) and time.monotonic() < deadline:
        run_mutmut([name for name in left if every[name][1] is None])
        every = known_mutants()
        for name in left:
            function, code = every[name]
            outcome = "crashed" if code is None else OUTCOMES.get(code, "crashed")
            outcomes[name] = {"function": function, "outcome": outcome}
        found = summary(outcomes, options.seed)
        options.output.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        if options.output == RESULT:  # others are trials
            record(killed_share=found["killed_share"], mutants=found["sample"])
        print(f"{len(outcomes)} of {len(chosen)} tried", flush=True)


if __name__ == "__main__":
    main()
