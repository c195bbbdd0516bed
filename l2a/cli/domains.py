"""The command ``l2a domains``: list the cards, show one, check data before it is used."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from l2a.domains.check import DomainReport, SplitReport

domains_app = typer.Typer(help="List, show and check domains.", no_args_is_help=True)
SHOWN_PROBLEMS = 50


@domains_app.command("list")
def list_domains() -> None:
    """List the domain cards: those in ./domains, then the shipped ones."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from l2a.cards import list_cards
    from l2a.domains.card import load_card

    table = Table("name", "labels", "train/dev/test", "licence", "description", box=SIMPLE)
    for name in list_cards("domains"):
        card = load_card(name)
        sizes = "/".join(str(size) for size in card.sizes.values()) or "?"
        table.add_row(name, ", ".join(card.labels), sizes, card.licence, card.description)
    Console().print(table)


@domains_app.command("show")
def show_domain(name: Annotated[str, typer.Argument(help="Name of a domain card.")]) -> None:
    """Show one domain card: task, labels, origin, licence, sizes."""
    from rich.console import Console
    from rich.table import Table

    from l2a.cards import find_card
    from l2a.domains.card import load_card

    card = load_card(name)
    origin = f"{card.artifact.package} {card.artifact.version} ({card.artifact.kind})" if card.artifact else card.data
    facts = {
        "name": card.name,
        "description": card.description,
        "task": card.task,
        "labels": ", ".join(card.labels),
        "sizes": ", ".join(f"{split} {size}" for split, size in card.sizes.items()) or "not on the card",
        "licence": card.licence,
        "citation": card.citation or "none",
        "origin": origin or "",
        "card": str(find_card("domains", name)),
    }
    table = Table.grid(padding=(0, 2))
    for key, value in facts.items():
        table.add_row(key, value)
    Console(highlight=False).print(table)


@domains_app.command("check")
def check(
    path: Annotated[str, typer.Argument(help="A card's name, a file, a folder of splits, or a Hub id name[:config].")],
    text_column: Annotated[str | None, typer.Option(help="Column of the (first) text.")] = None,
    text_pair_column: Annotated[str | None, typer.Option(help="Column of the second text of a pair.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the label.")] = None,
) -> None:
    """Print sizes, label balance, lengths, duplicates and overlaps, and what is wrong, by line."""
    from rich.console import Console

    from l2a.domains.check import check_domain
    from l2a.domains.domain import Columns
    from l2a.progress import RunProgress

    progress = RunProgress(log_file=None)
    try:
        report = check_domain(path, Columns(text_column, text_pair_column, label_column), None, progress)
    finally:
        progress.close()
    _print_report(report, Console(highlight=False, soft_wrap=True))
    if report.problems:
        raise typer.Exit(2)


def _print_report(report: "DomainReport", console: "Console") -> None:
    from rich.box import SIMPLE
    from rich.markup import escape
    from rich.table import Table

    if report.splits:
        kind = "pairs of texts" if report.is_pair else "single texts"
        console.print(f"{escape(report.name)}: {kind}, labels: {escape(', '.join(report.label_names))}")
        table = Table("", *(split.split for split in report.splits), box=SIMPLE)
        columns = [_split_column(split, report.label_names) for split in report.splits]
        for fact, *cells in zip(_facts(report.label_names), *columns, strict=True):
            table.add_row(escape(fact), *cells)
        console.print(table)
    for note in _notes(report):
        console.print(f"note: {note}")
    for problem in report.problems[:SHOWN_PROBLEMS]:
        console.print(f"[red]wrong:[/red] {escape(str(problem))}")
    if len(report.problems) > SHOWN_PROBLEMS:
        console.print(f"and {len(report.problems) - SHOWN_PROBLEMS} more problems")
    if not report.problems:
        console.print("nothing is wrong")


def _facts(label_names: tuple[str, ...]) -> list[str]:
    lengths = ("words, median", "words, longest", "characters, longest")
    return ["examples", *(f"label {name}" for name in label_names), *lengths, "duplicates"]


def _split_column(split: "SplitReport", label_names: tuple[str, ...]) -> list[str]:
    counts = [split.label_counts.get(name, 0) for name in label_names]
    balance = [f"{count} ({count / split.size:.0%})" for count in counts]
    lengths = (split.median_words, split.longest_words, split.longest_characters)
    return [str(split.size), *balance, *map(str, lengths), str(split.duplicates)]


def _notes(report: "DomainReport") -> list[str]:
    """Facts that a user should know but that do not stop a run."""
    notes = [
        f"{overlap.texts} texts of {overlap.first} also stand in {overlap.second}; "
        + ("they are never drawn for training" if overlap.second == "test" else "copies are drawn once")
        for overlap in report.overlaps
    ]
    if report.contradictions:
        notes.append(f"{report.contradictions} texts carry different labels in different rows")
    if not report.problems and not any(split.split == "test" for split in report.splits):
        notes.append("there is no test split, so the domain can only be a source")
    return notes
