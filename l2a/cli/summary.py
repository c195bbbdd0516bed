"""What ``l2a distill`` prints at its end."""

from typing import TYPE_CHECKING

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

    from l2a.report.table import SHORT_HEADERS, short_cells

    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for number, header in enumerate(SHORT_HEADERS):
        table.add_column(header, justify="right" if number else "left", no_wrap=True)
    for cells in short_cells(result.rows):
        table.add_row(*cells)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(
        "95 % bootstrap intervals over the test examples; ms: CPU milliseconds a text, alone and in batches of 32"
    )
    agreement = [facts["selector"].get("tier_correlation") for facts in result.metrics.get("rounds", [])]
    if agreement and None not in agreement:
        values = ", ".join(f"{value:.2f}" for value in agreement)
        console.print(f"selector: rank correlation of its fast reward with real distillation {values}, one a round")
    console.print(f"model: {result.output_dir / 'student'}    evidence: {result.output_dir / 'metrics.json'}")
