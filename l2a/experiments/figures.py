"""Figures of a report: legible in print, on a light and on a dark page, and without telling colours apart."""

import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from l2a.experiments.statistics import values_of
from l2a.experiments.summary import Summary
from l2a.files import atomic_write_bytes

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
