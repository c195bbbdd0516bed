"""One page about a finished run: what it shows is kept in ``report.json`` and drawn as HTML that needs nothing else."""

import base64
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from scipy.special import log_softmax, softmax

from l2a.data import Examples, Floats, Ints, TextInput
from l2a.util import RunError, UsageError, files, sha256_file

PAGE, EVIDENCE, EXPORT = "report.html", "report.json", "onnx/export.json"
FORMAT = 2  # of the evidence
SOURCES = (EVIDENCE, "metrics.json", "log.jsonl", "augmentations.parquet")
"""What the page is drawn from."""
Points = Sequence[tuple[float, float]]
BINS, MOST_ERRORS, MOST_POINTS = 10, 50, 1500
WIDE, HIGH = 360, 240  # of a figure, in units that are about a pixel of a small screen
Labeller = Callable[[Sequence[TextInput]], Any]
"""Gives texts the teacher's outputs, as ``l2a.teacher.labelling`` does, which imports torch: drawing does without."""


def storable(text: TextInput) -> list[str]:
    """The sides of a text; lone surrogates, which no file in UTF-8 can hold, become question marks."""
    return [side.encode("utf-8", "replace").decode("utf-8") for side in text]


def shown_text(text: TextInput, longest: int) -> str:
    """Join the sides of a text and cut it."""
    joined = " | ".join(storable(text))
    return joined if len(joined) <= longest else f"{joined[: longest - 1]}…"


def compare_on_test(test: Examples, teacher: Floats, student: Floats, temperature: float = 1.0) -> dict[str, Any]:
    """Compare what teacher and student say of the test split.

    Args:
        test: N examples.
        teacher: float32 (N, C), the teacher's logits.
        student: float32 (N, C), the student's logits.
        temperature: What the student's logits are to be divided by for its probabilities.

    Returns:
        Confusion counts (true class first), calibration by confidence, how often each is right, the "calibrated"
        student, and the texts on which the two differ and the student errs, those that it is surest of first; values
        that JSON can hold.
    """
    names, labels, logits = test.label_names, test.labels, {"teacher": teacher, "student": student}
    probabilities = {side: softmax(values, axis=1) for side, values in logits.items()}
    said = {side: values.argmax(axis=1) for side, values in probabilities.items()}
    sure = {side: values.max(axis=1) for side, values in probabilities.items()}
    agree, right = said["teacher"] == said["student"], {side: values == labels for side, values in said.items()}
    facts: dict[str, Any] = {"tested": len(test), "agreement": float(agree.mean())}
    for side, values in logits.items():
        counts = np.bincount(labels * len(names) + said[side], minlength=len(names) ** 2)
        facts[side] = {"confusion": counts.reshape(len(names), -1).tolist(), **_calibration(values, labels)}
    facts["calibrated"] = {"temperature": temperature, **_calibration(student / np.float32(temperature), labels)}
    facts["outcomes"] = np.bincount(2 * ~right["teacher"] + ~right["student"], minlength=4).reshape(2, 2).tolist()
    errors = np.flatnonzero(~right["student"] & ~agree)
    facts |= {"errors": len(errors), "texts": []}
    for i in errors[np.argsort(-sure["student"][errors], kind="stable")][:MOST_ERRORS].tolist():
        answers = {side: [names[said[side][i]], float(sure[side][i])] for side in logits}
        facts["texts"].append({"text": shown_text(test.inputs[i], 600), "label": names[labels[i]], **answers})
    return facts


def _calibration(logits: Floats, labels: Ints) -> dict[str, Any]:
    """Texts, mean confidence and accuracy of each tenth of confidence, expected calibration error, log-likelihood."""
    known = log_softmax(logits.astype(np.float64), axis=1)
    sure, right = np.exp(known.max(axis=1)), known.argmax(axis=1) == labels
    place = np.minimum((sure * BINS).astype(np.int64), BINS - 1)
    tenths = [place == i for i in np.unique(place)]
    bins = [(int(tenth.sum()), float(sure[tenth].mean()), float(right[tenth].mean())) for tenth in tenths]
    error = sum(count * abs(confidence - accuracy) for count, confidence, accuracy in bins) / len(sure)
    likelihood = float(known[np.arange(len(labels)), labels].mean())
    return {"bins": bins, "calibration_error": error, "log_likelihood": likelihood}


