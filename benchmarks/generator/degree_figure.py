"""Draws docs/generator/degree.svg from benchmarks/results/degree.json: accuracy against the degree of change.

l2a experiment run degree --data-root DATA && l2a experiment report degree
python benchmarks/generator/degree_figure.py
"""

import json
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from l2a.experiments.report import COLOURS, MARKERS, STYLE, save_figure

RESULTS = Path(__file__).parents[1] / "results" / "degree.json"
FIGURE = Path(__file__).parents[2] / "docs" / "generator" / "degree.svg"
SIZES, DEGREES = (100, 1000, 8000), (10, 30, 50, 70)
LABELS = {"fine_tuning": "fine-tuning", "kd": "distillation"}


def main() -> None:
    """Read the cells and write the figure."""
    accuracies: dict[str, list[float]] = {}
    for cell in json.loads(RESULTS.read_text("utf-8"))["cells"]:
        accuracies.setdefault(cell["variant"], []).append(100 * cell["accuracy"])
    with matplotlib.rc_context(STYLE):
        save_figure(draw(accuracies), FIGURE)


def draw(accuracies: dict[str, list[float]]) -> Figure:
    """Draw one panel for each size, both ways of training in each.

    Args:
        accuracies: In %, by variant of the card; variants without a finished cell may be missing.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(7.4, 2.8), facecolor="white", layout="constrained", edgecolor="#BBBBBB", linewidth=1.0)
    panels = figure.subplots(1, len(SIZES), sharey=True)
    for axes, size in zip(panels, SIZES, strict=True):
        for number, (name, label) in enumerate(LABELS.items()):
            cells = {degree: accuracies.get(f"{name}_{size}_{degree}", []) for degree in DEGREES}
            done = [degree for degree, values in cells.items() if values]
            style = {"color": COLOURS[number], "marker": MARKERS[number]}
            axes.plot(done, [np.mean(cells[degree]) for degree in done], label=label, **style)
            for degree in done:
                axes.plot([degree] * len(cells[degree]), cells[degree], ".", color=COLOURS[number], alpha=0.4)
        axes.set_title(f"{size:,} source texts at most", fontsize=9)
        axes.set_xticks(DEGREES)
        axes.set_xlabel("changed tokens, %")
    panels[0].set_ylabel("accuracy, %")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    main()
