"""The command ``l2a``: its sub-commands, and how errors are shown."""

import sys
from typing import Annotated

import typer

from l2a import __version__
from l2a.cli.data import augment_command, domains_app, pretrain_command
from l2a.cli.distill import distill_command
from l2a.cli.experiment import experiment_app
from l2a.cli.selector import selector_app
from l2a.util.errors import RunError, UsageError

app = typer.Typer(
    help="Distil a small text classifier for a domain with few labels.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: loading rich for it would double the start-up time
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("distill")(distill_command)
app.command("augment")(augment_command)
app.command("pretrain")(pretrain_command)
app.add_typer(domains_app, name="domains")
app.add_typer(experiment_app, name="experiment")
app.add_typer(selector_app, name="selector")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"l2a {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Hold the options that stand before a command."""


def main() -> None:
    """Run the command line: exit code 0 for success, 1 for a failed run, 2 for wrong usage."""
    try:
        app()
    except UsageError as error:
        _fail(str(error), 2)
    except RunError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted; the same command takes up what is in the cache or was kept beside the output", 130)


def _fail(message: str, code: int) -> None:
    typer.echo(f"error: {message}", err=True)
    sys.exit(code)
