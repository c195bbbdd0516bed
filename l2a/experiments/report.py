"""What the finished cells of a card say: means, intervals, paired tests, the page, and figures that print legibly.

Intervals are 95 % percentile bootstrap intervals of a two-level resampling, pairs with replacement, then seeds inside
each drawn pair: they speak of new pairs and new draws of the few labels, and are as wide as a handful of pairs makes
them.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.figure
import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests

from l2a.experiments.card import ExperimentCard, Place, cell_key, expand
from l2a.experiments.runner import CellResult
from l2a.report.page import render
from l2a.util import UsageError, atomic_write_text, files

RESAMPLES, LEVEL = 2000, 0.95
# Okabe and Ito (2008), without their yellow, which is too pale for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
STYLE = matplotlib.rc_params_from_file(Path(__file__).with_name("figures.mplstyle"), use_default_template=False)
"""A white sheet, whose edge shows on a page of any colour."""


class Estimate(NamedTuple):
    """Level of a variant over some cells: their number, the mean as a fraction and the ends of its interval."""

    cells: int
    mean: float
    low: float
    high: float


def estimate(values: pd.Series) -> Estimate:
    """Estimate a mean with its two-level bootstrap interval from one value a cell, by place; at least one."""
    places = tuple(values.groupby(level=axis).ngroup().to_numpy() for axis in ("pair", "seed", "shots"))
    cube = np.full([place.max() + 1 for place in places], np.nan)  # NaN where a cell is missing
    cube[places] = values
    pairs, seeds, _ = cube.shape
    rng = np.random.default_rng(0)  # the same draws for every interval, so that adding a variant moves no other
    drawn_pairs = rng.integers(pairs, size=(RESAMPLES, pairs, 1))
    replicates = cube[drawn_pairs, rng.integers(seeds, size=(RESAMPLES, pairs, seeds))].reshape(RESAMPLES, -1)
    means = np.nanmean(replicates[~np.isnan(replicates).all(axis=1)], axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(len(values), float(np.nanmean(cube)), float(low), float(high))


def compare(table: pd.DataFrame, variants: Sequence[str], metric: str) -> list[dict[str, Any]]:
    """Compare every variant with every other one on the cells that both have.

    Args:
        table: A row for each place, a column for each variant; NaN where a cell is missing.
        variants: Names, in the order of the report.
        metric: What the table holds.

    Returns:
        Both directions of every pair of variants with a common cell, in the given order: the mean difference with its
        interval, the p-value of the signed-rank test after Holm's correction over all pairs, and who is ahead in how
        many cells.
    """
    pairs = list(itertools.combinations(variants, 2))
    # Rounded, so that equal differences of fractions tie in the ranks of the test.
    common = [(table[one] - table[other]).dropna().round(12) for one, other in pairs]
    differences = {both: found for both, found in zip(pairs, common, strict=True) if len(found)}
    p_values = [stats.wilcoxon(found).pvalue if found.any() else 1.0 for found in differences.values()]
    corrected = multipletests(p_values, method="holm")[1] if p_values else ()
    comparisons = []
    for ((one, other), found), p in zip(differences.items(), corrected, strict=True):
        cells, mean, low, high = estimate(found)
        wins, losses = int((found > 0).sum()), int((found < 0).sum())
        forward = {
            "variant": one, "baseline": other, "metric": metric, "mean_difference": mean, "low": low, "high": high,
            "p_value": float(p), "wins": wins, "ties": cells - wins - losses, "losses": losses, "cells": cells,
        }  # fmt: skip
        back = {"variant": other, "baseline": one, "mean_difference": 0.0 - mean, "low": 0.0 - high, "high": 0.0 - low}
        comparisons += [forward, forward | back | {"wins": losses, "losses": wins}]
    return sorted(comparisons, key=lambda it: (variants.index(it["variant"]), variants.index(it["baseline"])))


class Summary(NamedTuple):
    """What a card's cells say."""

    card: ExperimentCard
    results: tuple[CellResult, ...]  # finished cells of the card, sorted
    variants: list[str]  # those that have results, in the card's order, and then by falling mean accuracy
    best_first: list[str]
    missing: int  # cells of the card without a result
    outdated: int  # cells that were run with other settings than the card gives now
    levels: dict[tuple[str, str, str, Any], Estimate]
    comparisons: list[dict[str, Any]]

    def level(self, variant: str, metric: str = "accuracy", axis: str = "pair", value: Any = None) -> Estimate | None:
        """Look up the mean of a variant, over one "pair" or number of "shots" if its value is given."""
        return self.levels.get((variant, metric, axis, value))


