"""Writes docs/cli.md from the program itself: ``python benchmarks/cli_page.py``."""

import re
from pathlib import Path

import typer.main
from typer.cli import get_docs_for_click

from l2a.cli.app import app

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
INTRODUCTION = """\
This page lists every command and option. It is made from the program by `python benchmarks/cli_page.py`, and
`l2a COMMAND --help` prints the same. Looking for a task rather than an option? See [How do I ...?](howto.md).

**Settings.** A preset comes first, `--config FILE` overrides it, and options override both. `--preset` names a file
that comes with l2a (`fast`, `default`, `full`) or one of your own in `./configs`, which may add a name but not replace
one. A file may set any field of [the configuration](reference.md#l2a.config.DistillConfig). Unknown keys are refused,
with a suggestion. `l2a distill --print-config` prints the result and stops.

**Columns.** `--text-column`, `--text-pair-column` and `--label-column` apply to source and target. The options with
`--source-` or `--target-` in front apply to one side.

**Exit codes.** 0: success. 1: the run failed. 2: the request was wrong. 130: interrupted.

**Environment.** `L2A_CACHE` moves the cache. The Hub's libraries read `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE`.
"""


def page() -> str:
    """Return the text of the page."""
    command = typer.main.get_command(app)
    made = get_docs_for_click(
        obj=command, ctx=typer.Context(command, info_name="l2a"), name="l2a", title="Command line"
    )
    made = made.replace("```console\n$ ", "```text\n")
    helps = {name: " ".join(text.split()) for name, text in re.findall(r"^#+ `(l2a .+)`\n\n(.+(?:\n.+)*)", made, re.M)}
    prefix, lines = "l2a", []
    for line in made.rstrip().splitlines():
        if section := re.match("#+ `(.+)`", line):
            prefix = section[1]
        if entry := re.match(r"\* `([a-z]+)`: ", line):  # a command whose help typer has cut short
            name = f"{prefix} {entry[1]}"
            line = f"* [`{name}`](#{name.replace(' ', '-')}): {helps[name]}"
        lines.append(line)
    return "\n".join([*lines[:2], INTRODUCTION, *lines[2:]]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
