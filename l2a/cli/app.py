"""The command ``l2a distill`` and what it prints at its end."""

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l2a import __version__
from l2a.cli.data import augment_command, domains_app, pretrain_command
from l2a.cli.experiment import experiment_app
from l2a.cli.selector import selector_app
from l2a.util.errors import RunError, UsageError, os_error_sentence

if TYPE_CHECKING:
    from l2a.pipeline.distill import DistillResult


def print_result(result: "DistillResult") -> None:
    """Print the comparison and where everything is.

    Args:
        result: A finished run.
    """
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from l2a.report.run_folder import SHORT_HEADERS, short_cells, verdict

    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for number, header in enumerate(SHORT_HEADERS):
        table.add_column(header, justify="right" if number else "left", no_wrap=True)
    for cells in short_cells(result.rows):
        table.add_row(*cells)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(
        "95 % bootstrap intervals over the test examples; ms: CPU time a text on one thread, alone and in batches of "
        "32, median ± half the interquartile range"
    )
    console.print(verdict(result.rows, result.student))
    agreement = [facts["selector"].get("tier_correlation") for facts in result.metrics.get("rounds", [])]
    if agreement and None not in agreement:
        values = ", ".join(f"{value:.2f}" for value in agreement)
        console.print(f"selector: rank correlation of its fast reward with real distillation {values}, one a round")
    console.print(
        f"model ({result.student}): {result.output_dir / 'student'}    evidence: {result.output_dir / 'metrics.json'}"
    )


def distill_command(
    target: Annotated[str | None, typer.Option(help="Target domain: card, file, folder or Hub id.")] = None,
    source: Annotated[str | None, typer.Option(help="Source domain; movies if the target is shipped.")] = None,
    unlabelled: Annotated[
        str | None, typer.Option(help="Unlabelled text near the target: a .txt file or a domain.")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(help="Labelled target examples per class to train on; by default all (32 if shipped).")
    ] = None,
    dev_shots: Annotated[
        int | None, typer.Option(help="Labelled target examples per class for the reward, and as many for validation.")
    ] = None,
    preset: Annotated[str, typer.Option(help="quick, default, full, or any card in ./configs.")] = "default",
    config: Annotated[Path | None, typer.Option(help="YAML file that overrides the preset; flags override it.")] = None,
    teacher: Annotated[str | None, typer.Option(help="minilm-l6, mpnet-base, a model folder or a Hub id.")] = None,
    fine_tuned_teacher: Annotated[
        bool | None, typer.Option("--fine-tuned-teacher", help="Use the teacher as it is: it already classifies.")
    ] = None,
    student: Annotated[str | None, typer.Option(help="Model folder or Hub id to start the student from.")] = None,
    selector: Annotated[
        str | None,
        typer.Option(help="A card in agents/ (pretrained, ppo, random ...), a card's path or a saved policy's folder."),
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of the text, on both sides.")] = None,
    text_pair_column: Annotated[str | None, typer.Option(help="Column of the second text of a pair.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the label.")] = None,
    source_text_column: Annotated[str | None, typer.Option(help="Column of the source's text.")] = None,
    source_text_pair_column: Annotated[str | None, typer.Option(help="Column of its second text, for pairs.")] = None,
    source_label_column: Annotated[str | None, typer.Option(help="Column of its label.")] = None,
    target_text_column: Annotated[str | None, typer.Option(help="Column of the target's text.")] = None,
    target_text_pair_column: Annotated[str | None, typer.Option(help="Column of its second text, for pairs.")] = None,
    target_label_column: Annotated[str | None, typer.Option(help="Column of its label.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest sequence in tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the few labels and of every random draw.")] = None,
    output_dir: Annotated[str | None, typer.Option(help="Folder of the results.")] = None,
    overwrite: Annotated[bool | None, typer.Option("--overwrite", help="Replace a finished run.")] = None,
    compare: Annotated[
        bool | None, typer.Option("--compare/--no-compare", help="Also train the rows that need extra training.")
    ] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the configuration and stop.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show every event.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Show errors only.")] = False,
) -> None:
    """Distil a small student for the target domain and show how it compares."""
    flags: dict[str, Any] = {
        "target": target, "source": source, "unlabelled": unlabelled, "shots": shots, "dev_shots": dev_shots,
        "seed": seed, "max_length": max_length, "output_dir": output_dir, "overwrite": overwrite, "compare": compare,
        "teacher.model": teacher, "teacher.fine_tuned": fine_tuned_teacher, "student.model": student,
        "selector.agent": selector,
    }  # fmt: skip
    columns = {
        "text": (text_column, source_text_column, target_text_column),
        "text_pair": (text_pair_column, source_text_pair_column, target_text_pair_column),
        "label": (label_column, source_label_column, target_label_column),
    }
    for name, (both, of_source, of_target) in columns.items():
        flags |= {f"source_columns.{name}": of_source or both, f"target_columns.{name}": of_target or both}
    _run(preset, config, flags, print_config, -1 if quiet else int(verbose))


def _run(preset: str, file: Path | None, flags: dict[str, Any], print_config: bool, verbosity: int) -> None:
    from l2a.config import as_yaml, load_config

    run_config = load_config(preset, file, flags)
    if print_config:
        typer.echo(as_yaml(run_config), nl=False)
        return
    from l2a.pipeline.distill import distill

    result = distill(run_config, verbosity=verbosity)
    if verbosity >= 0 and not int(os.environ.get("RANK", "0")):
        print_result(result)


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
cache_app = typer.Typer(help="Show or clear the cache.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")


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
    """Hold the options that come before a command."""


@cache_app.command("list")
def list_cache() -> None:
    """Show where the cache is and what it holds."""
    from l2a.util.files import cache_root, cache_sizes

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
    from l2a.util.files import clear_cache

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
