"""The command ``l2a selector``: train a policy, compare it with the rules, show what it learned."""

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from l2a.config import DistillConfig
    from l2a.selector.select import Inspection
    from l2a.util.progress import RunProgress


selector_app = typer.Typer(help="Train, compare and explain selection policies.", no_args_is_help=True)
TEXT_WIDTH = 200
BARS = "▁▂▃▄▅▆▇█"

Policy = Annotated[str, typer.Argument(help="Folder of a saved policy, or a card in agents/ that names one.")]
Source = Annotated[str | None, typer.Option(help="Source domain: card, file, folder or Hub id.")]
Target = Annotated[str | None, typer.Option(help="Target domain: card, file, folder or Hub id.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the few labels and of every random draw.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show every event.")]
RUN_OPTIONS = {
    "preset": "quick, default, full, or any card in ./configs.",
    "config": "YAML file; it overrides the preset.",
    "teacher": "minilm-l6, a model folder or a Hub id.",
    "shots": "Labelled target examples per class for training.",
    "source_text_column": "Column of the source's text.",
    "source_text_pair_column": "Column of its second text, for pairs.",
    "source_label_column": "Column of its label.",
    "target_text_column": "Column of the target's text.",
    "target_text_pair_column": "Column of its second text, for pairs.",
    "target_label_column": "Column of its label.",
}


