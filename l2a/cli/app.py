"""The whole command line: ``l2a distill``, the cache, the other groups of commands, and how errors are shown."""

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from l2a import __version__
from l2a.cli.data import augment_command, domains_app, pretrain_command
from l2a.cli.experiment import experiment_app
from l2a.cli.options import Quiet, Verbose, print_table, with_run_options
from l2a.cli.selector import selector_app
from l2a.cli.serving import evaluate_command, export_command, predict_command
from l2a.config import DistillConfig, as_yaml
from l2a.util.errors import RunError, UsageError, os_error_sentence
from l2a.util.files import cache_root, cache_sizes, clear_cache
from l2a.util.progress import process_rank

if TYPE_CHECKING:
    from l2a.pipeline.distill import DistillResult

app = typer.Typer(
    help="Distil a small text classifier for a domain with few labels.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: loading rich for it would double the start-up time
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("augment")(augment_command)
app.command("pretrain")(pretrain_command)
app.command("predict")(predict_command)
app.command("evaluate")(evaluate_command)
app.command("export")(export_command)
app.add_typer(domains_app, name="domains")
app.add_typer(experiment_app, name="experiment")
app.add_typer(selector_app, name="selector")
cache_app = typer.Typer(help="Show or clear the cache.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"l2a {__version__}")
        raise typer.Exit


@app.command("distill")
@with_run_options()
def distill_command(
    config: DistillConfig,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the configuration and stop.")] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Distil a small student for the target domain and show how it compares."""
    if print_config:
        typer.echo(as_yaml(config), nl=False)
        return
    from l2a.pipeline.distill import distill

    result = distill(config, verbosity=-1 if quiet else int(verbose))
    if not quiet and process_rank() == 0:
        print_result(result)


def print_result(result: "DistillResult") -> None:
    """Print the comparison and where everything is."""
    from l2a.report.run_folder import SHORT_HEADERS, short_cells, verdict

    print_table(SHORT_HEADERS, short_cells(result.rows), justify="right")
    typer.echo(
        "95 % bootstrap intervals over the test examples; ms: CPU time a text on one thread, alone and in batches of "
        "32, median ± half the interquartile range"
    )
    typer.echo(verdict(result.rows, result.student))
    agreement = [facts["selector"].get("tier_correlation") for facts in result.metrics.get("rounds", [])]
    if agreement and None not in agreement:
        values = ", ".join(f"{value:.2f}" for value in agreement)
        typer.echo(f"selector: rank correlation of its fast reward with real distillation {values}, one a round")
    student, metrics = result.output_dir / "student", result.output_dir / "metrics.json"
    typer.echo(f"model ({result.student}): {student}    evidence: {metrics}")
    if (result.output_dir / "report.html").exists():
        typer.echo(f"page: {result.output_dir / 'report.html'}")


@app.command("report")
def report_command(run: Annotated[Path, typer.Argument(help="Output folder of a finished l2a distill.")]) -> None:
    """Draw the page of a finished run again, as report.html in its folder."""
    from l2a.report.page import renew_page

    typer.echo(f"page: {renew_page(run)}")


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Hold the options that come before a command."""


@cache_app.command("list")
def list_cache() -> None:
    """Show where the cache is and what it holds."""
    typer.echo(f"{cache_root()}")
    for kind, (entries, size) in cache_sizes().items():
        typer.echo(f"{kind:<16} {entries:>6} entries {size / 1e6:>10.1f} MB")


@cache_app.command("clear")
def clear(
    kinds: Annotated[
        list[str] | None, typer.Argument(help="Kinds to remove, as `list` names them; all by default.")
    ] = None,
) -> None:
    """Remove cache entries; what a later run needs is fetched or computed again."""
    typer.echo(f"{clear_cache(tuple(kinds or ())) / 1e6:.1f} MB freed")


class _Interrupted(BaseException):
    """Ctrl-C; the command-line library would swallow a KeyboardInterrupt and say nothing."""


def _interrupt(*_: object) -> None:
    raise _Interrupted


def main() -> None:
    """Run the command line: exit code 0 for success, 1 for a failed run, 2 for wrong usage, 130 when interrupted."""
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half written is cleaned up
    try:
        app()
    except UsageError as error:
        _fail(str(error), 2)
    except RunError as error:
        _fail(str(error), 1)
    except (_Interrupted, KeyboardInterrupt):
        _fail("interrupted; trained teachers and labels stay in the cache, so run the same command to continue", 130)
    except MemoryError:
        _fail("out of memory; lower kd.batch_size, kd.pool_size or --max-length, or close other programs", 1)
    except OSError as error:
        _fail(os_error_sentence(error), 1)


def _fail(message: str, code: int) -> None:
    typer.echo(f"error: {message}", err=True)
    sys.exit(code)
