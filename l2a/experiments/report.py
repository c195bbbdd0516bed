"""The page of a card, with figures that are legible in print, on any page, and without telling colours apart."""

import io
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from l2a.experiments.results import LEVEL, RESAMPLES, Estimate, RankAgreement, Slice, Summary
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
    drawings: dict[str, Callable[[Summary], Figure]] = {"methods": _draw_methods, "pairs": _draw_pairs}
    if len(summary.card.shots) > 1:
        drawings["shots"] = _draw_shots
    files = {name: folder / f"{name}.svg" for name in drawings}
    for name, draw in drawings.items():
        with matplotlib.rc_context(STYLE):
            save_figure(draw(summary), files[name])
    return files


def _draw_methods(summary: Summary) -> Figure:
    """The mean accuracy of each variant with its interval, best on top, and the mean on each pair behind it."""
    ordered = summary.best_first
    figure, axes = _new_figure(7.0, 0.9 + 0.32 * len(ordered))
    for position, variant in enumerate(ordered):
        style, level = _style(summary, variant), summary.levels[Slice(variant)]
        levels = summary.levels.items()
        on_pairs = [100 * it.mean for at, it in levels if at.pair and at == Slice(variant, pair=at.pair)]
        axes.plot(on_pairs, [position] * len(on_pairs), "|", color="#888888", markersize=9, markeredgewidth=1.2)
        axes.hlines(position, 100 * level.low, 100 * level.high, color=style["color"], linewidth=2)
        axes.plot(100 * level.mean, position, markersize=7, **style)
    axes.set_yticks(range(len(ordered)), ordered)
    axes.set_ylim(len(ordered) - 0.5, -0.5)
    axes.set_xlabel("accuracy, % (mean and 95 % interval; grey: mean on each pair)")
    return figure


