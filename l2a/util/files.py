"""Files written whole or not at all, output folders that hold nothing but what a run wrote, and the cache.

An output folder carries a mark, ``l2a.json``, that lists its files. A run's results lie in a hidden folder inside
until its end; then the older run's files step aside, the new ones take their places, and the mark comes last, so that
a kill at any moment leaves either the old run or the new one, whole. Cache folders are checked on every use.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from l2a.util.errors import RunError, UsageError, os_error_sentence, os_errors_as_run_error

MARK = "l2a.json"
MARK_FORMAT = 1
LOCK = ".l2a.lock"
NAMES = ".l2a-names.json"
NEW, OLD = ".l2a-new.", ".l2a-old."
LOG, FAILED_LOG = "log.jsonl", "failed.log.jsonl"
MANIFEST = "manifest.json"
Hashable = Any  # str, bytes, numbers, None, numpy arrays, and lists, tuples or mappings of these

logger = logging.getLogger(__name__)


def to_json(content: Any, indent: int | None = None) -> str:
    """Write plain data as strict JSON: numpy's numbers become plain ones, nan and infinities become null.

    Args:
        content: Mappings, sequences, strings, numbers, booleans, None, and numpy's scalars.
        indent: Spaces a level, or None for one line.

    Returns:
        The text, without a final newline.
    """
    return json.dumps(_plain(content), indent=indent, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def sha256_file(path: Path) -> str:
    """Hash a file without reading it into memory at once, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Write a file in one step: readers see the old content or the new one, never a part.

    Args:
        path: The file; missing parent folders are made.

    Yields:
        A file of another name, which takes the final one only on success.

    Raises:
        RunError: If the system refuses, such as when the disk is full; the old file is untouched then.
    """
    with os_errors_as_run_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}{NEW}")
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp makes files private; results are meant to be shared
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write a file in one step; see ``atomic_file``."""
    with atomic_file(path) as file:
        file.write(data)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file in one step; see ``atomic_file``."""
    atomic_write_bytes(path, text.encode("utf-8"))


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Fill a temporary folder beside, which takes the place of a folder of our own only on success.

    One process at a time may write a path. ``restore_folder`` cleans up after a kill.

    Args:
        path: The final folder.

    Yields:
        The folder to fill.

    Raises:
        RunError: If the system refuses; the old folder is untouched then.
    """
    with os_errors_as_run_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}{NEW}"))
        old = Path(str(temporary).replace(NEW, OLD))
        try:
            yield temporary
            os.chmod(temporary, 0o755)
            if path.exists():  # no call replaces a folder that is not empty: the old one steps aside first
                os.replace(path, old)
            os.replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            if old.exists() and not path.exists():
                os.replace(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)


def restore_folder(path: Path) -> None:
    """Clean up after a process that was killed inside ``atomic_folder``: the last whole folder is put back."""
    for old in path.parent.glob(f".{path.name}{OLD}*"):
        if not path.exists():
            os.replace(old, path)
    for left in (*path.parent.glob(f".{path.name}{NEW}*"), *path.parent.glob(f".{path.name}{OLD}*")):
        shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def output_folder(path: Path, kind: str, overwrite: bool = False) -> Iterator[Path]:
    """Give a folder to fill, whose files move into the output folder together once the block ends well.

    Only what an earlier run wrote is ever replaced; other files of the user stay. After a failure the folder is as
    it was, but for the log of the failed run; a request that is refused leaves nothing.

    Args:
        path: The output folder; it is made where it is missing.
        kind: What is written, such as "run" or "policy"; the mark keeps it.
        overwrite: Whether an older result of the same kind may be replaced.

    Yields:
        The folder to fill.

    Raises:
        UsageError: If the path is a file, holds files that are not ours, or an older result without ``overwrite``.
        RunError: If the path cannot be written, or another process writes it now.
    """
    part = next((part for part in (path, *path.parents) if part.exists()), path)
    if part.exists() and not part.is_dir():
        raise UsageError(f"--output-dir {path}: {part} is a file; name a folder")
    is_new = not path.exists()
    with os_errors_as_run_error(path):
        path.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(path / LOCK, timeout=0):
                _recover(path)
                old = _refuse_foreign_content(path, kind, overwrite)
                staging = Path(tempfile.mkdtemp(dir=path, prefix=NEW))
                try:
                    yield staging
                    _install(staging, path, kind, old)
                except BaseException as error:
                    if (staging / LOG).exists() and not isinstance(error, UsageError):
                        os.replace(staging / LOG, path / FAILED_LOG)
                    raise
                finally:
                    shutil.rmtree(staging, ignore_errors=True)
        except Timeout as error:
            message = f"--output-dir {path}: another run is writing there; wait for it, or name another folder"
            raise RunError(message) from error
        finally:
            if is_new and [child.name for child in path.iterdir()] == [LOCK]:
                shutil.rmtree(path, ignore_errors=True)


