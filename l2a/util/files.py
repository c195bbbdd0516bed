"""JSON that any reader accepts: numbers of numpy become plain ones, nan and infinities become null."""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from l2a.util.errors import RunError, UsageError


def to_json(content: Any, indent: int | None = None) -> str:
    """Write plain data as strict JSON.

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


@contextlib.contextmanager
def full_disk_as_run_error(path: Path) -> Iterator[None]:
    """Turn 'no space left' into one sentence that names the path and the fix.

    Args:
        path: The file or folder being written.

    Raises:
        RunError: If the disk or the quota is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(
                f"cannot write {path}: the disk is full; free some space or point --output-dir "
                "or the L2A_CACHE variable to another disk"
            ) from error
        raise


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write a file in one step: readers see the old content or the new one, never a part.

    Args:
        path: Destination; its parent folder is created.
        data: The whole content.

    Raises:
        RunError: If the disk is full; nothing is left behind.
    """
    with full_disk_as_run_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp makes files private; results are meant to be shared
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def atomic_write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file in one step.

    Args:
        path: Destination; its parent folder is created.
        text: The whole content.

    Raises:
        RunError: If the disk is full; nothing is left behind.
    """
    atomic_write_bytes(path, text.encode("utf-8"))


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Fill a temporary sibling folder that takes the final name only on success.

    Args:
        path: Final folder; an existing one is replaced.

    Yields:
        The temporary folder to write into.

    Raises:
        RunError: If the disk is full; nothing is left behind.
    """
    with full_disk_as_run_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            yield temporary
            os.chmod(temporary, 0o755)
            _replace_folder(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextlib.contextmanager
def discarded_folder() -> Iterator[Path]:
    """Give a folder that is gone afterwards.

    Yields:
        An empty folder.
    """
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def refuse_overwriting(folder: Path, mark: str, content: str, overwrite: bool) -> None:
    """Stop before work whose results would replace what the user may want to keep.

    Args:
        folder: Where the results are to go.
        mark: A file that only a folder of such results holds.
        content: What such a folder holds, for the message.
        overwrite: Whether the user allows to replace it.

    Raises:
        UsageError: If the path is a file, the folder holds anything else, or it holds such results and may not be
            replaced.
    """
    if folder.is_file():
        raise UsageError(f"--output-dir {folder}: a file has that name; give a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / mark).exists():
        raise UsageError(f"--output-dir {folder}: it holds other files; give an empty or a new folder")
    if not overwrite:
        raise UsageError(f"--output-dir {folder}: it holds {content}; add --overwrite to replace it")


def restore_folder(path: Path) -> None:
    """Clean up after a process that was killed inside ``atomic_folder``: the last whole folder is put back.

    Only for folders that no other process writes at the same time.

    Args:
        path: The folder's final name.
    """
    for old in path.parent.glob(f".{path.name}.old.*"):
        if not path.exists() and any(old.iterdir()):
            os.replace(old, path)
    for left in path.parent.glob(f".{path.name}.*"):
        shutil.rmtree(left, ignore_errors=True)


def _replace_folder(temporary: Path, path: Path) -> None:
    if not path.exists():
        os.replace(temporary, path)
        return
    # A folder cannot be replaced in one call: move the old one aside first, so that a crash loses neither.
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
    try:
        os.replace(path, old)
    except OSError:  # a mount point or a busy folder cannot be renamed: replace what is in it
        old.rmdir()
        _replace_content(temporary, path)
        return
    try:
        os.replace(temporary, path)
    except BaseException:
        os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _replace_content(temporary: Path, path: Path) -> None:
    for child in path.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()
    shutil.copytree(temporary, path, dirs_exist_ok=True)
    shutil.rmtree(temporary)


def sha256_file(path: Path) -> str:
    """Hash a file without reading it into memory at once.

    Args:
        path: An existing file.

    Returns:
        The sha256 as 64 hexadecimal digits.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
