"""The page of an experiment, written from its results alone."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from l2a.experiments.results import CellResult
from l2a.experiments.statistics import LEVEL, RESAMPLES, Comparison, Estimate, RankAgreement
from l2a.experiments.summary import Summary
from l2a.files import atomic_write_text

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
        f"Labelled target examples used by a cell, those of the reward and model-choice splits included: "
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
