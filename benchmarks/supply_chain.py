"""Licences and known vulnerabilities of what requirements.lock names: ``nox -s licences`` and ``nox -s audit``."""

import json
import re
import subprocess
import sys
from pathlib import Path

from trust import record

ROOT = Path(__file__).parents[1]
LOCK, PAGE = ROOT / "requirements.lock", ROOT / "docs" / "licences.md"
INTRODUCTION = """\
# Licences

The packages that `requirements.lock` names, with the licence that each states, as `nox -s licences` found them with
pip-licenses. l2a is distributed under the MIT licence and contains none of them.

| package | version | licence |
| --- | --- | --- |
"""


def write_licences() -> None:
    """Write docs/licences.md from what is installed here."""
    locked = re.findall(r"^([a-z0-9][a-z0-9.-]*)==(\S+)", LOCK.read_text("utf-8"), re.MULTILINE)
    found = json.loads(_run("piplicenses", "--format=json", "--with-system").stdout)
    licence = {re.sub("[-_.]+", "-", row["Name"]).lower(): row["License"] for row in found}
    rows = [
        f"| {name} | {version} | {' '.join(licence[name].split())[:80]} |\n"
        for name, version in locked
        if name in licence
    ]
    absent = ", ".join(name for name, _ in locked if name not in licence)
    note = f"\nNot installed where this page was made: {absent}.\n" if absent else ""
    PAGE.write_text(INTRODUCTION + "".join(rows) + note, "utf-8")
    print(f"{len(rows)} licences: {PAGE}")


def audit() -> int:
    """Look known vulnerabilities up and record their number, or why it is unknown; 0 only if there is none."""
    options = ("--strict", "--require-hashes", "--disable-pip", "--progress-spinner=off", "--format=json")
    done = _run("pip_audit", *options, "-r", str(LOCK))
    if not done.stdout.strip():
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1].split("_cli:")[-1]
        record(known_vulnerabilities=None, known_vulnerabilities_reason=reason)
        print(f"not audited: {reason}")
        return 2
    found = [(each["name"], bug["id"]) for each in json.loads(done.stdout)["dependencies"] for bug in each["vulns"]]
    record(known_vulnerabilities=len(found), known_vulnerabilities_reason="")
    print(f"{len(found)} known vulnerabilities {found}")
    return int(bool(found) or done.returncode != 0)


def _run(module: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", module, *options], capture_output=True, text=True)


if __name__ == "__main__":
    sys.exit(audit() if sys.argv[1:] == ["audit"] else write_licences())
