"""The command ``l2a selector``: train a policy, compare it with the rules, show what it learned."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l2a.cli.options import RUN_OPTIONS, Overwrite, Verbose, print_table, with_run_options
from l2a.config import DistillConfig, SelectorConfig, override
from l2a.util.errors import UsageError
from l2a.util.progress import Progress

if TYPE_CHECKING:
    from l2a.selector.select import Inspection

selector_app = typer.Typer(help="Train, compare and explain selection policies.", no_args_is_help=True)
BARS = "▁▂▃▄▅▆▇█"
Policy = Annotated[str, typer.Argument(help="Folder of a saved policy, or a card in agents/ that names one.")]
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


def _print_inspection(explained: "Inspection") -> None:
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