def _refuse_foreign_content(path: Path, kind: str, overwrite: bool) -> list[str]:
    """Return the files that an older result of the same kind consists of."""
    present = [child.name for child in path.iterdir() if child.name not in (LOCK, FAILED_LOG)]
    if not present:
        return []
    mark = read_mark(path)
    if mark is None or mark.get("kind") != kind:
        shown = ", ".join(sorted(present)[:3])
        raise UsageError(f"--output-dir {path}: it holds other files ({shown}); name a new folder")
    if not overwrite:
        raise UsageError(f"--output-dir {path}: it holds a finished {kind}; add --overwrite to replace it")
    return list(mark["files"])


def read_mark(path: Path) -> dict[str, Any] | None:
    """Read an output folder's mark: "format", "kind" and "files" (path inside to sha256), or None without one."""
    try:
        mark = json.loads((path / MARK).read_text("utf-8"))
        return dict(mark) if mark["format"] == MARK_FORMAT and isinstance(mark["files"], dict) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _install(staging: Path, path: Path, kind: str, old: list[str]) -> None:
    hashes = _hashes(staging)
    names = list(hashes)
    if taken := [name for name in names if name not in old and (path / name).exists()]:
        raise RunError(f"--output-dir {path}: {taken[0]} exists but is not part of a {kind}; move it and run again")
    aside = Path(tempfile.mkdtemp(dir=path, prefix=OLD))
    _move([MARK, *old], path, aside)  # without its mark the old run is not taken for whole
    atomic_write_text(aside / NAMES, json.dumps(names))
    _move(names, staging, path)
    atomic_write_text(path / MARK, to_json({"format": MARK_FORMAT, "kind": kind, "files": hashes}, indent=1) + "\n")
    shutil.rmtree(aside, ignore_errors=True)
    for folder in sorted({parent for name in old for parent in Path(name).parents if parent != Path()}, reverse=True):
        with contextlib.suppress(OSError):  # not empty, or gone
            (path / folder).rmdir()
    (path / FAILED_LOG).unlink(missing_ok=True)


def _recover(path: Path) -> None:
    """Finish or take back what a killed process left half done."""
    for aside in path.glob(f"{OLD}*"):
        if not (path / MARK).exists():  # the new files were not yet whole: the old ones come back
            names = aside / NAMES
            for name in json.loads(names.read_text("utf-8")) if names.exists() else []:
                (path / name).unlink(missing_ok=True)
            _move([*(read_mark(aside) or {"files": []})["files"], MARK], aside, path)
        shutil.rmtree(aside, ignore_errors=True)
    for left in path.glob(f"{NEW}*"):
        shutil.rmtree(left, ignore_errors=True)
    for unfinished in path.glob(f".{MARK}{NEW}*"):
        unfinished.unlink()