def summarise(card: ExperimentCard, results: Sequence[CellResult]) -> Summary:
    """Compute everything that a report says of a card's finished cells; those that it no longer has are left out.

    Raises:
        UsageError: If no cell of the card is finished.
    """
    cells = {cell.place: cell for group in expand(card, None) for cell in group}
    known = tuple(result for result in results if result.place in cells)
    if not known:
        needed = f"run them first: l2a experiment run {card.name}"
        raise UsageError(f"results: none of the {len(cells)} cells of card {card.name} is finished; {needed}")
    frame, (*place, variant_column) = pd.DataFrame(map(vars, known)), Place._fields
    tables = {name: frame.pivot(index=place, columns=variant_column, values=name) for name in ("accuracy", "macro_f1")}
    variants = [name for name in card.variants if name in tables["accuracy"]]
    axes: list[tuple[str, Any]] = [("pair", None), *(("pair", pair.name) for pair in card.pairs)]
    axes += [("shots", shots) for shots in card.shots if len(card.shots) > 1]
    levels = {}
    for variant, metric, (axis, value) in itertools.product(variants, tables, axes):
        values = tables[metric][variant].dropna()
        chosen = values if value is None else values[values.index.get_level_values(axis) == value]
        if len(chosen):
            levels[variant, metric, axis, value] = estimate(chosen)
    best_first = sorted(variants, key=lambda name: -levels[name, "accuracy", "pair", None].mean)
    outdated = sum(cell_key(cells[result.place], result.data) != result.key for result in known)
    comparisons = [item for metric, table in tables.items() for item in compare(table, variants, metric)]
    return Summary(card, known, variants, best_first, len(cells) - len(known), outdated, levels, comparisons)


def write_summary(path: Path, summary: Summary) -> None:
    """Write the summary as JSON, one entry a line, so that changes can be reviewed."""

    def written(value: Any) -> str:
        if isinstance(value, list) and value:
            return "[\n" + ",\n".join(f"  {written(entry)}" for entry in value) + "\n ]"
        return files.to_json(value)

    card, places = summary.card, {"pair": None, "shots": None}
    shown = (*Place._fields, "accuracy", "macro_f1", "parameters", "labels_used", "seconds", "key")
    parts = {
        "card": card.name, "description": card.description, "preset": card.preset, "missing": summary.missing,
        "outdated": summary.outdated, "cells": [{name: getattr(it, name) for name in shown} for it in summary.results],
        "means": [{"variant": variant, "metric": metric, **places, axis: value, **level._asdict()}
                  for (variant, metric, axis, value), level in summary.levels.items()],
        "comparisons": summary.comparisons,
    }  # fmt: skip
    lines = ",\n".join(f' "{name}": {written(value)}' for name, value in parts.items())
    atomic_write_text(path, f"{{\n{lines}\n}}\n")


def write_report(path: Path, summary: Summary) -> None:
    """Write the Markdown page of a card, and its figures into a folder beside it that has the card's name."""
    pairs = [pair.name for pair in summary.card.pairs]
    with matplotlib.rc_context(STYLE):
        figures = {"methods": _draw_dots(summary, [None], "pair"), "pairs": _draw_dots(summary, pairs, "cell")}
        if len(summary.card.shots) > 1:
            figures["shots"] = _draw_shots(summary)
        for name, figure in figures.items():
            save_figure(figure, path.parent / summary.card.name / f"{name}.svg")
    atomic_write_text(path, render_page(summary))


