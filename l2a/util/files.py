"""Files written whole or not at all, output folders that hold nothing but what a run wrote, and the cache.

An output folder carries a mark, ``l2a.json``, that lists its files. A run fills a hidden folder inside, which takes the
name ``READY`` once it is whole: from then on the new run counts, and a kill while its files take the places of the
older run's only leaves that to be done at the next look. Cache folders are checked on every use. What a run needs to go
on after a kill lies in a ``Checkpoint``, a hidden folder that goes when the run is finished.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path, PurePosixPath
from typing import IO, Any

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from l2a import __version__
from l2a.util.cards import PACKAGE
from l2a.util.errors import RunError, UsageError, logger, os_error_sentence, writing

MARK, LOCK = "l2a.json", ".l2a.lock"
NEW, READY = ".l2a-new.", ".l2a-ready"
OLD_MARK = ".l2a-old.json"  # in the ready folder
FAILED_LOG = "failed.log.jsonl"
CHECKPOINT = ".l2a-checkpoint"  # a folder, see Checkpoint
SAVE_SECONDS, SAVE_COST = 20.0, 0.02  # least time between two saves, and the share of the time that they may take
MANIFEST = "manifest.json"


def leads_out(name: str) -> bool:
    """Tell whether a relative path of unknown origin may lead out of the folder that it is meant for."""
    path = PurePosixPath(name)
    return not path.parts or path.is_absolute() or ".." in path.parts or not {*"\\:\0"}.isdisjoint(name)


def stays_inside(folder: Path, name: str) -> bool:
    """Tell whether a path of unknown origin stays in a folder, links that lie there included."""
    return not leads_out(name) and (folder / name).resolve().is_relative_to(folder.resolve())


def to_json(content: Any, indent: int | None = None) -> str:
    """Write plain data as strict JSON: numpy's numbers become plain ones, nan and infinities become null."""
    plain = json.loads(json.dumps(content, default=lambda number: number.item()), parse_constant=lambda name: None)
    return json.dumps(plain, indent=indent, ensure_ascii=False, allow_nan=False)


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
    with writing(path):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}{NEW}")
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
            _move(Path(temporary), path, 0o644)
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


