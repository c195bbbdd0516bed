"""Figures of a report: legible in print, on a light and on a dark page, and without telling colours apart."""

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from l2a.experiments.results import CellResult
from l2a.experiments.statistics import LEVEL, RESAMPLES, Comparison, Estimate, RankAgreement, Summary, values_of
from l2a.util.files import atomic_write_bytes, atomic_write_text

# Okabe and Ito (2008), without their yellow, which is too pale for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "figure.constrained_layout.h_pad": 0.09,
    "figure.constrained_layout.w_pad": 0.09,
    "svg.hashsalt": "l2a",  # the same results give the same file
}


def write_figures(summary: Summary, folder: Path) -> dict[str, Path]:
    """Draw what a card's cells say.

    Args:
        summary: The numbers.
        folder: Where the SVG files go.

    Returns:
        Files by name: "methods", "pairs" and, where the card varies the shots, "shots".
    """
    drawings = {"methods": methods_figure, "pairs": pairs_figure}
    if len(summary.card.shots) > 1:
        drawings["shots"] = shots_figure
    files = {}
    for name, draw in drawings.items():
        with matplotlib.rc_context(STYLE):
            files[name] = folder / f"{name}.svg"
            save_figure(draw(summary), files[name])
    return files


def methods_figure(summary: Summary) -> Figure:
    """Draw the mean accuracy of each method with its interval, and the mean on each pair behind it.

    Args:
        summary: The numbers.

    Returns:
        The figure, best method on top.
    """
    ordered = summary.best_first
    figure, axes = _new_figure(7.0, 0.9 + 0.32 * len(ordered))
    for position, method in enumerate(ordered):
        level = summary.level(method)
        assert level is not None
        pairs = [summary.level(method, pair=pair.name) for pair in summary.card.pairs]
        on_pairs = [100 * pair.mean for pair in pairs if pair is not None]
        axes.plot(on_pairs, [position] * len(on_pairs), "|", color="#888888", markersize=9, markeredgewidth=1.2)
        axes.hlines(position, 100 * level.low, 100 * level.high, color=_colour(summary, method), linewidth=2)
        axes.plot(100 * level.mean, position, _marker(summary, method), color=_colour(summary, method), markersize=7)
    axes.set_yticks(range(len(ordered)), ordered)
    axes.set_ylim(len(ordered) - 0.5, -0.5)
    axes.set_xlabel("accuracy, % (mean and 95 % interval; grey: mean on each pair)")
    return figure


