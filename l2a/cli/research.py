"""The commands ``l2a selector``, which trains, compares and explains policies, and ``l2a experiment``, for grids."""

import importlib.util
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any

import typer

from l2a.cli.options import RUN_OPTIONS, Overwrite, Verbose, print_table, with_run_options
from l2a.config import DistillConfig, SelectorConfig, override
from l2a.util.errors import RunError, UsageError
from l2a.util.progress import Progress

selector_app = typer.Typer(help="Train, compare and explain selection policies.", no_args_is_help=True)
experiment_app = typer.Typer(help="Run and report grids that show what a method is worth.", no_args_is_help=True)
BARS = "▁▂▃▄▅▆▇█"
Policy = Annotated[str, typer.Argument(help="Folder of a saved policy, or a card in agents/ that names one.")]
EXTRA_PACKAGES = ("distributed", "joblib", "matplotlib", "statsmodels")
Card = Annotated[str, typer.Argument(help="A card in configs/experiments, or a path that ends in .yaml.")]
Results = Annotated[Path, typer.Option(help="Folder of results: CARD/cells.jsonl and CARD.json.")]
OF_A_RUN = ("unlabelled", "student", "selector", "output_dir", "overwrite", "compare", "report")
PAIR_OPTIONS = tuple(name for name in RUN_OPTIONS if name not in OF_A_RUN)


@selector_app.command("train")
@with_run_options([name for name in PAIR_OPTIONS if name not in ("source", "target", "seed")])
def train(
    config: DistillConfig,
    output_dir: Annotated[Path, typer.Option(help="Folder of the policy.")],
    source: Annotated[str | None, typer.Option(help="Source domain: card, file, folder or Hub id.")] = None,
    target: Annotated[str | None, typer.Option(help="Target domain: card, file, folder or Hub id.")] = None,
    pair: Annotated[list[str] | None, typer.Option(help="A further pair as SOURCE:TARGET; repeatable.")] = None,
    agent: Annotated[str | None, typer.Option(help="A card that learns: ppo (default), a2c, dvrl ...")] = None,
    steps: Annotated[int | None, typer.Option(help="Environment steps over all pairs.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seed of labels and draws; repeatable.")] = None,
    tensorboard: Annotated[str | None, typer.Option(help="Folder for TensorBoard.")] = None,
    overwrite: Overwrite = False,
    verbose: Verbose = False,
) -> None:
    """Train one policy on one pair of domains or several, and save it."""
    from l2a.pipeline.policies import train_selector

    if agent is None and config.selector.agent == SelectorConfig().agent:  # which is trained already
        agent = "ppo"
    learning = {"agent": agent, "training_steps": steps, "tensorboard": tensorboard}
    base = override(config, {f"selector.{name}": value for name, value in learning.items() if value is not None})
    places = [{"source": s, "target": t} if s else {} for s, t in _pairs(source, target, pair or [])]
    runs = [override(base, {**place, "seed": n}) for place, n in itertools.product(places, seed or [base.seed])]
    with Progress(verbosity=int(verbose)) as progress:
        training = train_selector(runs, output_dir, overwrite, progress)
    _print_curve(training.reward_curve)
    typer.echo(f"the policy is in {output_dir}; use it with: l2a distill --selector {output_dir}")