def render_page(summary: Summary) -> str:
    """Write the text of a card's page in Markdown; its figures are those of ``write_report``."""
    card, results, machine = summary.card, summary.results, "{platform}, {cores} cores, {memory_gib} GiB, {device}"
    levels = {pair.name: [summary.level(name, value=pair.name) for name in summary.variants] for pair in card.pairs}
    return render(
        Path(__file__).with_name("page.md.jinja"), summary=summary, card=card, results=results,
        code=files.code_fingerprint(), interval=LEVEL, resamples=RESAMPLES, combinations=itertools.combinations,
        best={pair: max((level.mean for level in of_pair if level), default=0) for pair, of_pair in levels.items()},
        found={(it["variant"], it["baseline"]): it for it in summary.comparisons if it["metric"] == "accuracy"},
        versions=sorted({", ".join(f"{name} {it}" for name, it in result.versions.items()) for result in results}),
        machines=sorted({machine.format_map(result.machine) for result in results}),
        files={name: digest for result in results for name, digest in result.data.items()},
    )  # fmt: skip


def _draw_dots(summary: Summary, pairs: Sequence[str | None], behind: str) -> matplotlib.figure.Figure:
    """A panel for each pair, or for all, a row for each variant: its mean, the interval, and the values behind it."""
    order, columns = summary.best_first, min(3, len(pairs))
    rows = -(-len(pairs) // columns)
    figure = matplotlib.figure.Figure(figsize=(7.4, rows * (0.75 + 0.22 * len(order)) + 0.35), linewidth=1.0)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(pairs) :]:
        axes.set_visible(False)
    for axes, pair in zip(grid.flat, pairs, strict=False):
        axes.set_title(pair or "", fontsize=9)
        for position, name in enumerate(order):
            values = [it.accuracy for it in summary.results if (it.variant, it.pair) == (name, pair)]
            if pair is None:
                values = [on.mean for each in summary.card.pairs if (on := summary.level(name, value=each.name))]
            style, level = _style(summary, name), summary.level(name, value=pair)
            axes.plot(100 * np.array(values), [position] * len(values), alpha=0.45, markersize=3, **style)
            if level is not None:
                axes.hlines(position, 100 * level.low, 100 * level.high, color=style["color"], linewidth=1.5)
                axes.plot(100 * level.mean, position, markersize=6, **style)
    grid[0, 0].set(yticks=range(len(order)), yticklabels=order, ylim=(len(order) - 0.5, -0.5))
    figure.supxlabel(f"accuracy, % (mean with 95 % interval; small: each {behind})", fontsize=9)
    return figure


def _draw_shots(summary: Summary) -> matplotlib.figure.Figure:
    """Learning curves: the mean accuracy of each variant over the number of labelled target examples."""
    figure, shots = matplotlib.figure.Figure(figsize=(7.0, 4.2), linewidth=1.0), sorted(summary.card.shots)
    axes = figure.subplots()
    offsets = np.linspace(-0.06, 0.06, max(2, len(summary.variants)))  # in octaves, so that the intervals stay apart
    for name, offset in zip(summary.variants, offsets, strict=False):
        known = {k * 2**offset: level for k in shots if (level := summary.level(name, axis="shots", value=k))}
        means, lows, highs = 100 * np.array([level[1:] for level in known.values()]).T
        axes.errorbar(
            list(known), means, yerr=[means - lows, highs - means], label=name, elinewidth=0.9, linewidth=1.4,
            markersize=5, **_style(summary, name) | {"linestyle": "-"},
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(shots, [str(k) for k in shots])
    axes.set(xlabel="labelled target examples per class", ylabel="accuracy, % (mean, 95 % interval)")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _style(summary: Summary, variant: str) -> dict[str, Any]:
    number = summary.variants.index(variant)
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "linestyle": "none"}


def save_figure(figure: matplotlib.figure.Figure, path: Path) -> None:
    """Write a figure as SVG, the same bytes for the same drawing; to be called inside ``rc_context(STYLE)``."""
    with files.atomic_file(path) as file:
        figure.savefig(file, format="svg", metadata={"Date": None})
