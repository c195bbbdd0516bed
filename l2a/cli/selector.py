"""The command ``l2a selector``: train a policy, compare it with the rules, show what it learned."""

import itertools
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from l2a.config import DistillConfig
    from l2a.selector.select import Inspection
    from l2a.util.progress import RunProgress


selector_app = typer.Typer(help="Train, compare and explain selection policies.", no_args_is_help=True)
TEXT_WIDTH = 200

Policy = Annotated[str, typer.Argument(help="Folder of a saved policy, or a card in agents/ that names one.")]
Source = Annotated[str | None, typer.Option(help="Source domain: card, file, folder or Hub id.")]
Target = Annotated[str | None, typer.Option(help="Target domain, likewise.")]
Preset = Annotated[str, typer.Option(help="quick, default, full, or any card in ./configs.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file; it overrides the preset.")]
Teacher = Annotated[str | None, typer.Option(help="minilm-l6, a model folder or a Hub id.")]
Shots = Annotated[int | None, typer.Option(help="Labelled target examples per class for training.")]
Seed = Annotated[int | None, typer.Option(help="Decides the few labels and every random draw.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show every event.")]


@selector_app.command("train")
def train(
    output_dir: Annotated[Path, typer.Option(help="Folder of the policy.")],
    source: Source = None,
    target: Target = None,
    pair: Annotated[list[str] | None, typer.Option(help="A further pair as SOURCE:TARGET; repeatable.")] = None,
    agent: Annotated[
        str | None, typer.Option(help="A card in agents/ that learns: ppo (default), a2c, dvrl ...")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Environment steps over all pairs.")] = None,
    preset: Preset = "default",
    config: ConfigFile = None,
    teacher: Teacher = None,
    shots: Shots = None,
    seed: Annotated[list[int] | None, typer.Option(help="Few labels and draws of each pair; repeatable.")] = None,
    tensorboard: Annotated[str | None, typer.Option(help="Folder for TensorBoard.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a policy.")] = False,
    verbose: Verbose = False,
) -> None:
    """Train one policy on one pair of domains or several, and save it."""
    from l2a.config import SelectorConfig, load_config, override
    from l2a.pipeline.policies import train_selector

    flags = {
        "teacher.model": teacher, "shots": shots, "selector.agent": agent, "selector.training_steps": steps,
        "selector.tensorboard": tensorboard,
    }  # fmt: skip
    base = load_config(preset, config, flags)
    if agent is None and base.selector.agent == SelectorConfig().agent:  # which is trained already
        base = override(base, {"selector.agent": "ppo"})
    pairs = _pairs(source, target, pair or [])
    places = [{"source": s, "target": t} if s else {} for s, t in pairs]
    runs = [override(base, {**place, "seed": n}) for place, n in itertools.product(places, seed or [base.seed])]
    with _progress(verbose) as progress:
        training = train_selector(runs, output_dir, overwrite, progress)
    _print_curve(_console(), training.reward_curve)
    _console().print(f"the policy is in {output_dir}; use it with: l2a distill --selector {output_dir}", markup=False)


@selector_app.command("evaluate")
def evaluate(
    policy: Policy,
    source: Source = None,
    target: Target = None,
    updates: Annotated[int | None, typer.Option(help="Real updates for each; by default those of a round.")] = None,
    preset: Preset = "default",
    config: ConfigFile = None,
    teacher: Teacher = None,
    shots: Shots = None,
    seed: Seed = None,
    verbose: Verbose = False,
) -> None:
    """Compare a saved policy with every rule, at the same keep rate and updates, on a pair it never saw."""
    from rich.box import SIMPLE
    from rich.table import Table

    from l2a.pipeline.policies import evaluate_policy, open_policy, pair_name

    if updates is not None and updates < 1:
        raise typer.BadParameter(f"{updates} came; at least 1 is needed", param_hint="--updates")
    trained, facts = open_policy(policy)
    run = _config(preset, config, source, target, teacher, shots, seed)
    with _progress(verbose) as progress:
        result = evaluate_policy(run, trained, updates, progress)
    table = Table("selector", "kept", "surrogate gain", "real gain", box=SIMPLE)
    for row in sorted(result.verdicts, key=lambda verdict: -verdict.real):
        table.add_row(row.name, str(row.kept), f"{row.surrogate:+.4f}", f"{row.real:+.4f}")
    console = _console()
    console.print(table)
    console.print(
        f"gain of the log-likelihood on the reward split, in nats; surrogate: in a few steps, against texts without "
        f"influence; real: after {result.updates} updates of the student; Spearman correlation of the two: "
        f"{result.correlation:.2f}"
    )
    if pair_name(run) in facts.get("pairs", []):
        console.print(f"note: the policy was trained on {pair_name(run)}", markup=False)


@selector_app.command("show")
def show(
    policy: Policy,
    source: Source = None,
    target: Target = None,
    preset: Preset = "default",
    config: ConfigFile = None,
    teacher: Teacher = None,
    shots: Shots = None,
    seed: Seed = None,
    verbose: Verbose = False,
) -> None:
    """Show how a policy was trained and, on a pair of domains, what it learned."""
    from l2a.pipeline.policies import explain_policy, open_policy

    trained, facts = open_policy(policy)
    console = _console()
    _print_facts(console, {"agent": trained.agent, **facts})
    _print_curve(console, facts.get("reward_curve", []))
    if source is None and target is None:
        console.print("give --source and --target to see what it keeps there")
        return
    run = _config(preset, config, source, target, teacher, shots, seed)
    with _progress(verbose) as progress:
        explained = explain_policy(run, trained, progress)
    _print_inspection(console, explained)


def _pairs(source: str | None, target: str | None, more: Sequence[str]) -> list[tuple[str | None, str | None]]:
    from l2a.util.errors import UsageError

    if (source is None) != (target is None):
        raise UsageError(f"--source {source} --target {target}: one is missing; a pair needs both")
    wrong = [text for text in more if text.count(":") != 1 or text[0] == ":" or text[-1] == ":"]
    if wrong:
        raise UsageError(f"--pair {wrong[0]}: SOURCE:TARGET with one colon is needed; else use --source and --target")
    pairs: list[tuple[str | None, str | None]] = [(source, target)] if source or not more else []
    return pairs + [(text.split(":")[0], text.split(":")[1]) for text in more]


def _config(
    preset: str,
    file: Path | None,
    source: str | None,
    target: str | None,
    teacher: str | None,
    shots: int | None,
    seed: int | None,
) -> "DistillConfig":
    from l2a.config import load_config

    flags = {"source": source, "target": target, "teacher.model": teacher, "shots": shots, "seed": seed}
    return load_config(preset, file, flags)


def _progress(verbose: bool) -> "closing[RunProgress]":
    from l2a.util.progress import RunProgress

    return closing(RunProgress(None, int(verbose)))


def _console() -> "Console":
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def _print_facts(console: "Console", facts: Mapping[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if name != "reward_curve":
            table.add_row(escape(name), escape(_flat(value)))
    console.print(table)


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _print_curve(console: "Console", curve: Sequence[float]) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    if not curve:
        return
    low, spread = min(curve), max(max(curve) - min(curve), 1e-12)
    table = Table("episodes", "mean gain (nats)", "", box=SIMPLE, title="reward of training episodes")
    for number, value in enumerate(curve, 1):
        bar = "#" * (1 + round(29 * (value - low) / spread))
        table.add_row(f"{number / len(curve):.0%}", f"{value:+.4f}", bar)
    console.print(table)


def _print_inspection(console: "Console", explained: "Inspection") -> None:
    from rich.box import SIMPLE
    from rich.markup import escape
    from rich.table import Table

    importance = Table("feature", "loss (nats)", "decisions changed", box=SIMPLE, title="permutation importance")
    for name, item in explained.importances.items():
        importance.add_row(name, f"{item.loss:+.4f}", f"{item.changed:.0%}")
    values = Table("feature", "kept", "dropped", box=SIMPLE, title="quartiles: lower, median, upper")
    for name, (kept, dropped) in explained.quartiles.items():
        values.add_row(name, *(" ".join(f"{value:.3g}" for value in side) for side in (kept, dropped)))
    for name, (share, other) in explained.operators.items():
        values.add_row(f"operator {name}", f"{share:.0%}", f"{other:.0%}")
    texts = Table("", "score", "text", box=SIMPLE)
    for side, chosen in (("kept", explained.kept_texts), ("dropped", explained.dropped_texts)):
        for score, text in chosen:
            texts.add_row(side, f"{score:+.2f}", escape(shorten(" | ".join(text), TEXT_WIDTH)))
    for table in (importance, values, texts):
        console.print(table)