@selector_app.command("evaluate")
@with_run_options(PAIR_OPTIONS)
def evaluate(
    config: DistillConfig,
    policy: Policy,
    updates: Annotated[int | None, typer.Option(min=1, help="Real updates for each; by default a round's.")] = None,
    verbose: Verbose = False,
) -> None:
    """Compare a saved policy with every rule, at the same keep rate and updates, on a pair it never saw."""
    from l2a.pipeline.policies import evaluate_policy, open_policy, pair_name

    trained, facts = open_policy(policy)
    with Progress(verbosity=int(verbose)) as progress:
        result = evaluate_policy(config, trained, updates, progress)
    best_first = sorted(result.verdicts, key=lambda verdict: -verdict.real)
    rows = [(row.name, str(row.kept), f"{row.surrogate:+.4f}", f"{row.real:+.4f}") for row in best_first]
    print_table(("selector", "kept", "surrogate gain", "real gain"), rows)
    typer.echo(
        "gain of the log-likelihood on the reward split, in nats; surrogate: in a few steps, against texts without "
        f"influence; real: after {result.updates} updates of the student; Spearman correlation of the two: "
        f"{result.correlation:.2f}"
    )
    if pair_name(config) in facts.get("pairs", []):
        typer.echo(f"note: the policy was trained on {pair_name(config)}")


@selector_app.command("headroom")
@with_run_options([*PAIR_OPTIONS, "unlabelled"])
def headroom(config: DistillConfig, verbose: Verbose = False) -> None:
    """Measure what a perfect choice would bring over a random one; reads target labels that no run reads."""
    from l2a.pipeline.policies import headroom_note, measure_headroom

    with Progress(verbosity=int(verbose)) as progress:
        found = measure_headroom(config, progress)
    best_first = sorted(found["verdicts"], key=lambda verdict: -verdict["accuracy"])
    rows = [(row["name"], f"{row['kept']:,}", f"{row['real']:+.4f}", f"{row['accuracy']:.1%}") for row in best_first]
    print_table(("candidates", "kept", "gain, nats", "accuracy"), rows, f"of {found['pool']:,} candidates")
    typer.echo(
        f"the oracles read {found['labels']:,} target labels and {found['judged_on']:,} others judged, for this "
        f"diagnosis alone: no run reads them\n{headroom_note(found)}"
    )


@selector_app.command("show")
@with_run_options(PAIR_OPTIONS)
def show(config: DistillConfig, context: typer.Context, policy: Policy, verbose: Verbose = False) -> None:
    """Show how a policy was trained and, on a pair of domains, what it learned."""
    from l2a.pipeline.policies import explain_policy, open_policy

    trained, facts = open_policy(policy)
    for name, value in {"agent": trained.agent, **facts}.items():
        if name != "reward_curve":
            typer.echo(f"{name:<18} {_flat(value)}")
    _print_curve(facts.get("reward_curve", []))
    if context.params["source"] is None and context.params["target"] is None:
        typer.echo("give --source and --target to see what it keeps there")
        return
    with Progress(verbosity=int(verbose)) as progress:
        _print_inspection(explain_policy(config, trained, progress))


def _pairs(source: str | None, target: str | None, more: Sequence[str]) -> list[tuple[str | None, str | None]]:
    if (source is None) != (target is None):
        raise UsageError(f"--source is {source} and --target is {target}, but a pair needs both; give the missing one")
    wrong = [text for text in more if text.count(":") != 1 or text[0] == ":" or text[-1] == ":"]
    if wrong:
        raise UsageError(f"--pair is {wrong[0]}; give SOURCE:TARGET with one colon, or --source and --target")
    pairs: list[tuple[str | None, str | None]] = [(source, target)] if source or not more else []
    return pairs + [(text.split(":")[0], text.split(":")[1]) for text in more]


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _print_curve(curve: Sequence[float]) -> None:
    if curve:
        low, spread = min(curve), max(max(curve) - min(curve), 1e-12)
        bars = "".join(BARS[round((len(BARS) - 1) * (value - low) / spread)] for value in curve)
        typer.echo(f"reward of training episodes, mean gain in nats: {curve[0]:+.4f} {bars} {curve[-1]:+.4f}")