def sync(*paths: Path) -> None:
    """Have files and folders on the disk, so that a power cut after a rename loses none of what was renamed."""
    for path in paths:
        with contextlib.suppress(*(() if path.is_file() else (OSError,))):  # not every system can do so with folders
            handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _move(temporary: Path, path: Path, mode: int) -> None:
    """Give what was filled its final place, as a whole and surely on the disk."""
    os.chmod(temporary, mode)  # temporary ones are private; results are meant to be shared
    sync(temporary, *temporary.rglob("*"))
    if temporary.is_dir() and path.exists():  # no call replaces a folder that is not empty
        shutil.rmtree(path)
    os.replace(temporary, path)
    sync(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside to fill, which takes the place of the final one only on success.

    Args:
        path: The final folder, which one process at a time may write; an older one is removed at the end.

    Raises:
        RunError: If the system refuses.
    """
    hidden = f".{path.name}{NEW}"
    with writing(path), tempfile.TemporaryDirectory(None, hidden, path.parent, ignore_cleanup_errors=True) as new:
        yield Path(new)
        _move(Path(new), path, 0o755)


@contextlib.contextmanager
def output_folder(path: Path, kind: str, overwrite: bool = False) -> Iterator[Path]:
    """Give a folder to fill, whose files move into the output folder together once the block ends well.

    Only what an earlier run wrote is ever replaced; other files of the user stay. After a failure the folder is as
    it was, but for the log of the failed run; a request that is refused leaves nothing.

    Args:
        path: The output folder.
        kind: What is written, such as "run" or "policy"; the mark keeps it.
        overwrite: Whether an older result of the same kind may be replaced.

    Raises:
        UsageError: If the path is a file, holds files that are not ours, or an older result without ``overwrite``.
        RunError: If the path cannot be written, or another process writes it now.
    """
    part = next((part for part in (path, *path.parents) if part.exists()), path)
    if part.exists() and not part.is_dir():
        raise UsageError(f"--output-dir {path}: {part} is a file; name a folder")
    is_new = not path.exists()
    with writing(path):
        try:
            with _locked(path, f"--output-dir {path}"):
                _finish(path)
                for left in path.glob(f"{NEW}*"):  # of a process that was killed
                    shutil.rmtree(left, ignore_errors=True)
                old = _refuse_foreign_content(path, kind, overwrite)
                with tempfile.TemporaryDirectory(None, NEW, path, ignore_cleanup_errors=True) as new:
                    staging = Path(new)
                    try:
                        yield staging
                        hashes = _hashes(staging)
                        kept = [name for name in hashes if name not in old and (path / name).exists()]
                        if taken := [*kept, *(name for name in hashes if not stays_inside(path, name))]:
                            foreign = f"--output-dir {path}: {taken[0]} exists but is not part of a {kind}"
                            raise RunError(f"{foreign}; move it and run again")
                        write_mark(staging, kind=kind, files=hashes)
                        _move(staging, path / READY, 0o755)
                        _finish(path)
                    except BaseException as error:
                        if (staging / "log.jsonl").exists() and not isinstance(error, UsageError):
                            os.replace(staging / "log.jsonl", path / FAILED_LOG)
                        raise
        finally:
            if is_new and [child.name for child in path.glob("*")] == [LOCK]:
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path, named: object) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK, timeout=0):
            yield
    except Timeout as error:
        raise RunError(f"{named}: another run is writing there; wait for it, or name another place") from error


def _refuse_foreign_content(path: Path, kind: str, overwrite: bool) -> dict[str, str]:
    """Return the files that an older result of the same kind consists of."""
    present = [child.name for child in path.iterdir() if child.name not in (LOCK, FAILED_LOG, CHECKPOINT)]
    mark = read_mark(path / MARK)
    if present and mark["kind"] != kind:
        shown = ", ".join(sorted(present)[:3])
        raise UsageError(f"--output-dir {path}: it holds other files ({shown}); name a new folder")
    if present and not overwrite:
        raise UsageError(f"--output-dir {path}: it holds a finished {kind}; add --overwrite to replace it")
    return dict(mark["files"])


def read_mark(file: Path) -> dict[str, Any]:
    """Read a mark: "kind", and "files" with their sha256; None and no files where there is none of this format.

    One that names files elsewhere is none: these files are removed when a new result takes the place of this one.
    """
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        mark = json.loads(file.read_text("utf-8"))
        known = mark["format"] == 1 and isinstance(mark["files"], dict)
        if known and all(stays_inside(file.parent, name) for name in mark["files"]):
            return {"kind": mark["kind"], "files": mark["files"]}
    return {"kind": None, "files": {}}


def write_mark(folder: Path, **content: Any) -> None:
    """Write a folder's mark in one step."""
    atomic_write_text(folder / MARK, to_json({"format": 1, **content}, indent=1) + "\n")


def add_to_folder(path: Path, name: str, data: bytes) -> None:
    """Add a file to a finished output folder, which has a mark, or replace it there; the mark then lists it.

    Raises:
        RunError: If the folder cannot be written, or another process writes it now.
    """
    with writing(path), _locked(path, path):
        atomic_write_bytes(path / name, data)
        mark = read_mark(path / MARK)
        write_mark(path, **mark | {"files": mark["files"] | {name: sha256_file(path / name)}})


def _finish(path: Path) -> None:
    """Put a whole result in the place of the older one; every step may be the last before a kill, and come again."""
    ready = path / READY
    if (ready / MARK).exists():
        if (path / CHECKPOINT).exists():
            shutil.rmtree(path / CHECKPOINT)
        if (path / MARK).exists():  # without its mark the old result is not taken for whole
            os.replace(path / MARK, ready / OLD_MARK)
        new, old = read_mark(ready / MARK)["files"], read_mark(ready / OLD_MARK)["files"]
        for name in sorted(old.keys() - new.keys()):
            (path / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty, or gone
                for folder in Path(name).parents[:-1]:
                    (path / folder).rmdir()
        for name in new:
            if (ready / name).exists():
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(ready / name, path / name)
        (path / FAILED_LOG).unlink(missing_ok=True)
        os.replace(ready / MARK, path / MARK)
    shutil.rmtree(ready, ignore_errors=True)


@cache
def code_fingerprint() -> str:
    """Hash the sources of the package, the same for the same files in any folder: which code made a result."""
    files = sorted(PACKAGE.rglob("*.py"))
    return fingerprint([[path.relative_to(PACKAGE).as_posix(), path.read_bytes()] for path in files])


class Checkpoint:
    """What a run needs to go on after a kill: files by key, in a folder that one process at a time uses.

    The name of a file has the hash of its content, so that a damaged one is never read. The mark holds the settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Open a checkpoint; the folder is made with the first file.

        Args:
            folder: Hidden, beside the results of the run.
            settings: All that decides the run, as JSON can hold it.

        Raises:
            UsageError: If the folder holds the state of a run with other settings or another version of this package.
        """
        self.folder, self._saved, self._cost = folder, time.monotonic(), 0.0
        self._mark = to_json({"l2a": f"{__version__} {code_fingerprint()[:12]}", **settings}, indent=1) + "\n"
        old = (folder / MARK).read_text("utf-8", "replace") if (folder / MARK).exists() else self._mark
        lines = itertools.zip_longest(old.splitlines(), self._mark.splitlines(), fillvalue="nothing")
        if different := [(one.strip(" ,"), other.strip(" ,")) for one, other in lines if one != other]:
            there, here = different[0]
            which, finish = f"with another setting ({there} there, {here} here)", "repeat its command to finish it"
            if there.startswith('"l2a"'):
                which, finish = "of another version of l2a", "finish it with that"
            raise UsageError(f"{folder} keeps an interrupted run {which}; {finish}, or delete the folder to start anew")

    def load(self, key: str) -> bytes | None:
        """Read the newest undamaged file of a key, whose stage begins now; None where there is none."""
        self._saved = time.monotonic()
        for path in sorted(self.folder.glob(f"{key}.*"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
            data = path.read_bytes()
            if path.stem == self._stem(key, data):
                return data
            logger.warning("%s is damaged and is left aside; that part of the run starts from an older state", path)
        return None

    def is_due(self, is_last: bool = False) -> bool:
        """Say whether it is time to save, which is sooner after the last step of a stage."""
        wait = max(SAVE_SECONDS, self._cost / SAVE_COST)
        return time.monotonic() - self._saved >= (wait / 4 if is_last else wait)

    def save(self, key: str, data: bytes, suffix: str = "safetensors") -> None:
        """Write the file of a key in one step, in place of the one before.

        Raises:
            RunError: If the system refuses; the file before is still there then.
        """
        started, name = time.monotonic(), f"{self._stem(key, data)}.{suffix}"
        if not (self.folder / MARK).exists():
            atomic_write_text(self.folder / MARK, self._mark)
        atomic_write_bytes(self.folder / name, data)
        self.drop(key, name)
        self._saved = time.monotonic()
        self._cost = self._saved - started

    def drop(self, keys: str, but: str = "") -> None:
        """Remove the files of keys, a pattern, but for one of a name; and what a kill left half written."""
        for path in (*self.folder.glob(f"{keys}.*"), *self.folder.glob(f".*{NEW}*")):
            if path.name != but:
                path.unlink()

    def _stem(self, key: str, data: bytes) -> str:
        return f"{key}.{fingerprint(self._mark, data)}"


class Growing:
    """What was made so far of one output file, in order, as a file of a checkpoint that only grows.

    Attributes:
        file: It; what a killed run has surely written is still there, to be read from the beginning.
        size: Its bytes.
    """

    def __init__(self, checkpoint: Checkpoint, file: IO[bytes]) -> None:
        """Cut a file, at its beginning and open to append, to what the checkpoint tells by size and checksum."""
        self._checkpoint, self.file, self._checksum = checkpoint, file, 0
        kept = json.loads(checkpoint.load("written") or "{}")
        while piece := file.read(min(1 << 20, kept.get("size", 0) - file.tell())):
            self._checksum = zlib.crc32(piece, self._checksum)
        if self._checksum != kept.get("crc32"):
            kept, self._checksum = {}, 0
        self.size = file.truncate(kept.get("size", 0))
        file.seek(0)

    def append(self, data: bytes) -> None:
        """Add what was made next, and save now and then."""
        self.size += self.file.write(data)
        self._checksum = zlib.crc32(data, self._checksum)
        if self._checkpoint.is_due():
            self.flush()
            self._checkpoint.save("written", to_json({"size": self.size, "crc32": self._checksum}).encode(), "json")

    def flush(self) -> None:
        """Have all of the file on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())


@contextlib.contextmanager
def growing(output: Path, settings: Mapping[str, Any]) -> Iterator[Growing]:
    """Hold what a killed run of the same settings has made of an output file, in a hidden folder beside.

    Args:
        output: The file, which the block writes at its end.
        settings: As ``Checkpoint`` takes them.

    Yields:
        What is there; it goes when the block ends well.

    Raises:
        UsageError: If there is the state of a run with other settings or another version of this package.
        RunError: If another process writes there, or the system refuses.
    """
    checkpoint = Checkpoint(output.with_name(f".{output.name}{CHECKPOINT}"), settings)
    folder = checkpoint.folder
    with writing(output), _locked(folder, output), (folder / "made").open("a+b") as file:
        for left in [path for path in output.parent.iterdir() if path.name.startswith(f".{output.name}{NEW}")]:
            left.unlink()  # of a process that was killed
        file.seek(0)
        try:
            yield Growing(checkpoint, file)
            (folder / MARK).unlink(missing_ok=True)
        finally:
            if not (folder / MARK).exists():
                shutil.rmtree(folder, ignore_errors=True)


def cache_root() -> Path:
    """Locate the user's cache folder, or make it: the L2A_CACHE variable, else the platform's usual place.

    Raises:
        UsageError: If the variable names a file.
        RunError: If the folder cannot be made.
    """
    root = Path(os.environ.get("L2A_CACHE") or user_cache_path("l2a")).expanduser()
    if root.exists() and not root.is_dir():
        raise UsageError(f"L2A_CACHE is {root}, a file; name a folder, or unset it")
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"the cache cannot be made: {os_error_sentence(error)}; or set L2A_CACHE to a folder") from error
    return root


def fingerprint(*parts: Any) -> str:
    """Hash values by content, to 32 hexadecimal digits, which equal values share in every process and on every machine.

    Args:
        *parts: Strings, bytes, numbers, None, arrays, and lists, tuples or mappings with string keys of these.
    """
    digest = hashlib.sha256()
    _update(digest, list(parts))
    return digest.hexdigest()[:32]


def _update(digest: "hashlib._Hash", value: Any) -> None:
    import numpy as np  # here, since the command line must start without it

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
    with writing(folder), FileLock(folder.parent / f".{key}.lock"):
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
    """Remove cache entries and count the bytes freed; whatever a later run needs is fetched or computed again.

    Args:
        kinds: Kinds of entries to remove; none for all.

    Raises:
        UsageError: If the cache holds no such kind.
    """
    sizes = cache_sizes()
    if unknown := [kind for kind in kinds if kind not in sizes]:
        raise UsageError(f"cache: there is no kind {unknown[0]!r}; it holds {', '.join(sizes) or 'nothing to clear'}")
    for kind in kinds or tuple(sizes):
        shutil.rmtree(cache_root() / kind, ignore_errors=True)
    return sum(sizes[kind][1] for kind in kinds or sizes)
