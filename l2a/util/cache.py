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

from l2a.util.files import atomic_folder, atomic_write_text, full_disk_as_run_error, sha256_file

MANIFEST = "manifest.json"
logger = logging.getLogger(__name__)

Hashable = Any  # str, bytes, numbers, None, numpy arrays, and lists, tuples or mappings of these


def cache_root() -> Path:
    """Locate the user's cache folder: the L2A_CACHE variable, else the platform's usual place.

    Returns:
        The folder, which may not exist yet.
    """
    override = os.environ.get("L2A_CACHE")
    return Path(override).expanduser() if override else Path(user_cache_path("l2a"))


def fingerprint(*parts: Hashable) -> str:
    """Hash values by content: equal values give equal fingerprints in every process and on every machine.

    Args:
        *parts: Strings, bytes, numbers, None, numpy arrays, and lists or mappings of these.

    Returns:
        32 hexadecimal digits (the first half of a sha256).
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

    Two processes that want one entry at the same time build it once: the second waits.

    Args:
        kind: What the entry holds, such as "teachers"; one folder each.
        key: A fingerprint of everything that decides the content.
        build: Writes the entry's files into the folder it is given.

    Returns:
        The folder with the files, all checked against the manifest of the build.

    Raises:
        RunError: If the disk is full.
    """
    folder = cache_root() / kind / key
    with full_disk_as_run_error(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{key}.lock"):
            if folder.exists() and not _is_intact(folder):
                logger.warning("cache entry %s is damaged and is built again", folder)
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
