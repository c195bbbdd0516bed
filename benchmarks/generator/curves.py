"""Learning curves with and without augmented texts, with the whole source and with little of it.

    python benchmarks/generator/curves.py --data-root DATA --pair A.jsonl:B.jsonl

Each student of the screening budget is judged after every 20 updates by its calibrated log-likelihood on the target's
dev split. Augmented texts (``augpro_mix``, four times as many as a pool has) come in after the warm-up, as in the row
``augmented_kd_student``, or from the first update on. Writes ``benchmarks/results/generator_curves.json``, a curve at
a time and leaving alone those that it holds, and draws ``docs/generator/curves.svg``.
"""

import argparse
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from l2a.config import DistillConfig, load_config, override
from l2a.experiments.report import COLOURS, STYLE, save_figure
from l2a.kd.trainer import KDTrainer
from l2a.pipeline.session import RunContext, mixture, open_session
from l2a.pipeline.students import draw_texts
from l2a.util.files import atomic_write_text, to_json
from l2a.util.progress import Progress

RESULTS = Path(__file__).parents[1] / "results" / "generator_curves.json"
FIGURE = Path(__file__).parents[2] / "docs" / "generator" / "curves.svg"
SIZES, SEEDS = (200, None), (0,)
STARTS = {"none": None, "after the warm-up": 200, "from the start": 0}
"""Update at which augmented texts come in, or None for a student without any."""
Curve = list[tuple[int, float]]


class Looks(Progress):
    """Keeps the scores of a training's looks."""

    def __init__(self) -> None:
        """Show nothing."""
        super().__init__(None, verbosity=-1)
        self.curve: Curve = []

    def event(self, name: str, **values: Any) -> None:
        """Keep the score of a look."""
        if name == "validation":
            self.curve.append((values["step"], values["log_likelihood"]))


def learning_curve(config: DistillConfig, start: int | None) -> Curve:
    """Train one student and judge it on the dev split as it learns.

    Args:
        config: The pair, the seed and the budget.
        start: Update at which augmented texts come in; None for none.

    Returns:
        Updates and calibrated log-likelihoods.
    """
    context, looks = RunContext(config), Looks()
    session, kd = open_session(context), config.kd
    dev, width = context.data.target.dev, context.teacher.hidden_size
    trainer = KDTrainer(session.student, kd, dev, width, config.max_length, config.seed)
    before = kd.total_steps if start is None else start
    if before:
        trainer.train(*mixture(session, None), before, looks)
    if before < kd.total_steps:
        texts, _ = draw_texts(session, np.random.default_rng([config.seed, 2, 0]))
        trainer.train(*mixture(session, session.labelled(texts)), kd.total_steps - before, looks)
    return looks.curve


def draw(found: dict[str, Curve], pairs: list[str]) -> Figure:
    """Draw a row of panels for each size of the source, a panel for each pair, means over the seeds.

    Args:
        found: Curves by name.
        pairs: The pairs, in order.

    Returns:
        The figure.
    """
    size = (2.6 * len(pairs), 2.2 * len(SIZES))
    figure = Figure(figsize=size, facecolor="white", layout="constrained", edgecolor="#BBBBBB", linewidth=1.0)
    panels = figure.subplots(len(SIZES), len(pairs), squeeze=False)
    for row, source_size in enumerate(SIZES):
        for column, pair in enumerate(pairs):
            axes = panels[row][column]
            for colour, start in zip(COLOURS, STARTS, strict=False):
                curves = [found[key] for seed in SEEDS if (key := name_of(pair, source_size, start, seed)) in found]
                if curves:
                    steps, scores = np.array(curves).mean(axis=0).T
                    axes.plot(steps, scores, color=colour, label=start)
            source, target = (Path(part).stem for part in pair.split(":"))
            axes.set_title(f"{source} to {target}, {source_size or 'all'} source texts", fontsize=7)
            axes.set_xlabel("updates")
    panels[0][0].set_ylabel("log-likelihood, dev")
    panels[0][0].legend(frameon=False, fontsize=7, title="augmented texts", title_fontsize=7)
    return figure


def name_of(pair: str, source_size: int | None, start: str, seed: int) -> str:
    """Name a curve."""
    return f"{pair}, {source_size or 'all'} source texts, augmented {start}, seed {seed}"


def main() -> None:
    """Measure the curves that the file does not hold yet, then draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", help="folder that the pairs' paths start from")
    parser.add_argument("--pair", action="append", default=[], metavar="SOURCE:TARGET", help="may be repeated")
    options = parser.parse_args()
    found: dict[str, Curve] = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    base = override(load_config("screening"), {"shots": 32, "generator.operator": "augpro_mix", "generator.copies": 4})
    for seed, pair, size, start in itertools.product(SEEDS, options.pair, SIZES, STARTS):
        name, (source, target) = name_of(pair, size, start, seed), pair.split(":")
        if name not in found:
            config = replace(
                base, source=source, target=target, data_root=options.data_root, source_size=size, seed=seed
            )
            found[name] = learning_curve(config, STARTS[start])
            atomic_write_text(RESULTS, to_json(found, indent=1) + "\n")
            print(name, f"{max(score for _, score in found[name]):.3f}", flush=True)
    with matplotlib.rc_context(STYLE):
        save_figure(draw(found, options.pair), FIGURE)


if __name__ == "__main__":
    main()