def _draw_pairs(summary: Summary) -> Figure:
    """The accuracy of each variant on each pair, one panel a pair: the mean and every cell."""
    pairs, variants = [pair.name for pair in summary.card.pairs], summary.variants
    columns = min(3, len(pairs))
    rows = -(-len(pairs) // columns)
    figure = Figure(figsize=(7.4, rows * (0.75 + 0.2 * len(variants)) + 0.35), facecolor="white", layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, pair in zip(panels.flat, pairs, strict=False):
        for position, variant in enumerate(variants):
            cells = (result for result in summary.results if (result.variant, result.pair) == (variant, pair))
            values = [100 * result.accuracy for result in cells]
            style = _style(summary, variant)
            axes.plot(values, [position] * len(values), alpha=0.45, markersize=3, **style)
            if values:
                axes.plot(np.mean(values), position, markersize=6, **style)
        axes.set_title(pair, fontsize=9)
    for axes in panels.flat[len(pairs) :]:
        axes.set_visible(False)
    panels[0, 0].set_yticks(range(len(variants)), variants)
    panels[0, 0].set_ylim(len(variants) - 0.5, -0.5)
    figure.supxlabel("accuracy, % (large: mean; small: each cell)", fontsize=9)
    return _framed(figure)


def _draw_shots(summary: Summary) -> Figure:
    """Learning curves: the mean accuracy of each variant over the number of labelled target examples."""
    figure, axes = _new_figure(7.0, 4.2)
    shots = sorted(summary.card.shots)
    offsets = np.linspace(-0.06, 0.06, max(2, len(summary.variants)))  # in octaves, so that the intervals stay apart
    for variant, offset in zip(summary.variants, offsets, strict=False):
        points = [(k, level) for k in shots if (level := summary.level(variant, shots=k)) is not None]
        means = [100 * level.mean for _, level in points]
        below = [100 * (level.mean - level.low) for _, level in points]
        above = [100 * (level.high - level.mean) for _, level in points]
        axes.errorbar(
            [k * 2**offset for k, _ in points], means, yerr=[below, above], label=variant, elinewidth=0.9,
            linewidth=1.4, markersize=5, **_style(summary, variant) | {"linestyle": "-"},
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


def _new_figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    return _framed(figure), figure.subplots()


def _framed(figure: Figure) -> Figure:
    """A white sheet with an edge stays legible on a page of any colour."""
    figure.patch.set_edgecolor("#BBBBBB")
    figure.patch.set_linewidth(1.0)
    return figure


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
pair) and cover new pairs and new draws of the few labels. The interquartile mean leaves out the lowest and the \
highest quarter of the cells. p-values come from two-sided Wilcoxon signed-rank tests on paired cells, Holm-corrected \
over all pairs of methods. Cells of one pair of domains are not independent, so if test and interval disagree, trust \
the interval. `seconds` is a method's own training and selection on one thread, without the shared teacher work."""


def write_report(
    path: Path, summary: Summary, figures: Mapping[str, Path], agreements: Sequence[RankAgreement] = ()
) -> None:
    """Write the page of a card.

    Args:
        path: The Markdown file.
        summary: The numbers.
        figures: Figures by name, as made by ``write_figures``.
        agreements: How far another budget ranks the variants alike, when it has run.
    """
    links = {name: Path(os.path.relpath(file, path.parent)).as_posix() for name, file in figures.items()}
    card = summary.card
    sections = [
        _head(summary),
        "## Methods\n\n" + _methods_table(summary) + "\n\n" + METHOD_NOTE,
        f"![Mean accuracy of each method]({links['methods']})",
        "## Pairs\n\nMean accuracy, %; the best of each pair in bold.\n\n" + _pairs_table(summary),
        f"![Accuracy of each method on each pair]({links['pairs']})",
        "## Comparisons\n\n" + _comparisons(summary),
    ]
    if "shots" in links:
        head = [f"{k} per class" for k in card.shots]
        table = _table(summary, head, lambda name: [_percent(summary.level(name, shots=k)) for k in card.shots])
        sections.append(f"## Learning curves\n\n{table}\n\n![Learning curves]({links['shots']})")
    if len(card.students) > 1:
        names = card.students
        table = _table(summary, names, lambda name: [_percent(summary.level(name, student=it)) for it in names])
        sections.append(f"## Students\n\nMean accuracy, %.\n\n{table}")
    if agreements:
        sections.append(agreement_section(card.name, card.same_variants_in or "", agreements))
    sections.append("## Origin\n\n" + _origin(summary))
    atomic_write_text(path, "\n\n".join(sections) + "\n")


def agreement_section(first: str, second: str, agreements: Iterable[RankAgreement]) -> str:
    """Say how far two budgets rank variants alike.

    Args:
        first: Name of the first card.
        second: Name of the second card.
        agreements: One a metric.

    Returns:
        Markdown.
    """
    parts = ["## Do both budgets rank the methods in the same order?"]
    for item in agreements:
        ranked = sorted(((*means, variant) for variant, means in item.means.items()), reverse=True)
        rows = [[f"`{variant}`", f"{100 * one:.1f}", f"{100 * other:.1f}"] for one, other, variant in ranked]
        metric = {"accuracy": "Accuracy", "macro_f1": "Macro-F1"}[item.metric]
        parts.append(
            f"{metric}: Spearman rank correlation {item.spearman:.2f} over {len(item.means)} methods, on the "
            f"{item.cells} cells that both cards have for each (mean over pairs: {item.mean_spearman_of_pairs:.2f})."
        )
        parts.append(_markdown(["method", f"`{first}`, %", f"`{second}`, %"], rows))
    return "\n\n".join(parts)


def _head(summary: Summary) -> str:
    card, seeds = summary.card, sorted({result.seed for result in summary.results})
    shots = ", ".join(map(str, card.shots))
    lines = [
        f"# Experiment `{card.name}`\n\n{card.description.strip()}",
        f"{len(summary.results)} cells: {len(card.pairs)} pairs, {shots} labelled target examples per class, "
        f"seeds {', '.join(map(str, seeds))}, {len(summary.variants)} methods, budget `{card.preset}`.",
    ]
    if summary.missing:
        different = "the means of the methods may be over different cells"
        lines.append(f"**{summary.missing} cells have not run yet:** {different}.")
    if summary.outdated:
        lines.append(f"**{summary.outdated} cells were run with settings that differ from the card's.**")
    lines.append(f"Written by `l2a experiment report {card.name}`; run the cells by `l2a experiment run {card.name}`.")
    return "\n\n".join(lines)


def _methods_table(summary: Summary) -> str:
    def cells(variant: str) -> list[str]:
        results = [result for result in summary.results if result.variant == variant]
        level = summary.levels[Slice(variant)]
        middle = _interval(level.interquartile_mean, level.interquartile_low, level.interquartile_high)
        parameters = sum(result.parameters for result in results) / len(results)
        seconds = sum(result.seconds for result in results) / len(results)
        percents = [_percent(level), middle, _percent(summary.level(variant, "macro_f1"))]
        return [*percents, f"{parameters:,.0f}", f"{seconds:.1f}", str(len(results))]

    head = ["accuracy, %", "interquartile mean, %", "macro-F1, %", "parameters", "seconds", "cells"]
    return _table(summary, head, cells)


def _pairs_table(summary: Summary) -> str:
    pairs = [pair.name for pair in summary.card.pairs]
    means = {at: it.mean for at, it in summary.levels.items() if at.metric == "accuracy" and at.pair is not None}
    best = {pair: max((mean for at, mean in means.items() if at.pair == pair), default=0.0) for pair in pairs}

    def cell(variant: str, pair: str) -> str:
        mean = means.get(Slice(variant, pair=pair))
        return "-" if mean is None else f"**{100 * mean:.1f}**" if mean == best[pair] else f"{100 * mean:.1f}"

    return _table(summary, pairs, lambda name: [cell(name, pair) for pair in pairs])


def _comparisons(summary: Summary) -> str:
    """The matrix of all differences, and the list of those of better methods from worse ones with their tests."""
    found = {(it.variant, it.baseline): it for it in summary.comparisons if it.metric == "accuracy"}
    order = summary.best_first
    stars = {both: "\\*" if it.p_value < 0.05 else "" for both, it in found.items()}
    cells = {both: f"{100 * it.mean_difference:+.1f}{stars[both]}" for both, it in found.items()}
    matrix = [[f"`{name}`", *(cells.get((name, baseline), "") for baseline in order)] for name in order]
    rows = []
    for item in (found[both] for both in itertools.combinations(order, 2) if both in found):
        counts = f"{item.wins} / {item.ties} / {item.losses}"
        difference = _interval(item.mean_difference, item.low, item.high, sign="+")
        rows.append([f"`{item.variant}`", f"`{item.baseline}`", difference, f"{item.p_value:.2g}", counts])
    caption = "Mean difference in accuracy, row minus column, in points; * marks p < 0.05 after Holm's correction."
    head = ["method", "against", "accuracy difference, points", "p", "wins / ties / losses"]
    return "\n\n".join([caption, _markdown(["", *(f"`{name}`" for name in order)], matrix), _markdown(head, rows)])


def _origin(summary: Summary) -> str:
    results = summary.results
    files = {name: digest for result in results for name, digest in result.data.items()}
    labels = sorted({result.labels_used for result in results})
    versions = {", ".join(f"{name} {number}" for name, number in result.versions.items()) for result in results}
    machine = "{platform}, {cores} cores, {memory_gib} GiB, {device}"
    machines = sorted({machine.format_map(result.machine) for result in results})
    hours = sum(result.wall_seconds for result in results) / 3600
    splits = "including the reward and validation splits"
    lines = [
        f"Labelled target examples used by a cell, {splits}: {', '.join(map(str, labels))}.",
        f"Run with {'; '.join(sorted(versions))}.",
        f"On {'; '.join(machines)}; {hours:.1f} hours of cells, including teacher work that was not cached.",
        _code(summary),
        _markdown(["file", "sha256"], [[f"`{name}`", f"`{digest}`"] for name, digest in sorted(files.items())]),
    ]
    return "\n\n".join(lines)


def _code(summary: Summary) -> str:
    """Say which code ran the cells, and which of them the package as it is now did not."""
    made = Counter(result.code for result in summary.results)
    named = [f"`{code[:12]}` ({count} cells)" for code, count in sorted(made.items()) if code]
    named += [f"not recorded ({made['']} cells)"] if made[""] else []
    other = [f"{summary.other_code[name]} of `{name}`" for name in summary.variants if summary.other_code[name]]
    which = "all" if summary.other_code.total() == len(summary.results) else ", ".join(other) or "none"
    return f"Code that ran the cells: {', '.join(named)}; cells not run by the code that wrote this page: {which}."


def _percent(level: Estimate | None) -> str:
    return _interval(level.mean, level.low, level.high) if level else "-"


def _interval(value: float, low: float, high: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def _table(summary: Summary, head: Sequence[str], cells: Callable[[str], Sequence[str]]) -> str:
    """A table with a line for each variant, the best first."""
    return _markdown(["method", *head], [[f"`{variant}`", *cells(variant)] for variant in summary.best_first])


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
