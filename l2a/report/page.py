"""One page about a finished run: what it shows is kept in ``report.json`` and drawn as HTML that needs nothing else."""

import base64
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from l2a.data.examples import Examples, TextInput
from l2a.util.errors import RunError, UsageError
from l2a.util.files import MARK, add_to_folder, atomic_write_text, read_mark, sha256_file

if TYPE_CHECKING:  # this imports torch, which drawing does without
    from l2a.teacher.labelling import Labeller

PAGE, EVIDENCE = "report.html", "report.json"
SOURCES = (EVIDENCE, "metrics.json", "log.jsonl", "augmentations.parquet")
"""What the page is drawn from."""
BINS, MOST_ERRORS, MOST_POINTS, MOST_CANDIDATES = 10, 50, 1500, 25
WIDE, HIGH = 360, 240  # of a figure, in units that are about a pixel of a small screen


def shown_text(text: TextInput, longest: int) -> str:
    """Join the sides of a text and cut it; lone surrogates, which no file in UTF-8 can hold, become question marks."""
    joined = " | ".join(text).encode("utf-8", "replace").decode("utf-8")
    return joined if len(joined) <= longest else f"{joined[: longest - 1]}…"


def compare_on_test(test: Examples, teacher: NDArray[np.float32], student: NDArray[np.float32]) -> dict[str, Any]:
    """Compare what teacher and student say of the test split.

    Args:
        test: N examples.
        teacher: float32 (N, C), the teacher's logits.
        student: float32 (N, C), the student's logits.

    Returns:
        Confusion counts (true class first), calibration by confidence, how often each is right, and the texts on which
        the two differ and the student errs, those that it is surest of first; values that JSON can hold.
    """
    names, labels = test.label_names, test.labels
    probabilities = {"teacher": softmax(teacher, axis=1), "student": softmax(student, axis=1)}
    said = {side: values.argmax(axis=1) for side, values in probabilities.items()}
    sure = {side: values.max(axis=1) for side, values in probabilities.items()}
    right = {side: values == labels for side, values in said.items()}
    facts: dict[str, Any] = {"tested": len(test), "agreement": float((said["teacher"] == said["student"]).mean())}
    for side in probabilities:
        counts = np.bincount(labels * len(names) + said[side], minlength=len(names) ** 2)
        facts[side] = {"confusion": counts.reshape(len(names), -1).tolist(), **_calibration(sure[side], right[side])}
    outcomes = Counter(zip(right["teacher"].tolist(), right["student"].tolist(), strict=True))
    facts["outcomes"] = [[outcomes[teacher, student] for student in (True, False)] for teacher in (True, False)]
    errors = np.flatnonzero(~right["student"] & (said["teacher"] != said["student"]))
    shown = errors[np.argsort(-sure["student"][errors], kind="stable")][:MOST_ERRORS]
    facts |= {"errors": len(errors), "texts": []}
    for i in map(int, shown):
        answers = {side: [names[said[side][i]], float(sure[side][i])] for side in probabilities}
        facts["texts"].append({"text": shown_text(test.inputs[i], 600), "label": names[labels[i]], **answers})
    return facts


def _calibration(sure: NDArray[np.float32], right: NDArray[np.bool_]) -> dict[str, Any]:
    """Texts, mean confidence and accuracy of each tenth of confidence, and the expected calibration error."""
    place = np.minimum((sure * BINS).astype(np.int64), BINS - 1)
    bins = [(int(n), float(sure[place == i].mean()), float(right[place == i].mean()))
            for i, n in enumerate(np.bincount(place, minlength=BINS)) if n]  # fmt: skip
    error = sum(count * abs(confidence - accuracy) for count, confidence, accuracy in bins) / len(sure)
    return {"bins": bins, "calibration_error": error}


