"""Progress of a run: rich bars on a terminal, silence elsewhere, and a JSON line for every event."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from l2a.util.files import to_json


def silence_transformers() -> None:
    """Switch off the progress bars and the warnings about fresh heads that transformers prints while it loads."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]


Advance = Callable[[int], None]


class Progress(Protocol):
    """What library functions need to tell how far they are."""

    def stage(self, name: str, total: int | None = None) -> contextlib.AbstractContextManager[Advance]:
        """Open a named stage; the context gives a function that advances it by n units."""

    def event(self, name: str, **values: Any) -> None:
        """Record a fact about the run, such as a validation accuracy."""

    def say(self, sentence: str) -> None:
        """Tell the user something, above the bars."""


class _Silent:
    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        yield lambda amount: None

    def event(self, name: str, **values: Any) -> None:
        return None

    def say(self, sentence: str) -> None:
        return None


SILENT: Progress = _Silent()


class RunProgress:
    """Progress of one run: bars on stderr when it is a terminal, JSON lines in a log file, seconds by stage.

    Attributes:
        seconds_by_stage: Wall seconds spent in each outermost stage.
    """

    def __init__(self, log_file: Path | None, verbosity: int = 0, stages: int | None = None) -> None:
        """Start a run.

        Args:
            log_file: JSON lines go here; None for no log.
            verbosity: -1 shows nothing, 0 stages, 1 also events.
            stages: Outermost stages that are to come, where known: bars then say how many are left.
        """
        self.seconds_by_stage: dict[str, float] = {}
        self._started = time.monotonic()
        self._depth, self._number, self._stages = 0, 0, stages
        self._verbosity = verbosity
        self._log = log_file.open("a", encoding="utf-8") if log_file else None
        self._bars = _make_bars() if verbosity >= 0 and sys.stderr.isatty() else None

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """Time a stage and show its bar.

        Args:
            name: Shown to the user and used in ``seconds_by_stage``.
            total: Units of work, or None when unknown.

        Yields:
            A function that advances the bar by a number of units.
        """
        self._number += self._depth == 0
        place = f"[{self._number}/{max(self._stages, self._number)}] " if self._stages and self._depth == 0 else ""
        task = self._bars.add_task(place + name, total=total) if self._bars else None
        started, self._depth = time.monotonic(), self._depth + 1

        def advance(amount: int) -> None:
            if self._bars:
                self._bars.advance(task, amount)

        try:
            yield advance
        finally:
            self._depth -= 1
            seconds = time.monotonic() - started
            if self._depth == 0:
                self.seconds_by_stage[name] = self.seconds_by_stage.get(name, 0.0) + seconds
            self.event("stage", stage=name, seconds=round(seconds, 3))
            if self._bars:
                self._bars.update(task, total=total or 1, completed=total or 1, visible=self._depth == 0)

    def event(self, name: str, **values: Any) -> None:
        """Append one JSON line to the log, and show it when verbose."""
        line = {"seconds": round(time.monotonic() - self._started, 3), "event": name, **values}
        if self._log:
            self._log.write(to_json(line) + "\n")
            self._log.flush()
        if self._verbosity > 0 and name != "stage":
            self.say(f"{name}: {' '.join(f'{key}={value}' for key, value in values.items())}")

    def say(self, sentence: str) -> None:
        """Show a sentence on the console that the bars are on, unless the run is quiet."""
        if self._bars:
            self._bars.console.print(sentence, markup=False, highlight=False, soft_wrap=True)
        elif self._verbosity >= 0:
            sys.stderr.write(f"{sentence}\n")

    def close(self) -> None:
        """Stop the bars and close the log."""
        if self._bars:
            self._bars.stop()
        if self._log:
            self._log.close()


def _make_bars() -> Any:
    from rich import progress as rich_progress
    from rich.console import Console

    bars = rich_progress.Progress(
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    bars.start()
    return bars
