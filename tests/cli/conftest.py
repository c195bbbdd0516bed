import sys

import pytest

from l2a.cli.app import main


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process; give its exit code, output and errors."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["l2a", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return call
