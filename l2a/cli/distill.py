"""The command ``l2a distill`` and what it prints at its end."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    teacher: Annotated[str | None, typer.Option(help="minilm-l6, a model folder or a Hub id.")] = None,
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