def pairs_figure(summary: Summary) -> Figure:
    """Draw the accuracy of each method on each pair: the mean and every cell.

    Args:
        summary: The numbers.

    Returns:
        The figure, one panel a pair.
    """
    pairs, methods = [pair.name for pair in summary.card.pairs], summary.methods
    columns = min(3, len(pairs))
    rows = -(-len(pairs) // columns)
    figure = Figure(figsize=(7.4, rows * (0.75 + 0.2 * len(methods)) + 0.35), facecolor="white", layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, pair in zip(panels.flat, pairs, strict=False):
        _draw_pair(axes, summary, pair)
    for axes in panels.flat[len(pairs) :]:
        axes.set_visible(False)
    panels[0, 0].set_yticks(range(len(methods)), methods)
    panels[0, 0].set_ylim(len(methods) - 0.5, -0.5)
    figure.supxlabel("accuracy, % (large: mean; small: each cell)", fontsize=9)
    _frame(figure)
    return figure


def shots_figure(summary: Summary) -> Figure:
    """Draw learning curves: the mean accuracy of each method over the number of labelled target examples.

    Args:
        summary: The numbers.

    Returns:
        The figure.
    """
    figure, axes = _new_figure(7.0, 4.2)
    shots = sorted(summary.card.shots)
    offsets = np.linspace(-0.06, 0.06, max(2, len(summary.methods)))  # in octaves, so that the intervals stay apart
    for method, offset in zip(summary.methods, offsets, strict=False):
        points = [(k, level) for k in shots if (level := summary.level(method, shots=k)) is not None]
        places = [k * 2**offset for k, _ in points]
        means = [100 * level.mean for _, level in points]
        below = [100 * (level.mean - level.low) for _, level in points]
        above = [100 * (level.high - level.mean) for _, level in points]
        axes.errorbar(
            places, means, yerr=[below, above], fmt=f"{_marker(summary, method)}-", color=_colour(summary, method),
            label=method, elinewidth=0.9, linewidth=1.4, markersize=5,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(shots, [str(k) for k in shots])
    axes.set_xlabel("labelled target examples per class")
    axes.set_ylabel("accuracy, % (mean, 95 % interval)")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _draw_pair(axes: Any, summary: Summary, pair: str) -> None:
    for position, method in enumerate(summary.methods):
        found = values_of(summary.results, method, "accuracy")
        values = [100 * value for place, value in found.items() if place.pair == pair]
        style = {"color": _colour(summary, method), "marker": _marker(summary, method), "linestyle": "none"}
        axes.plot(values, [position] * len(values), alpha=0.45, markersize=3, **style)
        if values:
            axes.plot(np.mean(values), position, markersize=6, **style)
    axes.set_title(pair, fontsize=9)


def _colour(summary: Summary, method: str) -> str:
    return COLOURS[summary.methods.index(method) % len(COLOURS)]


def _marker(summary: Summary, method: str) -> str:
    return MARKERS[summary.methods.index(method) % len(MARKERS)]


def _new_figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    axes = figure.subplots()
    _frame(figure)
    return figure, axes


def _frame(figure: Figure) -> None:
    """A white sheet with an edge stays legible on a page of any colour."""
    figure.patch.set_edgecolor("#BBBBBB")
    figure.patch.set_linewidth(1.0)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as SVG, the same bytes for the same drawing; to be called inside ``rc_context(STYLE)``.

    Args:
        figure: What was drawn.
        path: The file.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, edgecolor=figure.get_edgecolor())
    atomic_write_bytes(path, buffer.getvalue())


METHOD_NOTE = f"""\
Brackets are {LEVEL:.0%} bootstrap intervals ({RESAMPLES} resamples of the pairs, then of the seeds inside each drawn \
pair): they speak of new pairs and new draws of the few labels. The interquartile mean leaves out the lowest and the \
highest quarter of the cells. p-values are of two-sided Wilcoxon signed-rank tests on the differences of the same \
cells, Holm-corrected over all pairs of methods; cells of one pair of domains resemble each other, so where test and \
interval disagree, believe the interval. `seconds` is a method's own training and selection on one thread, shared \
teacher work aside."""


def write_report(
    path: Path, summary: Summary, figures: Mapping[str, Path], agreements: Sequence[RankAgreement] = ()
) -> None:
    """Write the page of a card.

    Args:
        path: The Markdown file.
        summary: The numbers.
        figures: Figures by name, as made by ``write_figures``.
        agreements: How far another budget ranks the methods alike, when it has run.
    """
    links = {name: Path(os.path.relpath(file, path.parent)).as_posix() for name, file in figures.items()}
    sections = [
        _head(summary),
        "## Methods\n\n" + _methods_table(summary) + "\n\n" + METHOD_NOTE,
        f"![Mean accuracy of each method]({links['methods']})",
        "## Pairs\n\nMean accuracy, %; the best of each pair in bold.\n\n" + _pairs_table(summary),
        f"![Accuracy of each method on each pair]({links['pairs']})",
        "## Comparisons\n\n" + _matrix(summary) + "\n\n" + _comparisons_table(summary),
    ]
    if "shots" in links:
        sections.append("## Learning curves\n\n" + _shots_table(summary) + f"\n\n![Learning curves]({links['shots']})")
    if len(summary.card.students) > 1:
        sections.append("## Students\n\nMean accuracy, %.\n\n" + _students_table(summary))
    if agreements:
        sections.append(agreement_section(summary.card.name, summary.card.same_methods_in or "", agreements))
    sections.append("## Origin\n\n" + _origin(summary))
    atomic_write_text(path, "\n\n".join(sections) + "\n")


def agreement_section(first: str, second: str, agreements: Iterable[RankAgreement]) -> str:
    """Say how far two budgets rank methods alike.

    Args:
        first: Name of the first card.
        second: Name of the second card.
        agreements: One a metric.

    Returns:
        Markdown.
    """
    parts = ["## Do both budgets rank the methods alike?"]
    for item in agreements:
        rows = [
            [f"`{method}`", f"{100 * one:.1f}", f"{100 * other:.1f}"]
            for one, other, method in sorted(zip(item.first, item.second, item.methods, strict=True), reverse=True)
        ]
        parts.append(
            f"{_metric(item.metric)}: Spearman rank correlation {item.spearman:.2f} over {len(item.methods)} methods, "
            f"on the {item.cells} cells that both cards have for each (mean over pairs: "
            f"{item.mean_spearman_of_pairs:.2f})."
        )
        parts.append(_table(["method", f"`{first}`, %", f"`{second}`, %"], rows))
    return "\n\n".join(parts)


def _head(summary: Summary) -> str:
    card, seeds = summary.card, sorted({result.seed for result in summary.results})
    shots = ", ".join(map(str, card.shots))
    lines = [
        f"# Experiment `{card.name}`\n\n{card.description.strip()}",
        f"{len(summary.results)} cells: {len(card.pairs)} pairs, {shots} labelled target examples per class, "
        f"seeds {', '.join(map(str, seeds))}, {len(summary.methods)} methods, budget `{card.preset}`.",
    ]
    if summary.missing:
        lines.append(
            f"**{summary.missing} cells have not run yet:** methods may differ in the cells behind their means."
        )
    if summary.outdated:
        lines.append(f"**{summary.outdated} cells were run with other settings than the card gives now.**")
    lines.append(f"Written by `l2a experiment report {card.name}`; run the cells by `l2a experiment run {card.name}`.")
    return "\n\n".join(lines)


def _methods_table(summary: Summary) -> str:
    rows = []
    for method in summary.best_first:
        results = [result for result in summary.results if result.method == method]
        f1 = summary.level(method, "macro_f1")
        rows.append(
            [
                f"`{method}`",
                _percent(summary.level(method)),
                _middle(summary.level(method)),
                _percent(f1),
                f"{sum(result.parameters for result in results) / len(results):,.0f}",
                f"{sum(result.seconds for result in results) / len(results):.1f}",
                str(len(results)),
            ]
        )
    head = ["method", "accuracy, %", "interquartile mean, %", "macro-F1, %", "parameters", "seconds", "cells"]
    return _table(head, rows)


def _pairs_table(summary: Summary) -> str:
    pairs = [pair.name for pair in summary.card.pairs]
    levels = {(m, pair): summary.level(m, pair=pair) for m in summary.methods for pair in pairs}
    best = {pair: max((e.mean for (_, p), e in levels.items() if p == pair and e), default=0.0) for pair in pairs}
    rows = []
    for method in summary.best_first:
        found = [(levels[method, pair], best[pair]) for pair in pairs]
        rows.append([f"`{method}`", *(_mean(level, highest) for level, highest in found)])
    return _table(["method", *pairs], rows)


def _matrix(summary: Summary) -> str:
    found = {(item.method, item.baseline): item for item in _of_accuracy(summary)}
    rows = []
    for method in summary.best_first:
        row = [found.get((method, baseline)) for baseline in summary.best_first]
        rows.append([f"`{method}`", *(_difference(item) for item in row)])
    caption = "Mean difference in accuracy, row minus column, in points; * marks p < 0.05 after Holm's correction."
    return caption + "\n\n" + _table(["", *(f"`{name}`" for name in summary.best_first)], rows)


def _comparisons_table(summary: Summary) -> str:
    order = summary.best_first
    rows = []
    for item in sorted(_of_accuracy(summary), key=lambda item: (order.index(item.method), order.index(item.baseline))):
        if order.index(item.method) < order.index(item.baseline):
            interval = f"{100 * item.mean_difference:+.1f} [{100 * item.low:+.1f}, {100 * item.high:+.1f}]"
            counts = f"{item.wins} / {item.ties} / {item.losses}"
            rows.append([f"`{item.method}`", f"`{item.baseline}`", interval, f"{item.p_value:.2g}", counts])
    return _table(["method", "against", "accuracy difference, points", "p", "wins / ties / losses"], rows)


def _shots_table(summary: Summary) -> str:
    rows = [
        [f"`{method}`", *(_percent(summary.level(method, shots=k)) for k in summary.card.shots)]
        for method in summary.best_first
    ]
    return _table(["method", *(f"{k} per class" for k in summary.card.shots)], rows)


def _students_table(summary: Summary) -> str:
    rows = [
        [f"`{method}`", *(_percent(summary.level(method, student=name)) for name in summary.card.students)]
        for method in summary.best_first
    ]
    return _table(["method", *summary.card.students], rows)


def _origin(summary: Summary) -> str:
    files = {name: digest for result in summary.results for name, digest in result.data.items()}
    labels = sorted({result.labels_used for result in summary.results})
    lines = [
        f"Labelled target examples used by a cell, those of the reward and validation splits included: "
        f"{', '.join(map(str, labels))}.",
        f"Ran with {'; '.join(_distinct(_versions(result) for result in summary.results))}.",
        f"On {'; '.join(_distinct(_machine(result) for result in summary.results))}; "
        f"{sum(result.wall_seconds for result in summary.results) / 3600:.1f} hours of cells, "
        "the teacher work that they found missing included.",
        _table(["file", "sha256"], [[f"`{name}`", f"`{digest}`"] for name, digest in sorted(files.items())]),
    ]
    return "\n\n".join(lines)


def _of_accuracy(summary: Summary) -> list[Comparison]:
    return [item for item in summary.comparisons if item.metric == "accuracy"]


def _distinct(values: Iterable[str]) -> list[str]:
    return sorted(set(values))


def _versions(result: CellResult) -> str:
    return ", ".join(f"{name} {number}" for name, number in result.versions.items())


def _machine(result: CellResult) -> str:
    machine = result.machine
    return f"{machine['platform']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['device']}"


def _metric(name: str) -> str:
    return {"accuracy": "Accuracy", "macro_f1": "Macro-F1"}[name]


def _percent(level: Estimate | None) -> str:
    return f"{100 * level.mean:.1f} [{100 * level.low:.1f}, {100 * level.high:.1f}]" if level else "-"


def _middle(level: Estimate | None) -> str:
    if level is None:
        return "-"
    low, high = 100 * level.interquartile_low, 100 * level.interquartile_high
    return f"{100 * level.interquartile_mean:.1f} [{low:.1f}, {high:.1f}]"


def _mean(level: Estimate | None, best: float) -> str:
    if level is None:
        return "-"
    text = f"{100 * level.mean:.1f}"
    return f"**{text}**" if level.mean == best else text


def _difference(item: Comparison | None) -> str:
    if item is None:
        return ""
    return f"{100 * item.mean_difference:+.1f}" + ("\\*" if item.p_value < 0.05 else "")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
