"""Content-addressed cache folders: built once, checked on every use, safe between processes."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from platformdirs import user_cache_path

from l2a.util.errors import RunError, UsageError, os_error_sentence, os_errors_as_run_error
from l2a.util.files import NEW, atomic_folder, atomic_write_text, sha256_file

MANIFEST = "manifest.json"
logger = logging.getLogger(__name__)

Hashable = Any  # str, bytes, numbers, None, numpy arrays, and lists, tuples or mappings of these


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
                    _write_manifest(temporary)
    return folder


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {str(path.relative_to(folder)): sha256_file(path) for path in files}
    atomic_write_text(folder / MANIFEST, json.dumps(sums, indent=1))


def _is_intact(folder: Path) -> bool:
    try:
        sums = json.loads((folder / MANIFEST).read_text("utf-8"))
        return all(sha256_file(folder / name) == expected for name, expected in sums.items())
    except (OSError, ValueError, AttributeError):
        return False


def cache_sizes() -> dict[str, tuple[int, int]]:
    """Measure what the cache holds.

    Returns:
        For each kind of entry their number and their size in bytes.
    """
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
    unknown = [kind for kind in kinds if kind not in sizes]
    if unknown:
        raise UsageError(f"cache: there is no kind {unknown[0]!r}; it holds {', '.join(sizes) or 'nothing'}")
    for kind in kinds or tuple(sizes):
        shutil.rmtree(cache_root() / kind, ignore_errors=True)
    return sum(sizes[kind][1] for kind in kinds or sizes)
