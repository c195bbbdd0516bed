"""Fuzzing: ``nox -s fuzz`` feeds damaged and hostile bytes to everything that reads a file.

``python benchmarks/fuzz.py --minutes 10`` lets atheris search from tests/corpus for inputs that raise anything but a
``UsageError`` or ``RunError``, or that write outside their folder. The tests replay the inputs of tests/corpus.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

instrumented: Any = contextlib.nullcontext()
if __name__ == "__main__":  # the tests replay inputs without it
    import atheris

    instrumented = atheris.instrument_imports(["l2a.util", "l2a.config", "l2a.data", "l2a.selector", "yaml", "zipfile"])
with instrumented:
    from l2a.config import load_config
    from l2a.data import domains, fetch, readers
    from l2a.selector import agents
    from l2a.util import files
    from l2a.util.errors import RunError, UsageError

CORPUS = Path(__file__).parents[1] / "tests" / "corpus"
MEMORY = "/dev/shm"  # no disk is waited for
PACKINGS = ("", ".gz", ".xz", ".bz2")


def read_file(data: bytes, folder: Path) -> None:
    """Read bytes as a data file of the format that the first one says, as a domain and as unlabelled texts."""
    kind, packing = divmod(data[0] if data else 0, 4)
    path = folder / f"data{readers.FORMATS[kind % len(readers.FORMATS)]}{PACKINGS[packing]}"
    path.write_bytes(data[1:])
    table = readers.read_table(path, readers.FORMATS)
    rows, problems = readers.check_table(table, readers.USUAL_COLUMNS)
    domain = domains.with_splits("data", rows, problems, {})
    assert all(isinstance(text, str) for row in domain.rows for text in row.text)
    domains.to_domain(domain, path)


def read_card(data: bytes, folder: Path) -> None:
    """Read bytes as a card of the kind that the first one says, found by its name in the working directory."""
    kind = ("agents", "domains", "configs")[(data[0] if data else 0) % 3]
    (folder / kind).mkdir()
    (folder / kind / "mine.yaml").write_bytes(data[1:])
    if kind == "agents":
        card = agents.load_agent("mine")
        assert card.rule or card.policy or card.algorithm.split(".")[0] in agents.PACKAGES
    elif kind == "domains":
        domains.load_card("mine")
    else:
        load_config("mine")


def read_config(data: bytes, folder: Path) -> None:
    """Read bytes as a file that overrides a preset."""
    (folder / "mine.yaml").write_bytes(data)
    load_config("fast", folder / "mine.yaml")


def unpack(data: bytes, folder: Path) -> None:
    """Unpack all members of an archive; whatever comes of it lies in the folder named for it."""
    (folder / "archive").write_bytes(data)
    (folder / "out").mkdir()
    try:
        fetch.unpack(folder / "archive", ("*",), folder / "out")
    finally:
        assert {path.name for path in folder.iterdir()} == {"archive", "out"}
        assert not any(path.is_symlink() for path in folder.rglob("*"))


def read_mark(data: bytes, folder: Path) -> None:
    """Start to write where bytes are taken for the mark of an older result and of one that is to replace it."""
    (folder / "beside").write_text("mine")
    output = folder / "output"
    (output / files.READY).mkdir(parents=True)
    for place in (output, output / files.READY):
        (place / files.MARK).write_bytes(data)
    try:
        with files.output_folder(output, "run", overwrite=True):
            pass
    finally:
        assert (folder / "beside").read_text() == "mine"


TARGETS: Mapping[str, Callable[[bytes, Path], None]] = {
    "files": read_file, "cards": read_card, "configs": read_config, "archives": unpack, "marks": read_mark,
}  # fmt: skip


def attempt(target: str, data: bytes) -> None:
    """Run a target on an input in a fresh working directory.

    Raises:
        Exception: Whatever is no clear refusal.
    """
    before = os.getcwd()
    with tempfile.TemporaryDirectory(dir=MEMORY if os.path.isdir(MEMORY) else None) as folder:
        os.chdir(folder)
        try:
            TARGETS[target](data, Path(folder))
        except (UsageError, RunError) as error:
            assert str(error).strip(), "an empty message"
            assert len(str(error)) < 5000, f"{len(str(error))} characters are no sentence"
        finally:
            os.chdir(before)


def fuzz(seconds: float, output: Path) -> None:
    """Search for crashes; each is kept once by where it arose, and the counts are written at the end."""
    logging.disable(logging.CRITICAL)
    names, counts, crashes, end = list(TARGETS), dict.fromkeys(TARGETS, 0), dict[str, str](), time.monotonic() + seconds
    seeds = output / "seeds"
    shutil.rmtree(output, ignore_errors=True)
    for number, name in enumerate(names):
        for path in sorted((CORPUS / name).iterdir()):
            seeds.mkdir(parents=True, exist_ok=True)
            (seeds / f"{name}-{path.name}").write_bytes(bytes([number]) + path.read_bytes())

    def one(data: bytes) -> None:
        if time.monotonic() > end:
            summary = {"executions": sum(counts.values()), "by_target": counts, "crashes": list(crashes.values())}
            (output / "fuzz.json").write_text(json.dumps(summary, indent=1) + "\n")
            os._exit(0)
        name = names[(data[0] if data else 0) % len(names)]
        counts[name] += 1
        try:
            attempt(name, data[1:])
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{type(error).__name__} at {last.filename}:{last.lineno}"
            if place not in crashes:
                crashes[place] = f"{name}: {place}: {str(error)[:200]}"
                print(crashes[place], flush=True)
                (output / f"crash-{name}-{hashlib.sha256(data).hexdigest()[:12]}").write_bytes(data[1:])

    atheris.Setup([sys.argv[0], "-max_len=4096", "-timeout=60", "-rss_limit_mb=4096", "-verbosity=0", str(seeds)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--output", type=Path, default=Path(tempfile.gettempdir()) / "l2a-fuzz", help="it is emptied")
    options = parser.parse_args()
    fuzz(60 * options.minutes, options.output)
