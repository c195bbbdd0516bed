"""The command ``l2a experiment``: run a grid of cells and report it."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from l2a.experiments.runner import Outcome, PlannedGroup


experiment_app = typer.Typer(help="Run and report grids that show what a method is worth.", no_args_is_help=True)
EXTRA_PACKAGES = ("joblib", "matplotlib", "statsmodels")

Card = Annotated[str, typer.Argument(help="A card in configs/experiments, or a path that ends in .yaml.")]
DataRoot = Annotated[Path | None, typer.Option(help="Folder that the card's data paths start from.")]
Results = Annotated[Path, typer.Option(help="Folder of results: CARD/cells.jsonl and CARD.json.")]
Pages = Annotated[Path, typer.Option(help="Folder of report pages.")]
Count = Annotated[int | None, typer.Option("--workers", help="Groups of cells in parallel; one per core by default.")]
Backend = Annotated[str, typer.Option(help="loky: processes on this machine; dask: a cluster.")]
Address = Annotated[str | None, typer.Option(help="Scheduler of a running cluster; a local one by default.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the cells, what is cached and the cost; run nothing.")]
RESULTS, PAGES = Path("benchmarks/results"), Path("docs/experiments")


@experiment_app.callback()
def _require_extra_packages() -> None:
    """Run and report grids that show what a method is worth."""
    from l2a.util.errors import UsageError

    missing = [name for name in EXTRA_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"experiments need {', '.join(missing)}; install them by: pip install 'l2a[experiments]'")


@experiment_app.command("run")
def run_experiment(
    card: Card,
    data_root: DataRoot = None,
    results: Results = RESULTS,
    workers: Count = None,
    backend: Backend = "loky",
    address: Address = None,
    dry_run: DryRun = False,
) -> None:
    """Run the cells of a card that are not finished; stop and start it as you like."""
    import joblib
    from rich.console import Console

    from l2a.experiments.card import data_files, expand, load_experiment, refuse_missing_agents
    from l2a.experiments.results import read_results
    from l2a.experiments.runner import Workers, plan, run_groups
    from l2a.pipeline.methods import run_method
    from l2a.util.progress import RunProgress

    where = Workers(joblib.cpu_count() if workers is None else workers, backend, address)
    experiment, console, progress = load_experiment(card), Console(highlight=False), RunProgress(None)
    folder = results / experiment.name
    try:
        groups = expand(experiment, data_root)
        refuse_missing_agents(groups)
        data = data_files(groups, progress)
        planned = plan(groups, data, read_results(folder))
        if not dry_run:
            outcomes = run_groups(planned, data, folder.resolve(), run_method, where, progress)
    finally:
        progress.close()
    if dry_run:
        _print_plan(console, planned, where.count)
    else:
        _print_outcomes(console, planned, outcomes, folder)


@experiment_app.command("report")
def report_experiment(card: Card, results: Results = RESULTS, pages: Pages = PAGES) -> None:
    """Write a card's page, figures and summary from its results alone."""
    from rich.console import Console

    from l2a.experiments.card import load_experiment
    from l2a.experiments.report import write_report
    from l2a.experiments.results import read_results, summarise, write_summary

    experiment = load_experiment(card)
    summary = summarise(experiment, read_results(results / experiment.name))
    page, data = pages / f"{experiment.name}.md", results / f"{experiment.name}.json"
    write_report(page, summary)
    write_summary(data, summary)
    Console(highlight=False).print(f"{page} and {data}: {len(summary.results)} cells, {summary.missing} missing")


def _print_plan(console: "Console", planned: "tuple[PlannedGroup, ...]", workers: int) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    from l2a.experiments.runner import cost_seconds

    table = Table("cell", "result", "teacher", "seconds", box=SIMPLE)
    for cell in (cell for group in planned for cell in group):
        state = "finished" if cell.is_finished else "to run"
        teacher = {None: "none", True: "cached", False: "to train"}[cell.is_teacher_cached]
        seconds = "" if cell.is_finished else f"{cell.seconds:.0f}"
        place = cell.cell.place
        name = f"{place.pair} {place.shots} shots, seed {place.seed}, {place.student}: {cell.cell.variant}"
        table.add_row(name, state, teacher, seconds)
    left = [cell for group in planned for cell in group if not cell.is_finished]
    console.print(table)
    console.print(
        f"{sum(map(len, planned))} cells, {len(left)} to run: about {cost_seconds(planned, workers) / 60:.1f} minutes "
        f"on {workers} workers, estimated from the finished cells"
    )


def _print_outcomes(
    console: "Console", planned: "tuple[PlannedGroup, ...]", outcomes: "tuple[Outcome, ...]", folder: Path
) -> None:
    from l2a.util.errors import RunError

    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    for outcome in failed:
        place = " ".join(map(str, outcome.cell.place))
        console.print(f"failed: {place} {outcome.cell.variant}: {outcome.message}", markup=False)
    total, ran = sum(map(len, planned)), sum(outcome.status == "ran" for outcome in outcomes)
    console.print(f"{folder}: {ran} cells ran, {total - len(failed)} of {total} are finished")
    if failed:
        raise RunError(f"{len(failed)} of {total} cells failed; see above, and run the command again after the fix")
