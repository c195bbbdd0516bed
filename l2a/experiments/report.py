"""The page of a card, with figures that are legible in print, on any page, and without telling colours apart."""

import io
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from l2a.experiments.results import LEVEL, RESAMPLES, Estimate, Summary
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
# A white sheet with an edge stays legible on a page of any colour.
SHEET: dict[str, Any] = {"facecolor": "white", "layout": "constrained", "edgecolor": "#BBBBBB", "linewidth": 1.0}
Dots = tuple[Estimate | None, Sequence[float]]
"""A mean with its interval, and the values behind it."""


def write_report(path: Path, summary: Summary) -> None:
    """Write the page of a card, and its figures into a folder beside it that has the card's name.

    Args:
        path: The Markdown file.
        summary: The numbers.
    """
    methods: dict[str, Dots] = {}
    pairs: dict[str, dict[str, Dots]] = {pair.name: {} for pair in summary.card.pairs}
    for name in summary.best_first:
        for pair, panel in pairs.items():
            values = [it.accuracy for it in summary.results if (it.variant, it.pair) == (name, pair)]
            panel[name] = (summary.level(name, pair=pair), values)
        methods[name] = (summary.level(name), [level.mean for pair in pairs if (level := pairs[pair][name][0])])
    with matplotlib.rc_context(STYLE):
        figures = {
            "methods": _draw_dots(summary, {"": methods}, "accuracy, % (mean with 95 % interval; small: each pair)"),
            "pairs": _draw_dots(summary, pairs, "accuracy, % (mean with 95 % interval; small: each cell)"),
        }
        if len(summary.card.shots) > 1:
            figures["shots"] = _draw_shots(summary)
        for name, figure in figures.items():
            save_figure(figure, path.parent / summary.card.name / f"{name}.svg")
    atomic_write_text(path, render_page(summary))


def render_page(summary: Summary) -> str:
    """Write the text of a card's page.

    Args:
        summary: The numbers.

    Returns:
        Markdown; its figures are those of ``write_report``.
    """
    card, results = summary.card, summary.results
    on_pairs = [(at.pair, level.mean) for at, level in summary.levels.items() if at.metric == "accuracy" and at.pair]
    made = Counter(result.code for result in results)
    named = [f"`{code[:12]}` ({count} cells)" for code, count in sorted(made.items()) if code]
    other = [f"{summary.other_code[name]} of `{name}`" for name in summary.variants if summary.other_code[name]]
    machine = "{platform}, {cores} cores, {memory_gib} GiB, {device}"
    template = (Path(__file__).parent / "page.md.jinja").read_text("utf-8")
    page = jinja2.Template(template, trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    rendered: str = page.render(
        summary=summary,
        card=card,
        interval=LEVEL,
        resamples=RESAMPLES,
        combinations=itertools.combinations,
        seeds=sorted({result.seed for result in results}),
        best={pair: max(mean for where, mean in on_pairs if where == pair) for pair, _ in on_pairs},
        found={(it.variant, it.baseline): it for it in summary.comparisons if it.metric == "accuracy"},
        labels=sorted({result.labels_used for result in results}),
        versions=sorted({", ".join(f"{name} {it}" for name, it in result.versions.items()) for result in results}),
        machines=sorted({machine.format_map(result.machine) for result in results}),
        made=[*named, *([f"not recorded ({made['']} cells)"] if made[""] else [])],
        other="all" if summary.other_code.total() == len(results) else ", ".join(other) or "none",
        files={name: digest for result in results for name, digest in result.data.items()},
    )
    return rendered


def _draw_dots(summary: Summary, panels: Mapping[str, Mapping[str, Dots]], label: str) -> Figure:
    """A panel for each title, a row for each variant, the best on top: its mean, the interval, the values behind it."""
    order, columns = summary.best_first, min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(7.4, rows * (0.75 + 0.22 * len(order)) + 0.35), **SHEET)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, dots) in zip(grid.flat, panels.items(), strict=False):
        axes.set_title(title, fontsize=9)
        for position, name in enumerate(order):
            style, (level, values) = _style(summary, name), dots[name]
            axes.plot(100 * np.array(values), [position] * len(values), alpha=0.45, markersize=3, **style)
            if level is not None:
                axes.hlines(position, 100 * level.low, 100 * level.high, color=style["color"], linewidth=1.5)
                axes.plot(100 * level.mean, position, markersize=6, **style)
    grid[0, 0].set_yticks(range(len(order)), order)
    grid[0, 0].set_ylim(len(order) - 0.5, -0.5)
    figure.supxlabel(label, fontsize=9)
    return figure


def _draw_shots(summary: Summary) -> Figure:
    """Learning curves: the mean accuracy of each variant over the number of labelled target examples."""
    figure, shots = Figure(figsize=(7.0, 4.2), **SHEET), sorted(summary.card.shots)
    axes = figure.subplots()
    offsets = np.linspace(-0.06, 0.06, max(2, len(summary.variants)))  # in octaves, so that the intervals stay apart
    for name, offset in zip(summary.variants, offsets, strict=False):
        points = [(k, level) for k in shots if (level := summary.level(name, shots=k)) is not None]
        means, lows, highs = (100 * np.array([getattr(it, end) for _, it in points]) for end in ("mean", "low", "high"))
        axes.errorbar(
            [k * 2**offset for k, _ in points], means, yerr=[means - lows, highs - means], label=name, elinewidth=0.9,
            linewidth=1.4, markersize=5, **_style(summary, name) | {"linestyle": "-"},
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(shots, [str(k) for k in shots])
    axes.set_xlabel("labelled target examples per class")
    axes.set_ylabel("accuracy, % (mean, 95 % interval)")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _style(summary: Summary, variant: str) -> dict[str, Any]:
    number = summary.variants.index(variant)
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "linestyle": "none"}


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as SVG, the same bytes for the same drawing; to be called inside ``rc_context(STYLE)``.

    Args:
        figure: What was drawn.
        path: The file.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, edgecolor=figure.get_edgecolor())
    atomic_write_bytes(path, buffer.getvalue())
