"""The commands ``l2a selector``, which trains, compares and explains policies, and ``l2a experiment``, for grids."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any

from typer import Argument, Context, Option, Typer, echo

from l2a.cli.options import RUN_OPTIONS, Overwrite, Verbose, print_facts, print_table, with_run_options
from l2a.config import DistillConfig, SelectorConfig, override, settle
from l2a.util import Progress, RunError, UsageError

selector_app = Typer(help="Train, compare and explain selection policies.", no_args_is_help=True)
experiment_app = Typer(help="Run and report grids that show what a method is worth.", no_args_is_help=True)
BARS = "▁▂▃▄▅▆▇█"
Policy = Annotated[str, Argument(help="Folder of a saved policy, or a card in agents/ that names one.")]
Card = Annotated[str, Argument(help="A card in configs/experiments, or a path that ends in .yaml.")]
Results = Annotated[Path, Option(help="Folder of results: CARD/cells.jsonl and CARD.json.")]
OF_A_RUN = ("unlabelled", "student", "selector", "output_dir", "overwrite", "compare", "report")
PAIR_OPTIONS = tuple(name for name in RUN_OPTIONS if name not in OF_A_RUN)


@selector_app.command("train")
@with_run_options([name for name in PAIR_OPTIONS if name not in ("source", "target", "seed")])
def train(
    config: DistillConfig, output_dir: Annotated[Path, Option(help="Folder of the policy.")],
    source: Annotated[str | None, Option(help="Source domain: card, file, folder or Hub id.")] = None,
    target: Annotated[str | None, Option(help="Target domain: card, file, folder or Hub id.")] = None,
    pair: Annotated[list[str] | None, Option(help="A further pair as SOURCE:TARGET; repeatable.")] = None,
    agent: Annotated[str | None, Option(help="A card that learns: ppo (default), a2c, dvrl ...")] = None,
    steps: Annotated[int | None, Option(help="Environment steps over all pairs.")] = None,
    seed: Annotated[list[int] | None, Option(help="Seed of labels and draws; repeatable.")] = None,
    overwrite: Overwrite = False, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Train one policy on one pair of domains or several, and save it."""
    from l2a.pipeline.policies import train_selector

    if agent is None and config.selector.agent == SelectorConfig().agent:  # which is trained already
        agent = "ppo"
    learning = {"agent": agent, "training_steps": steps}
    base = override(config, {f"selector.{name}": value for name, value in learning.items() if value is not None})
    if (source is None) != (target is None):
        raise UsageError(f"--source is {source} and --target is {target}, but a pair needs both; give the missing one")
    pairs = [text.split(":") for text in pair or ()]
    if wrong := [":".join(sides) for sides in pairs if len(sides) != 2 or not all(sides)]:
        raise UsageError(f"--pair is {wrong[0]}; give SOURCE:TARGET with one colon, or --source and --target")
    named = [(source, target)] if source else []
    places = [{"source": one, "target": other} for one, other in (*named, *pairs)] or [{}]
    runs = [settle(override(base, place | {"seed": n})) for place in places for n in seed or [base.seed]]
    with Progress(verbosity=int(verbose)) as progress:
        training = train_selector(runs, output_dir, overwrite, progress)
    _print_curve(training.reward_curve)
    echo(f"the policy is in {output_dir}; use it with: l2a distill --selector {output_dir}")


@selector_app.command("evaluate")
@with_run_options(PAIR_OPTIONS)
def evaluate(
    config: DistillConfig, policy: Policy,
    updates: Annotated[int | None, Option(min=1, help="Real updates for each; by default a round's.")] = None,
    verbose: Verbose = False,
) -> None:  # fmt: skip
    """Compare a saved policy with every rule, at the same keep rate and updates, on a pair it never saw."""
    from l2a.pipeline.policies import evaluate_policy, open_policy, pair_name

    trained = open_policy(policy)
    with Progress(verbosity=int(verbose)) as progress:
        result = evaluate_policy(config, trained, updates, progress)
    best_first = sorted(result.verdicts, key=lambda verdict: -verdict.real)
    rows = [(row.name, str(row.kept), f"{row.surrogate:+.4f}", f"{row.real:+.4f}") for row in best_first]
    print_table(("selector", "kept", "surrogate gain", "real gain"), rows)
    surrogate = "of the output layer alone, against keeping nothing"
    real = f"after {result.updates} updates of the student; Spearman correlation of the two: {result.correlation:.2f}"
    echo(f"gain in following the teacher on texts set apart, in nats; surrogate: {surrogate}; real: {real}")
    if pair_name(config) in trained.facts.get("pairs", []):
        echo(f"note: the policy was trained on {pair_name(config)}")


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
    read = f"the oracles read {found['labels']:,} target labels and {found['judged_on']:,} others judged"
    echo(f"{read}, for this diagnosis alone: no run reads them\n{headroom_note(found)}")