def class_scores(confusion: Sequence[Sequence[int]] | Ints) -> list[tuple[float, float, float, int]]:
    """Compute precision, recall, F1 and the number of texts of each class from counts, true class first."""
    counts = np.array(confusion)
    right, true, said = np.diagonal(counts), counts.sum(axis=1), counts.sum(axis=0)
    columns = (right / np.maximum(1, said), right / np.maximum(1, true), 2 * right / np.maximum(1, true + said), true)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def map_texts(
    kinds: Mapping[str, Sequence[TextInput]], labeller: Labeller, names: Sequence[str], rng: np.random.Generator
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
    chosen: list[tuple[str, TextInput]] = []
    for kind, texts in present.items():
        drawn = np.sort(rng.permutation(len(texts))[: MOST_POINTS // len(present)])
        chosen += [(kind, texts[i]) for i in drawn]
    outputs, reduction, points = labeller([text for _, text in chosen]), PCA(2, svd_solver="full"), []
    places = reduction.fit_transform(outputs.embeddings).tolist()
    for (kind, text), (x, y), given in zip(chosen, places, outputs.probabilities(), strict=True):
        says = [names[given.argmax()], round(float(given.max()), 4)]
        points.append({"kind": kind, "x": round(x, 4), "y": round(y, 4), "text": shown_text(text, 200), "says": says})
    counts = {kind: len(texts) for kind, texts in present.items()}
    return {"texts": counts, "variance": reduction.explained_variance_ratio_.tolist(), "points": points}


class Axis(NamedTuple):
    """One axis of a figure."""

    ends: tuple[float, float]
    places: tuple[float, float]  # of the ends in the figure
    ticks: Sequence[tuple[float, str]] = ()  # values with how they are written

    def at(self, value: float) -> float:
        """Place a value in the figure."""
        (low, high), (start, end) = self.ends, self.places
        return round(start + (value - low) / (high - low) * (end - start), 1)


def make_axis(values: Iterable[float], places: tuple[float, float], unit: str = "") -> Axis:
    """Make an axis that holds all values and begins and ends at a tick, with two to seven of them.

    Args:
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
    ticks = [(number * step, f"{number * step:.{digits}f}{unit}") for number in range(first, last + 1)]
    return Axis((first * step, last * step), places, ticks)


def make_figures(
    key: str, series: Mapping[str, Points], words: Sequence[str], ends: Points = (), unit: str = "", **more: Any
) -> list[dict[str, Any]]:
    """Lay points out on two axes that hold all of them; no figure where there is nothing to draw.

    Args:
        key: The figure's id in the page, whose template has what stands above it and what its axes measure.
        series: Points by name.
        words: Parts of a sentence that says the same to those who do not see it.
        ends: Further points that the axes hold.
        unit: Of both axes.
        more: Whether lines are ``joined`` through the points; ``bars`` behind them, each from one value of x to another
            and as high as a value of y.
    """
    if not series:
        return []
    across, up = zip(*ends, *(point for points in series.values() for point in points), strict=True)
    x, y = make_axis(across, (50, WIDE - 16), unit), make_axis(up, (HIGH - 36, 26), unit)
    facts = {"key": key, "words": f"{'; '.join(words)}.", "x": x, "y": y, "series": series}
    return [{"joined": True, "bars": (), **facts, **more}]


def reliability(side: str, test: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Draw accuracy over confidence, of the "teacher" or the "student", and how many texts are behind each point."""
    facts = test[side]
    start, total = 100 // BINS * (BINS // len(facts["confusion"])), test["tested"]
    points = [(100 * confidence, 100 * accuracy) for _, confidence, accuracy in facts["bins"]]
    tenths = [(100 / BINS * min(int(sure * BINS), BINS - 1), count) for count, sure, _ in facts["bins"]]
    bars = [(low, low + 100 / BINS, 100 * count / total) for low, count in tenths]
    listed = "; ".join(f"{accuracy:.0f} % right where it is {sure:.0f} % sure" for sure, accuracy in points)
    error = f"Expected calibration error {100 * facts['calibration_error']:.1f} points"
    words = [f"{error}: {listed}. Bars: share of the texts"]
    return make_figures(f"reliability-{side}", {side: points}, words, ((start, 0), (100, 100)), " %", bars=bars)


def learning_curves(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Draw the score on the validation split over the updates, a line for each student."""
    series, words, points = dict[str, Points](), list[str](), list[tuple[float, float]]()
    for event in events:
        if event["event"] == "validation" and event["log_likelihood"] is not None:
            points.append((event["step"], event["log_likelihood"]))
        elif event["event"] == "fitted" and points:  # comes after the scores of its row
            step, score = max(points, key=lambda point: point[1])
            words.append(f"{event['row']} is highest at step {step:.0f} with {score:.3f}")
            series[event["row"]], points = points, []
    return make_figures("learning", series, words)


def reward_figures(rounds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Draw how the reward grew while a policy was trained, and the fast reward against the real one."""
    curves, pairs, grown, found = dict[str, Points](), dict[str, Points](), list[str](), list[str]()
    for name, facts in ((f"round {number}", done["selector"]) for number, done in enumerate(rounds, 1)):
        if rewards := facts.get("reward_curve"):
            known = [(100 * i / len(rewards), value) for i, value in enumerate(rewards, 1) if value is not None]
            curves[name] = known
            grown.append(f"{name} from {known[0][1]:+.4f} to {known[-1][1]:+.4f}")
        if "real_rewards" in facts:
            pairs[name] = list(zip(facts["surrogate_rewards"], facts["real_rewards"], strict=True))
            agreement = facts["tier_correlation"]
            found.append(f"{name}: rank correlation {'unknown' if agreement is None else f'{agreement:.2f}'}")
    return make_figures("reward", curves, grown) + make_figures("tiers", pairs, found, joined=False)


def verdict(metrics: Mapping[str, Any]) -> str:
    """Name, in a sentence, the rows that were more accurate than the saved student, however many there are."""
    accuracies, student = {row["name"]: row["accuracy"]["value"] for row in metrics["rows"]}, metrics["student"]
    ahead = [f"{name} ({value:.1%})" for name, value in accuracies.items() if value > accuracies[student]]
    if not ahead:
        return f"No row was more accurate than {student} on this test split."
    return f"More accurate than {student} on this test split: {', '.join(ahead)}."


def read_evidence(folder: Path) -> tuple[Any, Any, Any]:
    """Read ``metrics.json``, ``report.json`` and ``export.json``, which is empty before an export, of a run."""
    names = ("metrics.json", EVIDENCE, *([EXPORT] if (folder / EXPORT).is_file() else []))
    metrics, facts, *export = (json.loads((folder / name).read_text("utf-8")) for name in names)
    return metrics, facts, export[0] if export else {}


def render_page(folder: Path) -> str:
    """Draw the page of a run from the files of its folder, as HTML that loads nothing."""
    from pyarrow.parquet import read_table

    metrics, facts, export = read_evidence(folder)
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]
    candidates = read_table(folder / "augmentations.parquet").to_pylist()
    map_axes = {}
    for name, places in (("x", (12, WIDE - 12)), ("y", (HIGH + 32, 28))):
        at = [point[name] for point in facts["map"]["points"]]
        map_axes[name] = Axis((min(at), max(max(at), min(at) + 1e-9)), places)
    ends = [100 * row["accuracy"][end] for row in metrics["rows"] for end in ("low", "high")]
    return render(
        Path(__file__).with_name("page.html.jinja"), facts=facts, metrics=metrics, export=export, events=events,
        candidates=candidates, operators=Counter(sorted(row["operator"] for row in candidates)).most_common(),
        scores={side: class_scores(facts["test"][side]["confusion"]) for side in ("teacher", "student")},
        accuracy=make_axis(ends, (16, WIDE - 16), " %"), map_axes=map_axes,
        reliability=[*reliability("teacher", facts["test"]), *reliability("student", facts["test"])],
        curves=[*learning_curves(events), *reward_figures(metrics["rounds"])], verdict=verdict(metrics),
        wide=WIDE, high=HIGH,
    )  # fmt: skip


def render(template: Path, **values: Any) -> str:
    """Fill in a template; values are escaped in HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent), autoescape=".html" in template.suffixes, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["percent"] = lambda share, digits=1: f"{100 * share:.{digits}f}"
    # A content security policy names a script by its hash, and lets no other run.
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return environment.get_template(template.name).render(**values)


def renew_page(folder: Path) -> Path:
    """Draw the page of a finished run again, in its output folder, and return its path.

    Raises:
        UsageError: If the folder is not that of a finished run, or of one that kept too little for a page.
        RunError: If its files are not as the run left them, or the page cannot be written.
    """
    check_run(folder)
    files.add_to_folder(folder, PAGE, render_page(folder).encode("utf-8"))
    return folder / PAGE


def check_run(folder: Path, names: Iterable[str] = SOURCES) -> dict[str, str]:
    """Check that an output folder is that of a finished run, and that the named files are as it left them.

    Returns:
        All files of the run, with their sha256.

    Raises:
        UsageError: If it is not the folder of a finished run, or of one that kept too little for a page.
        RunError: If a file is not as the run left it.
    """
    mark = files.read_mark(folder / files.MARK)
    if mark["kind"] != "run":
        raise UsageError(f"{folder} is not the folder of a finished run; give what --output-dir of l2a distill named")
    for name in names:
        if name == EVIDENCE and name not in mark["files"]:
            raise UsageError(f"{folder}: its run kept no {EVIDENCE}; run l2a distill again with --overwrite")
        if not (folder / name).is_file() or sha256_file(folder / name) != mark["files"][name]:
            raise RunError(f"{folder / name} was changed after the run; restore it, or run l2a distill again")
        if name == EVIDENCE and json.loads((folder / name).read_text("utf-8")).get("format") != FORMAT:
            raise UsageError(f"{folder}: it is of another version of l2a; run l2a distill again with --overwrite")
    return dict(mark["files"])