def map_texts(
    kinds: Mapping[str, Sequence[TextInput]], labeller: "Labeller", names: Sequence[str], rng: np.random.Generator
) -> dict[str, Any]:
    """Lay texts out by the two principal components of the teacher's embeddings.

    Args:
        kinds: Texts by kind; as many of each are drawn.
        labeller: The teacher.
        names: The C class names.
        rng: Draws the texts.

    Returns:
        The numbers of texts by kind, the share of the variance on each axis, and the points; values that JSON can hold.
    """
    from sklearn.decomposition import PCA

    present = {kind: texts for kind, texts in kinds.items() if len(texts)}
    drawn = {kind: np.sort(rng.permutation(len(texts))[: MOST_POINTS // len(present)])
             for kind, texts in present.items()}  # fmt: skip
    chosen = [(kind, present[kind][i]) for kind, places in drawn.items() for i in places]
    outputs, reduction = labeller([text for _, text in chosen]), PCA(2, svd_solver="full")
    places = reduction.fit_transform(outputs.embeddings)
    probabilities = outputs.probabilities()
    points = [
        {"kind": kind, "x": round(float(x), 4), "y": round(float(y), 4), "text": shown_text(text, 200),
         "says": [names[given.argmax()], round(float(given.max()), 4)]}
        for (kind, text), (x, y), given in zip(chosen, places, probabilities, strict=True)
    ]  # fmt: skip
    counts = {kind: len(texts) for kind, texts in present.items()}
    return {"texts": counts, "variance": reduction.explained_variance_ratio_.tolist(), "points": points}


@dataclass(frozen=True)
class Axis:
    """One axis of a figure.

    Attributes:
        label: What it measures, with the unit.
        ends: The values at its two ends.
        places: Where these ends are in the figure.
        ticks: Values with how they are written.
    """

    label: str
    ends: tuple[float, float]
    places: tuple[float, float]
    ticks: tuple[tuple[float, str], ...]

    def at(self, value: float) -> float:
        """Place a value in the figure."""
        (low, high), (start, end) = self.ends, self.places
        return round(start + (value - low) / (high - low) * (end - start), 1)


def make_axis(label: str, values: Iterable[float], places: tuple[float, float], unit: str = "") -> Axis:
    """Make an axis that holds all values and begins and ends at a tick, with two to seven of them.

    Args:
        label: What it measures.
        values: At least one.
        places: Where its ends are in the figure.
        unit: Written after the number of each tick.
    """
    values = list(values)
    low, high = min(values), max(values)
    spread = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(spread / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if spread / (power * factor) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    ticks = tuple((number * step, f"{number * step:.{digits}f}{unit}") for number in range(first, last + 1))
    return Axis(label, (first * step, last * step), places, ticks)


def _exact_axis(label: str, values: Sequence[float], places: tuple[float, float]) -> Axis:
    """An axis without ticks from the lowest value to the highest."""
    return Axis(label, (min(values), max(max(values), min(values) + 1e-9)), places, ())


@dataclass(frozen=True)
class Figure:
    """A figure with two axes.

    Attributes:
        key: Its id in the page.
        title: What it shows.
        words: The same for those who do not see it, with the numbers that matter.
        x: The horizontal axis.
        y: The vertical axis.
        series: Points by name.
        joined: Whether lines join the points.
        bars: Behind the points, each from one value of x to another and as high as a value of y.
    """

    key: str
    title: str
    words: str
    x: Axis
    y: Axis
    series: Mapping[str, Sequence[tuple[float, float]]]
    joined: bool = True
    bars: Sequence[tuple[float, float, float]] = ()


def make_figure(
    key: str, title: str, words: str, labels: tuple[str, str], series: Mapping[str, Sequence[tuple[float, float]]],
    joined: bool = True,
) -> Figure:  # fmt: skip
    """Draw points on axes that hold all of them; the arguments are the fields of ``Figure``."""
    across, up = zip(*(point for points in series.values() for point in points), strict=True)
    x, y = make_axis(labels[0], across, (50, WIDE - 16)), make_axis(labels[1], up, (HIGH - 36, 26))
    return Figure(key, title, words, x, y, series, joined)


def reliability(side: str, facts: Mapping[str, Any]) -> Figure:
    """Draw accuracy over confidence, of the "teacher" or the "student", and how many texts are behind each point."""
    start, total = 100 // BINS * (BINS // len(facts["confusion"])), sum(count for count, *_ in facts["bins"])
    points = [(100 * confidence, 100 * accuracy) for _, confidence, accuracy in facts["bins"]]
    tenths = [(100 / BINS * min(int(sure * BINS), BINS - 1), count) for count, sure, _ in facts["bins"]]
    bars = [(low, low + 100 / BINS, 100 * count / total) for low, count in tenths]
    x = make_axis("confidence", (start, 100), (50, WIDE - 16), " %")
    y = make_axis("accuracy", (0, 100), (HIGH - 36, 26), " %")
    listed = "; ".join(f"{accuracy:.0f} % right where it is {sure:.0f} % sure" for sure, accuracy in points)
    words = (
        f"Expected calibration error {100 * facts['calibration_error']:.1f} points: {listed}. Bars: share of the texts."
    )
    return Figure(f"reliability-{side}", f"Reliability of the {side}", words, x, y, {side: points}, bars=bars)


def learning_curves(events: Iterable[Mapping[str, Any]]) -> Figure | None:
    """Draw the score on the validation split over the updates, a line for each student."""
    series: dict[str, list[tuple[float, float]]] = {}
    points: list[tuple[float, float]] = []
    for event in events:
        if event["event"] == "validation" and event["log_likelihood"] is not None:
            points.append((event["step"], event["log_likelihood"]))
        elif event["event"] == "fitted":  # comes after the scores of its row
            series |= {event["row"]: points} if points else {}
            points = []
    if not series:
        return None
    tops = {name: max(points, key=lambda point: point[1]) for name, points in series.items()}
    words = "; ".join(f"{name} is best at step {step:.0f} with {score:.3f}" for name, (step, score) in tops.items())
    labels = ("updates of the student", "log-likelihood on the validation split, nats")
    return make_figure("learning", "Learning curves", f"{words}.", labels, series)


def reward_figures(rounds: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Draw how the reward grew while a policy was trained, and the fast reward against the real one."""
    known = [(f"round {number}", done["selector"]) for number, done in enumerate(rounds, 1)]
    curves = {name: [(100 * i / len(values), value) for i, value in enumerate(values, 1) if value is not None]
              for name, facts in known if (values := facts.get("reward_curve"))}  # fmt: skip
    pairs = {name: list(zip(facts["surrogate_rewards"], facts["real_rewards"], strict=True))
             for name, facts in known if "real_rewards" in facts}  # fmt: skip
    figures = []
    if curves:
        grown = "; ".join(f"{name} from {points[0][1]:+.4f} to {points[-1][1]:+.4f}" for name, points in curves.items())
        labels = ("training of the policy, %", "mean gain of an episode, nats")
        figures.append(make_figure("reward", "Reward while the policy was trained", f"{grown}.", labels, curves))
    if pairs:
        agreement = [(name, facts["tier_correlation"]) for name, facts in known if name in pairs]
        words = "; ".join(f"{name}: rank correlation {'unknown' if value is None else format(value, '.2f')}"
                          for name, value in agreement)  # fmt: skip
        labels = ("fast reward of a selection, nats", "reward by real distillation, nats")
        title = "Fast reward against real distillation"
        figures.append(make_figure("tiers", title, f"{words}.", labels, pairs, joined=False))
    return figures


def render_page(folder: Path) -> str:
    """Draw the page of a run from the files of its folder.

    Args:
        folder: The run's.

    Returns:
        HTML that loads nothing.
    """
    from pyarrow.parquet import read_table

    facts, metrics = (json.loads((folder / name).read_text("utf-8")) for name in SOURCES[:2])
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]
    candidates = read_table(folder / "augmentations.parquet").to_pylist()
    last = max((row["round"] for row in candidates), default=0)
    ranked = sorted((row for row in candidates if row["round"] == last), key=lambda row: -row["selector_score"])
    points, rows = facts["map"]["points"], metrics["rows"]
    ends = [100 * row["accuracy"][end] for row in rows for end in ("low", "high")]
    first, second = (f"principal component {number}, {100 * (share or 0):.0f} % of the variance"
                     for number, share in enumerate(facts["map"]["variance"], 1))  # fmt: skip
    map_axes = {
        "x": _exact_axis(first, [point["x"] for point in points], (12, WIDE - 12)),
        "y": _exact_axis(second, [point["y"] for point in points], (HIGH + 32, 28)),
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"percent": _percent, "sha256": _script_hash}
    rendered: str = environment.get_template("page.html.jinja").render(
        facts=facts, metrics=metrics, wide=WIDE, high=HIGH, map_axes=map_axes,
        by_name={row["name"]: row for row in rows},
        accuracy=make_axis("accuracy on the test split", ends, (16, WIDE - 16), " %"),
        reliability=[reliability(side, facts["test"][side]) for side in ("teacher", "student")],
        curves=[figure for figure in (learning_curves(events), *reward_figures(metrics["rounds"])) if figure],
        operators=_shares(candidates), drawn=len(candidates),
        kept=[row for row in ranked if row["kept"]][:MOST_CANDIDATES],
        dropped=[row for row in ranked if not row["kept"]][: -MOST_CANDIDATES - 1 : -1],
        fitted={event["row"]: event["row_seconds"] for event in events if event["event"] == "fitted"},
    )  # fmt: skip
    return rendered


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}"


def _script_hash(script: str) -> str:
    """Name a script as a content security policy does, which lets no other run."""
    return base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")


def _shares(candidates: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """Count the kept and the dropped candidates of each operator, the commonest first."""
    counts = Counter((row["operator"], row["kept"]) for row in candidates)
    names = sorted({name for name, _ in counts}, key=lambda name: (-counts[name, True] - counts[name, False], name))
    return {name: (counts[name, True], counts[name, False]) for name in names}


def write_page(folder: Path) -> None:
    """Draw the page of a run that is being written."""
    atomic_write_text(folder / PAGE, render_page(folder))


def renew_page(folder: Path) -> Path:
    """Draw the page of a finished run again.

    Args:
        folder: The run's output folder.

    Returns:
        The page.

    Raises:
        UsageError: If the folder is not that of a finished run, or of one that kept too little for a page.
        RunError: If its files are not as the run left them, or the page cannot be written.
    """
    mark = read_mark(folder / MARK)
    if mark["kind"] != "run":
        raise UsageError(
            f"{folder}: it is not the folder of a finished run; give what --output-dir of l2a distill named"
        )
    if EVIDENCE not in mark["files"]:
        raise UsageError(f"{folder}: its run kept no {EVIDENCE}; run l2a distill again with --overwrite")
    for name in SOURCES:
        if not (folder / name).is_file() or sha256_file(folder / name) != mark["files"][name]:
            raise RunError(f"{folder / name} is not as the run left it; put it back, or run l2a distill again")
    add_to_folder(folder, PAGE, render_page(folder).encode("utf-8"))
    return folder / PAGE