@selector_app.command("show")
@with_run_options(PAIR_OPTIONS)
def show(config: DistillConfig, context: Context, policy: Policy, verbose: Verbose = False) -> None:
    """Show how a policy was trained and, on a pair of domains, what it learned."""
    from l2a.pipeline.policies import explain_policy, open_policy

    trained = open_policy(policy)
    facts = {"agent": trained.agent, **trained.facts}
    curve = facts.pop("reward_curve", [])
    print_facts(facts)
    _print_curve(curve)
    if context.params["source"] is None and context.params["target"] is None:
        echo("give --source and --target to see what it keeps there")
        return
    with Progress(verbosity=int(verbose)) as progress:
        _print_inspection(explain_policy(config, trained, progress))


def _print_curve(curve: Sequence[float]) -> None:
    if curve:
        low, spread = min(curve), max(max(curve) - min(curve), 1e-12)
        bars = "".join(BARS[round((len(BARS) - 1) * (value - low) / spread)] for value in curve)
        echo(f"reward of training episodes, mean gain in nats: {curve[0]:+.4f} {bars} {curve[-1]:+.4f}")


def _print_inspection(explained: Any) -> None:
    importances = [(name, f"{loss:+.4f}", f"{part:.0%}") for name, (loss, part) in explained.importances.items()]
    print_table(("feature", "loss (nats)", "decisions changed"), importances, "permutation importance")
    quartiles, shares = explained.quartiles.items(), explained.operators.items()
    rows = [(name, *(" ".join(f"{value:.3g}" for value in side) for side in sides)) for name, sides in quartiles]
    rows += [(f"operator {name}", *(f"{share:.0%}" for share in kept_and_dropped)) for name, kept_and_dropped in shares]
    print_table(("feature", "kept", "dropped"), rows, "quartiles: lower, median, upper")
    texts = []
    for side, chosen in (("kept", explained.kept_texts), ("dropped", explained.dropped_texts)):
        texts += [(side, f"{score:+.2f}", shorten(" | ".join(text), 200)) for score, text in chosen]
    print_table(("", "score", "text"), texts)


@experiment_app.command("run")
def run_experiment(
    card: Card,
    data_root: Annotated[Path | None, Option(help="Folder that the card's data paths start from.")] = None,
    results: Results = Path("benchmarks/results"),
    workers: Annotated[int | None, Option(min=1, help="Groups of cells in parallel; default: one a core.")] = None,
    backend: Annotated[str, Option(help="loky: processes on this machine; dask: a cluster.")] = "loky",
    address: Annotated[str | None, Option(help="Scheduler of a running cluster; a local one by default.")] = None,
    only: Annotated[list[str] | None, Option(help="Part of 'pair shots seed variant'; may be repeated.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print cells, cache and cost; run nothing.")] = False,
) -> None:
    """Run the cells of a card that are not finished; stop and start it as you like."""
    import joblib

    from l2a.experiments import card as cards, runner
    from l2a.pipeline.methods import run_method

    where = runner.Workers(joblib.cpu_count() if workers is None else workers, backend, address)
    experiment = cards.load_experiment(card)
    groups = cards.choose(cards.expand(experiment, data_root), only or [""])
    cards.refuse_missing_agents(groups)
    folder, total = results / experiment.name, sum(map(len, groups))
    with Progress() as progress:
        planned = runner.plan(groups, cards.data_files(groups, progress), runner.read_results(folder))
        if dry_run:
            minutes = runner.cost_seconds(planned, where.count) / 60
            _print_plan(planned, f"about {minutes:.1f} minutes on {where.count} workers")
            return
        outcomes = runner.run_groups(planned, folder.resolve(), run_method, where, progress)
    failed = [f"failed: {cell.place.name}: {message}" for cell, status, message in outcomes if status == "failed"]
    ran = sum(outcome.status == "ran" for outcome in outcomes)
    echo("\n".join([*failed, f"{folder}: {ran} cells ran, {total - len(failed)} of {total} are finished"]))
    if failed:
        raise RunError(f"{len(failed)} of {total} cells failed; see above, and run the command again after the fix")


def _print_plan(groups: Sequence[Any], time: str) -> None:
    cells, rows = [planned for group in groups for planned in group], []
    for planned in cells:
        mark = planned.teacher_mark
        teacher = "none" if mark is None else "cached" if mark.exists() else "to train"
        left = ("finished", teacher, "") if planned.is_finished else ("to run", teacher, f"{planned.seconds:.0f}")
        rows.append((planned.cell.place.name, *left))
    print_table(("cell", "result", "teacher", "seconds"), rows)
    to_run = sum(not planned.is_finished for planned in cells)
    echo(f"{len(cells)} cells, {to_run} to run: {time}, estimated from the finished cells")


@experiment_app.command("report")
def report_experiment(
    card: Card, results: Results = Path("benchmarks/results"),
    pages: Annotated[Path, Option(help="Folder of report pages.")] = Path("docs/experiments"),
) -> None:  # fmt: skip
    """Write a card's page, figures and summary from its results alone."""
    from l2a.experiments import card as cards, report, runner

    experiment = cards.load_experiment(card)
    page, data = pages / f"{experiment.name}.md", results / f"{experiment.name}.json"
    summary = report.summarise(experiment, runner.read_results(results / experiment.name))
    report.write_report(page, summary)
    report.write_summary(data, summary)
    echo(f"{page} and {data}: {len(summary.results)} cells, {summary.missing} missing")
