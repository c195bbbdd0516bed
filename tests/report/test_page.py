import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import given, settings, strategies as st

from l2a.cli.app import report_command
from l2a.data.examples import Examples
from l2a.report import page
from l2a.util import RunError, UsageError
from l2a.util.files import output_folder
from tests.report.conftest import HOSTILE, METHODS, fill, label


class Page(HTMLParser):
    """Elements with their attributes, and the text in tables and scripts."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.texts = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def logits(answers, sure):
    """Two classes: answer and confidence of each text."""
    margin = np.log(np.array(sure) / (1 - np.array(sure)))
    return (np.array([(a == 0, a == 1) for a in answers]) * margin[:, None]).astype(np.float32)


def test_teacher_and_student_are_compared_text_by_text():
    test = Examples(tuple((text,) for text in "abcdef"), np.array([0, 0, 0, 1, 1, 1]), ("no", "yes"))
    teacher = logits([0, 0, 1, 1, 1, 1], [0.9] * 6)
    student = logits([0, 1, 1, 1, 0, 1], [0.65, 0.65, 0.95, 0.95, 0.95, 0.95])
    facts = page.compare_on_test(test, teacher, student)
    assert facts["teacher"]["confusion"] == [[2, 1], [0, 3]] and facts["student"]["confusion"] == [[1, 2], [1, 2]]
    assert facts["outcomes"] == [[3, 2], [0, 1]] and facts["agreement"] == pytest.approx(4 / 6)
    shown = [(it["text"], it["label"], it["student"][0]) for it in facts["texts"]]
    assert shown == [("e", "yes", "no"), ("b", "no", "yes")]
    assert facts["texts"][0]["teacher"] == ["yes", pytest.approx(0.9)]
    assert facts["student"]["bins"] == [(2, pytest.approx(0.65), 0.5), (4, pytest.approx(0.95), 0.5)]
    assert facts["student"]["calibration_error"] == pytest.approx(2 / 6 * 0.15 + 4 / 6 * 0.45)


def test_the_errors_are_the_surest_ones_and_not_too_many():
    test = Examples((("text",),) * 80, np.zeros(80, np.int64), ("no", "yes"))
    facts = page.compare_on_test(test, logits([0] * 80, [0.9] * 80), logits([1] * 80, np.linspace(0.6, 0.9, 80)))
    assert facts["errors"] == 80 and len(facts["texts"]) == 50
    assert facts["texts"][0]["student"][1] == pytest.approx(0.9)


def test_the_map_has_as_many_texts_of_each_kind_and_at_most_1500():
    kinds = {"source": [("s",)] * 9000, "unlabelled": [], "target": [("t",)] * 30, "kept candidate": [("k", "2")] * 800}
    drawn = page.map_texts(kinds, label, ("a", "b", "c"), np.random.default_rng(0))
    counts = {kind: sum(point["kind"] == kind for point in drawn["points"]) for kind in kinds}
    assert counts == {"source": 500, "unlabelled": 0, "target": 30, "kept candidate": 500}
    assert drawn["texts"] == {"source": 9000, "target": 30, "kept candidate": 800}
    assert drawn["points"][-1]["text"] == "k | 2" and sum(drawn["variance"]) < 1


numbers = st.floats(-1e6, 1e6).filter(lambda value: value == 0 or abs(value) > 1e-6)


@settings(max_examples=25)
@given(st.lists(numbers, min_size=1, max_size=9))
def test_an_axis_holds_its_values_between_ticks_that_differ(values):
    axis = page.make_axis(values, (50, 350))
    places = [axis.at(value) for value in values]
    assert all(50 <= place <= 350 for place in places) and 2 <= len(axis.ticks) <= 7
    assert [axis.at(value) for value, _ in (axis.ticks[0], axis.ticks[-1])] == [50, 350]
    assert len({name for _, name in axis.ticks}) == len(axis.ticks)
    assert all(math.isclose(float(name), value, abs_tol=1e-9, rel_tol=1e-6) for value, name in axis.ticks)


def test_scores_belong_to_the_method_that_is_fitted_next():
    score = {"event": "validation", "log_likelihood": -0.5}
    rows = [{"event": "fitted", "row": name} for name in ("tfidf", "first", "second")]
    better = {**score, "step": 40, "log_likelihood": -0.4}
    events = [rows[0], {**score, "step": 20}, better, rows[1], {**score, "step": 10}, rows[2]]
    (figure,) = page.learning_curves(events)
    assert figure["series"] == {"first": [(20, -0.5), (40, -0.4)], "second": [(10, -0.5)]}
    assert "first is highest at step 40 with -0.400" in figure["words"]
    assert page.learning_curves(events[:1]) == []


def test_rewards_are_drawn_where_there_are_some():
    judged = {"tier_correlation": None, "surrogate_rewards": [0.1, 0.1], "real_rewards": [0.2, 0.3]}
    rounds = [{"selector": {}}, {"selector": {**judged, "reward_curve": [0.0, None, 0.5, 0.5]}}]
    curve, tiers = page.reward_figures(rounds)
    assert curve["series"] == {"round 2": [(25, 0.0), (75, 0.5), (100, 0.5)]}
    assert tiers["series"] == {"round 2": [(0.1, 0.2), (0.1, 0.3)]} and not tiers["joined"]
    assert tiers["words"] == "round 2: rank correlation unknown."
    assert page.reward_figures(rounds[:1]) == []


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shown")
    fill(folder)
    return page.render_page(folder)


def test_texts_of_data_stay_texts(shown):
    parsed = Page(shown)
    assert len(parsed.all("script")) == 1 and not parsed.all("img")
    cells = "".join(parsed.texts)
    assert "0.0456 nats (real distillation)" in cells and "a random one was used" in cells
    assert HOSTILE[:90] in cells and "window.hacked = 2'>? | " not in shown
    (script,) = re.findall(r"<script>(.*?)</script>", shown, re.DOTALL)
    policy = next(meta["content"] for meta in parsed.all("meta") if meta.get("http-equiv"))
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    for _, attributes in parsed.elements:
        assert all(attributes.get(name, "#").startswith(("#", "data:,")) for name in ("src", "href"))


def test_figures_and_tables_say_what_they_are(shown):
    parsed = Page(shown)
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for drawing in parsed.all("svg"):
        named = {drawing.get("aria-labelledby"), drawing.get("aria-describedby")}
        assert drawing.get("aria-hidden") == "true" or (drawing["role"] in ("img", "group") and named <= set(ids))
    assert len(parsed.all("caption")) == len(parsed.all("table")) and all("scope" in head for head in parsed.all("th"))
    points = [attributes for attributes in parsed.all("path") if attributes.get("class") == "point"]
    assert len(points) == 200 + 20 + 9 + 191
    assert [point["tabindex"] for point in points].count("0") == 1


OTHERS = [(20, True, {}), (3, False, {"rounds": [{"selector": {}}], "student": "l2a_without_unlabelled_student"})]


@pytest.mark.parametrize(("classes", "is_pair", "changes"), OTHERS)
def test_other_runs_have_a_page_too(tmp_path, classes, is_pair, changes):
    fill(tmp_path, classes, is_pair, **changes)
    shown = page.render_page(tmp_path)
    assert ("most frequent confusions" in shown) == (classes == 20)
    assert ("Fast reward" in shown) == ("rounds" not in changes)
    assert (" | second" in shown) == is_pair and all(name in shown for name in METHODS)
    assert "movies as the source" in shown and "and unlabelled text of a.txt, &lt;/script" in shown


def test_a_page_drawn_later_belongs_to_the_run(finished, capsys):
    report_command(finished)
    assert capsys.readouterr().out == f"page: {finished / 'report.html'}\n"
    mark = json.loads((finished / "l2a.json").read_text())
    assert mark["kind"] == "run" and mark["files"].keys() == {*page.SOURCES, "report.html"}
    with output_folder(finished, "run", overwrite=True) as folder:
        fill(folder)
    assert not (finished / "report.html").exists()


def test_what_has_no_page_is_refused_in_a_sentence(finished, tmp_path):
    with pytest.raises(UsageError, match="not the folder of a finished run"):
        page.renew_page(tmp_path)
    with output_folder(tmp_path / "older", "run") as folder:
        (folder / "metrics.json").write_text("{}")
    with pytest.raises(UsageError, match=r"kept no report\.json"):
        page.renew_page(tmp_path / "older")
    with FileLock(finished / ".l2a.lock"), pytest.raises(RunError, match="another run is writing there"):
        page.renew_page(finished)
    (finished / "metrics.json").write_text("{}")
    with pytest.raises(RunError, match=r"metrics\.json was changed after the run"):
        page.renew_page(finished)
    assert not (finished / "report.html").exists()