def _print_inspection(explained: Any) -> None:
    importances = [(name, f"{loss:+.4f}", f"{part:.0%}") for name, (loss, part) in explained.importances.items()]
    print_table(("feature", "loss (nats)", "decisions changed"), importances, "permutation importance")
    values = [
        (name, *(" ".join(f"{value:.3g}" for value in side) for side in sides))
        for name, sides in explained.quartiles.items()
    ]
    shares = [(f"operator {name}", f"{kept:.0%}", f"{drop:.0%}") for name, (kept, drop) in explained.operators.items()]
    print_table(("feature", "kept", "dropped"), [*values, *shares], "quartiles: lower, median, upper")
    texts = [
        (side, f"{score:+.2f}", shorten(" | ".join(text), 200))
        for side, chosen in (("kept", explained.kept_texts), ("dropped", explained.dropped_texts))
        for score, text in chosen
    ]
    print_table(("", "score", "text"), texts)


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
    results: Results = Path("benchmarks/results"),
    workers: Annotated[int | None, typer.Option(help="Groups of cells in parallel; by default one per core.")] = None,
    backend: Annotated[str, typer.Option(help="loky: processes on this machine; dask: a cluster.")] = "loky",
    address: Annotated[str | None, typer.Option(help="Scheduler of a running cluster; a local one by default.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Part of 'pair shots seed variant'; may be repeated.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print cells, cache and cost; run nothing.")] = False,
) -> None:
    """Run the cells of a card that are not finished; stop and start it as you like."""
    import joblib

    from l2a.experiments import card as cards
    from l2a.experiments import runner
    from l2a.pipeline.methods import run_method

    where = runner.Workers(joblib.cpu_count() if workers is None else workers, backend, address)
    experiment = cards.load_experiment(card)
    groups = cards.expand(experiment, data_root)
    groups = cards.choose(groups, only) if only else groups
    cards.refuse_missing_agents(groups)
    folder, total = results / experiment.name, sum(map(len, groups))
    with Progress() as progress:
        planned = runner.plan(groups, cards.data_files(groups, progress), runner.read_results(folder))
        if not dry_run:
            outcomes = runner.run_groups(planned, folder.resolve(), run_method, where, progress)
    if dry_run:
        cells = [cell for group in planned for cell in group]
        print_table(("cell", "student", "result", "teacher", "seconds"), map(_row, cells))
        minutes, left = runner.cost_seconds(planned, where.count) / 60, sum(not cell.is_finished for cell in cells)
        time = f"about {minutes:.1f} minutes on {where.count} workers, estimated from the finished cells"
        typer.echo(f"{total} cells, {left} to run: {time}")
        return
    failed = [(cell, message) for cell, status, message in outcomes if status == "failed"]
    for cell, message in failed:
        typer.echo(f"failed: {cell.place.name}, student {cell.place.student}: {message}")
    ran = sum(outcome.status == "ran" for outcome in outcomes)
    typer.echo(f"{folder}: {ran} cells ran, {total - len(failed)} of {total} are finished")
    if failed:
        raise RunError(f"{len(failed)} of {total} cells failed; see above, and run the command again after the fix")


def _row(planned: Any) -> tuple[str, ...]:
    mark, place = planned.teacher_mark, planned.cell.place
    teacher = "none" if mark is None else "cached" if mark.exists() else "to train"
    left = ("finished", teacher, "") if planned.is_finished else ("to run", teacher, f"{planned.seconds:.0f}")
    return (place.name, place.student, *left)


@experiment_app.command("report")
def report_experiment(
    card: Card,
    results: Results = Path("benchmarks/results"),
    pages: Annotated[Path, typer.Option(help="Folder of report pages.")] = Path("docs/experiments"),
) -> None:
    """Write a card's page, figures and summary from its results alone."""
    from l2a.experiments.card import load_experiment
    from l2a.experiments.report import summarise, write_report, write_summary
    from l2a.experiments.runner import read_results

    experiment = load_experiment(card)
    summary = summarise(experiment, read_results(results / experiment.name))
    page, data = pages / f"{experiment.name}.md", results / f"{experiment.name}.json"
    write_report(page, summary)
    write_summary(data, summary)
    typer.echo(f"{page} and {data}: {len(summary.results)} cells, {summary.missing} missing")
