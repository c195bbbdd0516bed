"""Sentences a second of ``l2a augment`` with augpro_mix, and of the peers on the same file."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from l2a.data.domains import load_domain
from l2a.pipeline.augment import AugmentJob, augment_file
from l2a.util.progress import Advance

NO_WORDS = "RandomWordAug(substitute, '_')"
"""Measured, but no word comes in the place of another."""


class Stopwatch:
    """Times stages, and the steady part of the one that counts sentences: all batches after the first."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.steady: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """Time a stage."""
        started, marks = time.perf_counter(), []

        def advance(amount: int) -> None:
            if amount:
                marks.append((amount, time.perf_counter(), time.process_time()))

        yield advance
        self.seconds[name] = time.perf_counter() - started
        if len(marks) > 1:
            count = sum(amount for amount, _, _ in marks[1:])
            self.steady["per_second"] = count / (marks[-1][1] - marks[0][1])
            self.steady["per_cpu_second"] = count / (marks[-1][2] - marks[0][2])

    def event(self, name: str, **values: Any) -> None:
        """Ignore facts."""


def measure_augmenting(folder: Path, peers_python: str, smoke: bool) -> dict[str, Any]:
    """Measure everyone on the training texts of the shipped domain "movies", in turns.

    Args:
        folder: For the files.
        peers_python: Interpreter that has nlpaug and TextAttack.
        smoke: Few texts and one round.

    Returns:
        The two ratios, by processor time (everyone runs on one thread, and other work on the machine then matters
        less), and all that they are made of.
    """
    texts = [text[0].replace("\n", " ") for text in load_domain("movies").train.inputs]
    file = folder / "movies.txt"
    file.write_text("\n".join(texts[: 1000 if smoke else None]) + "\n", "utf-8")
    _write_stop_words(folder / "nltk")
    rounds, measured = 1 if smoke else 3, []
    peers = {}
    for library, count in (("nlpaug", 200 if smoke else 3000), ("textattack", 10 if smoke else 60)):
        measured.append(_measure_l2a(file, folder / "out.jsonl", copies=2 if smoke else 30))
        peers[library] = _measure_peer(library, file, folder / "nltk", peers_python, count, rounds)
    measured += [_measure_l2a(file, folder / "out.jsonl", copies=2 if smoke else 30) for _ in range(rounds - 1)]
    one_copy = _measure_l2a(file, folder / "out.jsonl", copies=1)
    best = max(measured, key=lambda one: float(one["per_cpu_second"]))
    fastest = {library: _fastest(found) for library, found in peers.items()}
    return {
        "l2a": {**best, "all_runs_per_second": [one["per_second"] for one in measured]},
        "l2a_one_copy": one_copy,
        "peers": peers,
        **{
            f"augment_speedup_{library}": {
                "value": best["per_cpu_second"] / found["per_cpu_second"],
                "by_wall_time": best["per_second"] / found["per_second"],
                "one_copy_with_tokenizing": one_copy["with_tokenizing_per_second"] / found["per_second"],
                "target": 50,
                "fastest_peer": name,
            }
            for library, (name, found) in fastest.items()
        },
    }


def _fastest(found: dict[str, Any]) -> tuple[str, dict[str, float]]:
    able = {name: rates for name, rates in found["augmenters"].items() if name != NO_WORDS}
    name = max(able, key=lambda one: able[one]["per_cpu_second"])
    return name, able[name]


def _measure_l2a(file: Path, output: Path, copies: int) -> dict[str, Any]:
    watch = Stopwatch()
    started = time.perf_counter()
    written = augment_file(AugmentJob(file, output, "augpro_mix", copies=copies, overwrite=True), watch)
    whole, busy = time.perf_counter() - started, watch.seconds["tokenize"] + watch.seconds["augment"]
    rates = watch.steady or {"per_second": written / busy, "per_cpu_second": written / busy}
    return {
        **rates,
        "sentences": written,
        "copies": copies,
        "one_off_seconds": {"load": whole - busy, "tokenize": watch.seconds["tokenize"]},
        "with_tokenizing_per_second": written / busy,
    }


def _measure_peer(library: str, file: Path, nltk: Path, python: str, texts: int, rounds: int) -> dict[str, Any]:
    script = Path(__file__).with_name("peers.py")
    command = [python, str(script), library, str(file), "--texts", str(texts), "--rounds", str(rounds)]
    done = subprocess.run([*command, "--nltk", str(nltk)], capture_output=True, text=True, timeout=280, check=False)
    if done.returncode:
        sys.exit(f"{library}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _write_stop_words(folder: Path) -> None:
    """NLTK would download a list; TextAttack asks for one before it changes anything."""
    path = folder / "corpora" / "stopwords" / "english"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(sorted(ENGLISH_STOP_WORDS)) + "\n")