def _with_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of ``RUN_OPTIONS``; it gets them as ``run``."""

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        command(run={name: given.pop(name) for name in RUN_OPTIONS}, **given)

    own = [one for one in inspect.signature(command).parameters.values() if one.name != "run"]
    kinds = {"config": Path | None, "shots": int | None}
    shared = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default="default" if name == "preset" else None,
            annotation=Annotated[kinds.get(name, str | None), typer.Option(help=text)],
        )
        for name, text in RUN_OPTIONS.items()
    ]
    own = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own]
    with_options.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
    return with_options


def _config(run: Mapping[str, Any], **more: Any) -> "DistillConfig":
    from l2a.config import load_config

    flags = {"teacher.model": run["teacher"], "shots": run["shots"], **more}
    for side, name in itertools.product(("source", "target"), ("text", "text_pair", "label")):
        flags[f"{side}_columns.{name}"] = run[f"{side}_{name}_column"]
    return load_config(run["preset"], run["config"], flags)


@selector_app.command("train")
@_with_run_options
def train(
    run: Mapping[str, Any],
    output_dir: Annotated[Path, typer.Option(help="Folder of the policy.")],
    source: Source = None,
    target: Target = None,
    pair: Annotated[list[str] | None, typer.Option(help="A further pair as SOURCE:TARGET; repeatable.")] = None,
    agent: Annotated[str | None, typer.Option(help="A card that learns: ppo (default), a2c, dvrl ...")] = None,
    steps: Annotated[int | None, typer.Option(help="Environment steps over all pairs.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seed of labels and draws; repeatable.")] = None,
    tensorboard: Annotated[str | None, typer.Option(help="Folder for TensorBoard.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a policy.")] = False,
    verbose: Verbose = False,
) -> None:
    """Train one policy on one pair of domains or several, and save it."""
    from l2a.config import SelectorConfig, override
    from l2a.pipeline.policies import train_selector

    learning = {"agent": agent, "training_steps": steps, "tensorboard": tensorboard}
    base = _config(run, **{f"selector.{name}": value for name, value in learning.items()})
    if agent is None and base.selector.agent == SelectorConfig().agent:  # which is trained already
        base = override(base, {"selector.agent": "ppo"})
    places = [{"source": s, "target": t} if s else {} for s, t in _pairs(source, target, pair or [])]
    runs = [override(base, {**place, "seed": n}) for place, n in itertools.product(places, seed or [base.seed])]
    with _progress(verbose) as progress:
        training = train_selector(runs, output_dir, overwrite, progress)
    _print_curve(training.reward_curve)
    typer.echo(f"the policy is in {output_dir}; use it with: l2a distill --selector {output_dir}")


@selector_app.command("evaluate")
@_with_run_options
def evaluate(
    run: Mapping[str, Any],
    policy: Policy,
    source: Source = None,
    target: Target = None,
    updates: Annotated[int | None, typer.Option(min=1, help="Real updates for each; by default a round's.")] = None,
    seed: Seed = None,
    verbose: Verbose = False,
) -> None:
    """Compare a saved policy with every rule, at the same keep rate and updates, on a pair it never saw."""
    from l2a.pipeline.policies import evaluate_policy, open_policy, pair_name

    trained, facts = open_policy(policy)
    pair = _config(run, source=source, target=target, seed=seed)
    with _progress(verbose) as progress:
        result = evaluate_policy(pair, trained, updates, progress)
    best_first = sorted(result.verdicts, key=lambda verdict: -verdict.real)
    rows = [(row.name, str(row.kept), f"{row.surrogate:+.4f}", f"{row.real:+.4f}") for row in best_first]
    _print_table(("selector", "kept", "surrogate gain", "real gain"), rows)
    typer.echo(
        "gain of the log-likelihood on the reward split, in nats; surrogate: in a few steps, against texts without "
        f"influence; real: after {result.updates} updates of the student; Spearman correlation of the two: "
        f"{result.correlation:.2f}"
    )
    if pair_name(pair) in facts.get("pairs", []):
        typer.echo(f"note: the policy was trained on {pair_name(pair)}")


@selector_app.command("show")
@_with_run_options
def show(
    run: Mapping[str, Any],
    policy: Policy,
    source: Source = None,
    target: Target = None,
    seed: Seed = None,
    verbose: Verbose = False,
) -> None:
    """Show how a policy was trained and, on a pair of domains, what it learned."""
    from l2a.pipeline.policies import explain_policy, open_policy

    trained, facts = open_policy(policy)
    for name, value in {"agent": trained.agent, **facts}.items():
        if name != "reward_curve":
            typer.echo(f"{name:<18} {_flat(value)}")
    _print_curve(facts.get("reward_curve", []))
    if source is None and target is None:
        typer.echo("give --source and --target to see what it keeps there")
        return
    pair = _config(run, source=source, target=target, seed=seed)
    with _progress(verbose) as progress:
        explained = explain_policy(pair, trained, progress)
    _print_inspection(explained)


def _pairs(source: str | None, target: str | None, more: Sequence[str]) -> list[tuple[str | None, str | None]]:
    from l2a.util.errors import UsageError

    if (source is None) != (target is None):
        raise UsageError(f"--source is {source} and --target is {target}, but a pair needs both; give the missing one")
    wrong = [text for text in more if text.count(":") != 1 or text[0] == ":" or text[-1] == ":"]
    if wrong:
        raise UsageError(f"--pair is {wrong[0]}; give SOURCE:TARGET with one colon, or --source and --target")
    pairs: list[tuple[str | None, str | None]] = [(source, target)] if source or not more else []
    return pairs + [(text.split(":")[0], text.split(":")[1]) for text in more]


def _progress(verbose: bool) -> "closing[RunProgress]":
    from l2a.util.progress import RunProgress

    return closing(RunProgress(None, int(verbose)))


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _print_curve(curve: Sequence[float]) -> None:
    if curve:
        low, spread = min(curve), max(max(curve) - min(curve), 1e-12)
        bars = "".join(BARS[round((len(BARS) - 1) * (value - low) / spread)] for value in curve)
        typer.echo(f"reward of training episodes, mean gain in nats: {curve[0]:+.4f} {bars} {curve[-1]:+.4f}")


def _print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*headers, box=SIMPLE, title=title)
    for row in rows:
        table.add_row(*map(escape, row))
    Console(highlight=False, soft_wrap=True).print(table)


def _print_inspection(explained: "Inspection") -> None:
    importances = [(name, f"{loss:+.4f}", f"{part:.0%}") for name, (loss, part) in explained.importances.items()]
    _print_table(("feature", "loss (nats)", "decisions changed"), importances, "permutation importance")
    values = [
        (name, *(" ".join(f"{value:.3g}" for value in side) for side in sides))
        for name, sides in explained.quartiles.items()
    ]
    shares = [(f"operator {name}", f"{kept:.0%}", f"{drop:.0%}") for name, (kept, drop) in explained.operators.items()]
    _print_table(("feature", "kept", "dropped"), [*values, *shares], "quartiles: lower, median, upper")
    texts = [
        (side, f"{score:+.2f}", shorten(" | ".join(text), TEXT_WIDTH))
        for side, chosen in (("kept", explained.kept_texts), ("dropped", explained.dropped_texts))
        for score, text in chosen
    ]
    _print_table(("", "score", "text"), texts)