def _move(names: list[str], source: Path, target: Path) -> None:
    for name in names:
        if (source / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(source / name, target / name)


@contextlib.contextmanager
def discarded_folder() -> Iterator[Path]:
    """Give a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def cache_root() -> Path:
    """Locate the user's cache folder: the L2A_CACHE variable, else the platform's usual place.

    Returns:
        The folder, made where it was missing.

    Raises:
        UsageError: If the variable names a file.
        RunError: If the folder cannot be made.
    """
    override = os.environ.get("L2A_CACHE")
    root = Path(override).expanduser() if override else Path(user_cache_path("l2a"))
    if root.exists() and not root.is_dir():
        raise UsageError(f"L2A_CACHE is {root}, a file; name a folder, or unset it")
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"the cache cannot be made: {os_error_sentence(error)}; or set L2A_CACHE to a folder") from error
    return root


def fingerprint(*parts: Hashable) -> str:
    """Hash values by content: equal values give equal fingerprints in every process and on every machine.

    Args:
        *parts: Strings, bytes, numbers, None, arrays, and lists, tuples or mappings with string keys of these.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.sha256()
    _update(digest, list(parts))
    return digest.hexdigest()[:32]


def _update(digest: "hashlib._Hash", value: Hashable) -> None:
    if isinstance(value, np.ndarray):
        digest.update(f"array{value.dtype.str}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, bytes):
        digest.update(f"bytes{len(value)}:".encode() + value)
    elif isinstance(value, list | tuple):
        digest.update(f"list{len(value)}:".encode())
        for item in value:
            _update(digest, item)
    elif isinstance(value, dict):
        _update(digest, [[key, value[key]] for key in sorted(value)])
    else:
        digest.update(f"{type(value).__name__}{json.dumps(value)};".encode())


def cached_folder(kind: str, key: str, build: Callable[[Path], None]) -> Path:
    """Return the cache entry for a key, building it first if it is missing or damaged.

    Args:
        kind: Folder of the cache, such as "teachers".
        key: Fingerprint of everything that decides the content.
        build: Fills an empty folder; whatever it leaves there is kept.

    Returns:
        The entry's folder; its files must not be changed.

    Raises:
        RunError: If the cache cannot be written.
    """
    folder = cache_root() / kind / key
    with os_errors_as_run_error(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{key}.lock"):
            for left in folder.parent.glob(f".{key}{NEW}*"):  # of a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            if folder.exists() and not _is_intact(folder):
                logger.warning("cache entry %s is damaged and is rebuilt", folder)
                shutil.rmtree(folder)
            if not folder.exists():
                with atomic_folder(folder) as temporary:
                    build(temporary)
                    atomic_write_text(temporary / MANIFEST, json.dumps(_hashes(temporary), indent=1))
    return folder


def _hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every file in a folder, by its path inside."""
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return {name: sha256_file(folder / name) for name in names}


def _is_intact(folder: Path) -> bool:
    try:
        sums = json.loads((folder / MANIFEST).read_text("utf-8"))
        return all(sha256_file(folder / name) == expected for name, expected in sums.items())
    except (OSError, ValueError, AttributeError):
        return False


def cache_sizes() -> dict[str, tuple[int, int]]:
    """Measure what the cache holds: for each kind of entry their number and their size in bytes."""
    sizes = {}
    for kind in sorted(path for path in cache_root().iterdir() if path.is_dir()):
        entries = [entry for entry in kind.iterdir() if not entry.name.startswith(".")]
        files = [file for entry in entries for file in (entry, *entry.rglob("*")) if file.is_file()]
        sizes[kind.name] = (len(entries), sum(file.stat().st_size for file in files))
    return sizes


def clear_cache(kinds: tuple[str, ...] = ()) -> int:
    """Remove cache entries; whatever a later run needs is fetched or computed again.

    Args:
        kinds: Kinds of entries to remove; none for all.

    Returns:
        Bytes freed.

    Raises:
        UsageError: If the cache holds no such kind.
    """
    sizes = cache_sizes()
    if unknown := [kind for kind in kinds if kind not in sizes]:
        raise UsageError(f"cache: there is no kind {unknown[0]!r}; it holds {', '.join(sizes) or 'nothing'}")
    for kind in kinds or tuple(sizes):
        shutil.rmtree(cache_root() / kind, ignore_errors=True)
    return sum(sizes[kind][1] for kind in kinds or sizes)
