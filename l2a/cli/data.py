"""The commands ``l2a domains``, ``l2a augment`` and ``l2a pretrain``."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import typer

from l2a.cli.options import Encoder, Overwrite, Quiet, TextColumn, TextPairColumn, Verbose, print_facts, print_table
from l2a.config import Columns
from l2a.util.cards import find_card, list_cards
from l2a.util.errors import UsageError
from l2a.util.progress import Progress

domains_app = typer.Typer(help="List, show and check domains.", no_args_is_help=True)


@domains_app.command("list")
def list_domains() -> None:
    """List the domain cards: the shipped ones and those in ./domains."""
    from l2a.data.domains import load_card

    shown, skipped = [], []
    for name in list_cards("domains"):
        try:
            card = load_card(name)
        except UsageError as error:
            skipped.append(f"note: skipped, because it is not a domain card: {error}")
            continue
        facts = (card.description, f"labels: {_labels(card.labels)}", _sizes(card.sizes), f"licence: {card.licence}")
        shown.append((name, "\n".join(facts)))
    print_facts(shown)
    typer.echo("".join(f"{note}\n" for note in skipped), nl=False)


@domains_app.command("show")
def show_domain(name: Annotated[str, typer.Argument(help="Name of a domain card.")]) -> None:
    """Show one domain card: task, labels, origin, licence, sizes."""
    from l2a.data.domains import load_card

    card = load_card(name)
    origin = f"{card.artifact.package} {card.artifact.version} ({card.artifact.kind})" if card.artifact else card.data
    facts = {name: getattr(card, name) for name in ("name", "description", "task")}
    facts |= {"labels": _labels(card.labels), "sizes": _sizes(card.sizes), "licence": card.licence}
    facts |= {"citation": card.citation or "none", "origin": origin, "card": find_card("domains", name)}
    print_facts((key, str(value)) for key, value in facts.items())


def _labels(names: Sequence[str]) -> str:
    return ", ".join(names) or "none, it is text for --unlabelled"


def _sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{split} {size}" for split, size in sizes.items()) or "sizes not given"


@domains_app.command("check")
def check(
    path: Annotated[str, typer.Argument(help="A card's name, a file, a folder of splits, or a Hub id name[:config].")],
    text_column: TextColumn = None,
    text_pair_column: TextPairColumn = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the label.")] = None,
) -> None:
    """Print sizes, label balance, lengths, duplicates and overlaps, and what is wrong, by line."""
    from l2a.data.domains import check_domain

    with Progress() as progress:
        found, counts, notes = check_domain(path, Columns(text_column, text_pair_column, label_column), None, progress)
    if counts:
        kind = "pairs of texts" if found.is_pair else "single texts"
        typer.echo(f"{found.name}: {kind}, labels: {_labels(sorted(found.label_names))}")
        facts = next(iter(counts.values()))
        rows = [(fact, *(_cell(fact, of_split) for of_split in counts.values())) for fact in facts]
        print_table(("", *counts), rows)
    lines = [f"note: {note}" for note in notes]
    lines += [f"wrong: {problem}" for problem in found.problems[:50]]
    if len(found.problems) > 50:
        lines.append(f"and {len(found.problems) - 50} more problems")
    typer.echo("\n".join(lines if found.problems else [*lines, "nothing is wrong"]))
    if found.problems:
        raise typer.Exit(2)


def _cell(fact: str, counts: Mapping[str, int]) -> str:
    count = counts[fact]
    return f"{count} ({count / counts['examples']:.0%})" if fact.startswith("label ") else str(count)


def augment_command(
    input: Annotated[
        Path, typer.Argument(help="Texts: .txt (one per line) or a table such as .csv, .jsonl or .parquet.")
    ],
    output: Annotated[Path, typer.Argument(help="Where the new texts go: a .jsonl or .parquet file.")],
    operator: Annotated[str, typer.Option(help="Such as knn or eda; an unknown name lists all.")] = "augpro_mix",
    degree: Annotated[
        str | None, typer.Option(help='Share of the tokens to change, or "auto"; by default the operator\'s own.')
    ] = None,
    copies: Annotated[int, typer.Option(min=1, help="New texts per text.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of every random draw.")] = 0,
    source: Annotated[
        str | None, typer.Option(help="File or domain whose texts are mixed in; by default the input itself.")
    ] = None,
    teacher: Encoder = "minilm-l6",
    student: Annotated[str | None, typer.Option(help="For augpro_fgsm: a student with the teacher's labels.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per step; it also changes the random draws.")] = 256,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens read of each text.")] = 128,
    text_column: TextColumn = None,
    text_pair_column: TextPairColumn = None,
    source_text_column: Annotated[str | None, typer.Option(help="Column of the text in --source.")] = None,
    source_text_pair_column: Annotated[str | None, typer.Option(help="Column of its second text, for pairs.")] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Make new texts from a file of texts; the output file appears when all are made."""
    from l2a.pipeline.augment import AugmentJob, augment_file

    source_columns = Columns(source_text_column or text_column, source_text_pair_column or text_pair_column)
    job = AugmentJob(
        input, output, operator, _parse_degree(degree), copies, seed, source, teacher, student, batch_size, max_length,
        overwrite, Columns(text_column, text_pair_column), source_columns,
    )  # fmt: skip
    with Progress(verbosity=-1 if quiet else 0) as progress:
        written = augment_file(job, progress)
    if not quiet:
        typer.echo(f"{written} texts are in {output}")


def _parse_degree(degree: str | None) -> Literal["auto"] | float | None:
    if degree is None or degree == "auto":
        return degree  # type: ignore[return-value]
    with suppress(ValueError):
        if 0 < float(degree) <= 1:
            return float(degree)
    raise UsageError(f'--degree is {degree!r}; give "auto" or a share above 0 and at most 1')


def pretrain_command(
    text: Annotated[
        list[str], typer.Option(help="Text, labelled or not: a file, a folder, a domain or a Hub id; repeatable.")
    ],
    output_dir: Annotated[Path, typer.Option(help="Folder of the student; the same command resumes a run.")],
    protect: Annotated[
        list[str] | None,
        typer.Option(help="A domain whose texts must not be used, such as a later target; repeatable."),
    ] = None,
    teacher: Encoder = "minilm-l6",
    steps: Annotated[int, typer.Option(help="Optimizer steps, of 128 texts each.")] = 4000,
    seed: Annotated[int, typer.Option(help="Seed of initial weights, texts and order.")] = 0,
    max_length: Annotated[int, typer.Option(help="Longest input in tokens.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 8e-4,
    embedding_size: Annotated[int, typer.Option(help="Width of the student's word embeddings.")] = 80,
    hidden_size: Annotated[int, typer.Option(help="Width of its layers.")] = 128,
    layers: Annotated[int, typer.Option(help="Number of its layers.")] = 2,
    overwrite: Overwrite = False,
    verbose: Verbose = False,
) -> None:
    """Distil a small general student from a pretrained encoder, without labels."""
    from l2a.pretrain.trainer import PretrainConfig, pretrain

    config = PretrainConfig(
        output_dir, tuple(text), tuple(protect or ()), teacher, steps, seed, max_length, learning_rate, embedding_size,
        hidden_size, layers, overwrite,
    )  # fmt: skip
    with Progress(verbosity=int(verbose)) as progress:
        folder = pretrain(config, progress)
    typer.echo(f"the general student is in {folder}; use it with: l2a distill --student {folder}")
