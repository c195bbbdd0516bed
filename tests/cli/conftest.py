import sys
from itertools import count

import pytest
from typer.main import get_command

from l2a.cli import app

COMMANDS = get_command(app.app)
"""Built once for all calls: that takes longer than most calls do."""


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process; give its exit code, output and errors."""
    monkeypatch.setattr(app, "app", COMMANDS)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["l2a", *arguments])
        with pytest.raises(SystemExit) as stopped:
            app.main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return call


def stopped_after(calls, function):
    """A function that is interrupted, as by a user, once it was called so many times."""
    numbers = count()

    def stopped(*arguments):
        if next(numbers) == calls:
            raise KeyboardInterrupt
        return function(*arguments)

    return stopped
