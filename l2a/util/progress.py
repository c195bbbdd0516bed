"""Progress of a run: rich bars on a terminal, silence elsewhere, a JSON line for every event, and its warnings."""

import contextlib
import copy
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from l2a.util.files import Checkpoint, to_json

Advance = Callable[[int], None]


def process_rank() -> int:
    """Return this process's number, 0 for the one that speaks and writes the results."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """Return how many processes train together, as the launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Progress(logging.Handler):
    """Progress of one run: bars on stderr when it is a terminal, JSON lines in a log file, seconds by stage.

    Inside its ``with`` block it takes every warning that a module of l2a logs: all go to the screen, even of a quiet
    run, to the log file and to ``warnings``, once each.

    Attributes:
        warnings: What was warned of so far.
        seconds_by_stage: Wall seconds spent in each outermost stage.
        checkpoint: Where long stages keep what they need to go on; None where nothing is kept.
    """

    checkpoint: Checkpoint | None = None

    def __init__(self, log_file: Path | None = None, verbosity: int = 0) -> None:
        """Start a run.

        Args:
            log_file: JSON lines go here; None for no log.
            verbosity: -1 shows nothing, 0 stages, 1 also events.
        """
        super().__init__(logging.WARNING)
        self.warnings, self.seconds_by_stage = list[str](), dict[str, float]()
        self._started, self._depth, self._verbosity = time.monotonic(), 0, verbosity
        self._log = log_file.open("a", encoding="utf-8") if log_file else None
        self._bars = _make_bars() if verbosity >= 0 and sys.stderr.isatty() else None

    def __enter__(self) -> Self:
        """Start to take warnings; the end of the block closes bars and log."""
        logging.getLogger("l2a").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the bars and close the log."""
        logging.getLogger("l2a").removeHandler(self)
        if self._bars:
            self._bars.stop()
        if self._log:
            self._log.close()

    def keeping(self, checkpoint: Checkpoint | None) -> "Progress":
        """Return the same progress, whose stages keep their state in a checkpoint, or nothing."""
        copied = copy.copy(self)
        copied.checkpoint = checkpoint
        return copied

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """Time a stage and show its bar.

        Args:
            name: Shown to the user and used in ``seconds_by_stage``.
            total: Units of work, or None when unknown.

        Yields:
            A function that advances the bar by a number of units.
        """
        task = self._bars.add_task(name, total=total) if self._bars else None
        started, self._depth = time.monotonic(), self._depth + 1
        try:
            yield lambda amount: self._bars.advance(task, amount) if self._bars else None
        finally:
            self._depth -= 1
            seconds = time.monotonic() - started
            if self._depth == 0:
                self.seconds_by_stage[name] = self.seconds_by_stage.get(name, 0.0) + seconds
            self.event("stage", stage=name, seconds=round(seconds, 3))
            if self._bars:
                self._bars.update(task, total=total or 1, completed=total or 1, visible=self._depth == 0)

    def whole(self, name: str, total: int) -> Advance:
        """Show a bar above the stages, with how many parts of the run are done and about how long the rest takes."""
        task = self._bars.add_task(name, total=total) if self._bars else None
        return lambda amount: self._bars.advance(task, amount) if self._bars else None

    def emit(self, record: logging.LogRecord) -> None:
        """Take a warning, unless it was given before."""
        sentence = record.getMessage()
        if sentence not in self.warnings:
            self.warnings.append(sentence)
            self.event("warning", sentence=sentence)
            self._show(f"warning: {sentence}")

    def event(self, name: str, **values: Any) -> None:
        """Append one JSON line to the log, and show it when verbose."""
        if self._log:
            line = {"seconds": round(time.monotonic() - self._started, 3), "event": name, **values}
            self._log.write(to_json(line) + "\n")
            self._log.flush()
        if self._verbosity > 0 and name not in ("stage", "warning"):
            self.say(f"{name}: {' '.join(f'{key}={value}' for key, value in values.items())}")

    def say(self, sentence: str) -> None:
        """Show a sentence on the console that the bars are on, unless the run is quiet."""
        if self._verbosity >= 0:
            self._show(sentence)

    def _show(self, sentence: str) -> None:
        if self._bars:
            self._bars.console.print(sentence, markup=False, highlight=False, soft_wrap=True)
        else:
            sys.stderr.write(f"{sentence}\n")


SILENT = Progress(verbosity=-1)


def _make_bars() -> Any:
    from rich import console, progress

    columns = (progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeElapsedColumn())
    left = progress.TimeRemainingColumn()
    # Speeds are means over an hour, so that parts that take minutes have one.
    screen = console.Console(stderr=True)
    bars = progress.Progress("{task.description}", *columns, left, console=screen, speed_estimate_period=3600)
    bars.start()
    return bars
