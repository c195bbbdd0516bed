"""The command ``l2a experiment``: run a grid of cells and report it."""

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

from l2a.cli.options import print_table
from l2a.util.errors import RunError, UsageError
from l2a.util.progress import Progress

experiment_app = typer.Typer(help="Run and report grids that show what a method is worth.", no_args_is_help=True)
EXTRA_PACKAGES = ("joblib", "matplotlib", "statsmodels")
Card = Annotated[str, typer.Argument(help="A card in configs/experiments, or a path that ends in .yaml.")]
Results = Annotated[Path, typer.Option(help="Folder of results: CARD/cells.jsonl and CARD.json.")]
RESULTS = Path("benchmarks/results")


@experiment_app.callback()
def _require_extra_packages() -> None:
    """Run and report grids that show what a method is worth."""
    missing = [name for name in EXTRA_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"experiments need {', '.join(missing)}; install them by: pip install 'l2a[experiments]'")


@experiment_app.command("run")
def run_experiment(
    card: Card,
    data_root: Annotated[Path | None, typer.Option(help="Folder that the card's data paths start from.")] = None,
    results: Results = RESULTS,
    workers: Annotated[int | None, typer.Option(help="Groups of cells in parallel; by default one per core.")] = None,
    backend: Annotated[str, typer.Option(help="loky: processes on this machine; dask: a cluster.")] = "loky",
    address: Annotated[str | None, typer.Option(help="Scheduler of a running cluster; a local one by default.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cells, what is cached and the cost; run nothing.")
    ] = False,
) -> None:
    """Run the cells of a card that are not finished; stop and start it as you like."""
    import joblib

    from l2a.experiments import card as cards
    from l2a.experiments import runner
    from l2a.experiments.results import read_results
    from l2a.pipeline.methods import run_method

    where = runner.Workers(joblib.cpu_count() if workers is None else workers, backend, address)
    experiment = cards.load_experiment(card)
    folder = results / experiment.name
    with Progress() as progress:
        groups = cards.expand(experiment, data_root)
        cards.refuse_missing_agents(groups)
        data = cards.data_files(groups, progress)
        planned = runner.plan(groups, data, read_results(folder))
        if not dry_run:
            outcomes = runner.run_groups(planned, data, folder.resolve(), run_method, where, progress)
    total = sum(map(len, planned))
    if dry_run:
        cells = [cell for group in planned for cell in group]
        print_table(("cell", "result", "teacher", "seconds"), map(_row, cells))
        typer.echo(
            f"{total} cells, {sum(not cell.is_finished for cell in cells)} to run: about "
            f"{runner.cost_seconds(planned, where.count) / 60:.1f} minutes on {where.count} workers, estimated from "
            "the finished cells"
        )
        return
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    for outcome in failed:
        place = " ".join(map(str, outcome.cell.place))
        typer.echo(f"failed: {place} {outcome.cell.variant}: {outcome.message}")
    ran = sum(outcome.status == "ran" for outcome in outcomes)
    typer.echo(f"{folder}: {ran} cells ran, {total - len(failed)} of {total} are finished")
    if failed:
        raise RunError(f"{len(failed)} of {total} cells failed; see above, and run the command again after the fix")


def _row(cell: Any) -> tuple[str, str, str, str]:
    place = cell.cell.place
    return (
        f"{place.pair} {place.shots} shots, seed {place.seed}, {place.student}: {cell.cell.variant}",
        "finished" if cell.is_finished else "to run",
        {None: "none", True: "cached", False: "to train"}[cell.is_teacher_cached],
        "" if cell.is_finished else f"{cell.seconds:.0f}",
    )


@experiment_app.command("report")
def report_experiment(
    card: Card,
    results: Results = RESULTS,
    pages: Annotated[Path, typer.Option(help="Folder of report pages.")] = Path("docs/experiments"),
) -> None:
    """Write a card's page, figures and summary from its results alone."""
    from l2a.experiments.card import load_experiment
    from l2a.experiments.report import write_report
    from l2a.experiments.results import read_results, summarise, write_summary

    experiment = load_experiment(card)
    summary = summarise(experiment, read_results(results / experiment.name))
    page, data = pages / f"{experiment.name}.md", results / f"{experiment.name}.json"
    write_report(page, summary)
    write_summary(data, summary)
    typer.echo(f"{page} and {data}: {len(summary.results)} cells, {summary.missing} missing")
