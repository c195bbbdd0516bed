"""The comparison as a table: its cells for the terminal, and Markdown for pages."""

from collections.abc import Sequence

from l2a.evaluation.metrics import Interval
from l2a.report.row import Row

HEADERS = ("classifier", "accuracy %", "macro-F1 %", "parameters", "ms", "ms in 32")
SHORT_HEADERS = ("classifier", "accuracy %", "F1 %", "size", "ms", "ms/32")


def table_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Format rows, one cell for each of ``HEADERS``.

    Args:
        rows: In the order to show.

    Returns:
        A tuple of strings for each row.
    """
    return [
        (
            row.name,
            _percent(row.metrics.accuracy),
            _percent(row.metrics.macro_f1),
            f"{row.parameters / 1e6:.2f} M",
            *(f"{row.latency_ms[name]:.2f}" for name in ("batch_1", "batch_32")),
        )
        for row in rows
    ]


def short_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Format rows for a terminal of 80 columns, one cell for each of ``SHORT_HEADERS``.

    Args:
        rows: In the order to show.

    Returns:
        A tuple of strings for each row.
    """
    return [
        (name, accuracy, f"{100 * row.metrics.macro_f1.value:.1f}", *rest)
        for row, (name, accuracy, _, *rest) in zip(rows, table_cells(rows), strict=True)
    ]


def markdown_table(rows: Sequence[Row]) -> str:
    """Lay rows out as a Markdown table.

    Args:
        rows: In the order to show.

    Returns:
        The table's lines, ending with a newline.
    """
    lines = [HEADERS, ("---", *["---:"] * (len(HEADERS) - 1)), *table_cells(rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _percent(interval: Interval) -> str:
    value, low, high = (100.0 * number for number in (interval.value, interval.low, interval.high))
    return f"{value:.1f} ({low:.1f}-{high:.1f})"
