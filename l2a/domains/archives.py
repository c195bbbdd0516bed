"""Unpacking wheels and sdists that nobody has looked into: plain files only, inside one folder, within size limits."""

import fnmatch
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from l2a.errors import RunError

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
