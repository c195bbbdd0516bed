"""Errors that a user can act on: each names the field, the value, what is allowed and the fix; and warnings."""

import contextlib
import difflib
import errno
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

logger = logging.getLogger("l2a")
"""What the package warns of; ``Progress`` takes it while a run is on."""


class UsageError(ValueError):
    """The request is wrong: bad options, a bad configuration or a bad input file (exit code 2)."""


class RunError(ValueError):
    """The request was fine but the run failed: no network, a full disk, a diverged loss (exit code 1)."""


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """Suggest the nearest allowed word: " (did you mean 'x'?)", or "" when nothing is close."""
    close = difflib.get_close_matches(word[:100], list(allowed), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


FIXES = {
    errno.ENOSPC: "the disk is full; free some space, or write to another disk (L2A_CACHE moves the cache)",
    errno.EDQUOT: "your disk quota is used up; free some space, or write to another disk (L2A_CACHE moves the cache)",
    errno.EROFS: "the disk is read-only; write to another one (L2A_CACHE moves the cache)",
    errno.EACCES: "permission denied; change its permissions, or write somewhere else (L2A_CACHE moves the cache)",
    errno.EPERM: "permission denied; change its permissions, or write somewhere else (L2A_CACHE moves the cache)",
    errno.ENOTDIR: "a part of the path is a file, not a folder; correct the path",
    errno.EISDIR: "it is a folder; name a file",
    errno.ENOENT: "no such file or folder; check the path",
    errno.EEXIST: "a file of that name exists; choose another name",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.EIO: "the disk reports an error; check the disk and run again",
    errno.EMFILE: "too many open files; raise the limit with `ulimit -n 4096`",
}
"""What a failed call to the system means to a user, and what helps."""


def os_error_sentence(error: OSError) -> str:
    """Say in one sentence what the system refused: the path where the error has one, the reason and the fix."""
    where = f"{error.filename}: " if error.filename is not None else ""
    return where + FIXES.get(error.errno or 0, f"{error.strerror or error}; check the path and the disk")


DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make the parents of a path that is written, and tell in one sentence what the system refuses meanwhile.

    Args:
        path: The file or folder that is written; errors that speak of files elsewhere pass.

    Raises:
        RunError: If the system refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        shown = str(path if error.filename is None else error.filename)
        if error.errno not in DISK and not shown.startswith(str(path.parent)):
            raise
        raise RunError(f"cannot write {os_error_sentence(OSError(error.errno, error.strerror, shown))}") from error
