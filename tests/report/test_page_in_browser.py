"""The page as a reader has it: laid out, filtered, and read with the keyboard."""

import json

import pytest

from l2a.report.page import render_page
from tests.report.browser import CHROMIUM, Browser
from tests.report.conftest import fill

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")]
CUT = """[...document.querySelectorAll("main *, header *")].filter((part) =>
  part.getBoundingClientRect().right > document.documentElement.clientWidth + 1
  && !part.closest(".scroll, thead")).map((part) => part.outerHTML.slice(0, 99))"""
OVERLAPPING = """[...document.querySelectorAll("svg.plot")].flatMap((plot) => {
  const texts = [...plot.querySelectorAll("text")].map((text) => [text.textContent, text.getBoundingClientRect()]);
  return texts.flatMap(([one, a], i) => texts.slice(i + 1).filter(([other, b]) =>
    Math.min(a.right, b.right) - Math.max(a.left, b.left) > 0
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3).map(([other]) => [one, other]));
})"""
SHOWN = '[...document.querySelectorAll("#errors tbody tr")].filter((row) => row.checkVisibility()).length'
FOCUSED = "document.activeElement.querySelector('title')?.textContent"

PLACE = "document.activeElement.getBoundingClientRect().x"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    fill(folder)
    (folder / "report.html").write_text(render_page(folder))
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def test_the_page_asks_for_nothing_and_complains_of_nothing(page, browser):
    browser.open(page.as_uri())
    assert browser.run("window.hacked ?? null") is None
    assert browser.complaints == [] and set(browser.requests) - {"about:blank"} == {page.as_uri()}


@pytest.mark.parametrize("width", [400, 900, 1400])
def test_nothing_is_cut_and_no_labels_overlap(page, browser, width):
    browser.open(page.as_uri(), width)
    assert browser.run(CUT) == [] and browser.run(OVERLAPPING) == []
    assert browser.run("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0


def test_the_texts_are_filtered(page, browser):
    browser.open(page.as_uri())
    texts = json.loads((page.parent / "report.json").read_text())["test"]["texts"]

    def choose(name, value):
        control = f'document.querySelector("form[data-table=errors] [name={name}]")'
        event = 'dispatchEvent(new Event("input", { bubbles: true }))'
        browser.run(f"{control}.value = {json.dumps(value)}; {control}.{event}")
        return browser.run(SHOWN), browser.run('document.querySelector("form[data-table=errors] output").textContent')

    right = sum(it["teacher"][0] == it["label"] for it in texts)
    assert 0 < right < len(texts)
    assert browser.run(SHOWN) == len(texts)
    assert choose("teacher", "right") == (right, f"{right} of {len(texts)} shown")
    assert choose("search", "NO SUCH TEXT")[0] == 0
    assert choose("search", "hacked")[0] == right
    assert choose("teacher", "")[0] == len(texts)
    assert choose("label", texts[0]["label"])[0] == sum(it["label"] == texts[0]["label"] for it in texts)


def test_the_map_is_read_with_the_keyboard(page, browser):
    browser.open(page.as_uri())
    browser.run("[...document.querySelectorAll('#map-kinds input')].at(-1).focus()")
    browser.press("Tab")
    first = browser.run(FOCUSED)
    assert first.startswith("source, teacher: class ")
    assert browser.run('document.getElementById("map-text").textContent') == first
    places = [browser.run(PLACE)]
    for _ in range(4):
        browser.press("ArrowRight")
        places.append(browser.run(PLACE))
    assert places == sorted(set(places))
    browser.press("ArrowLeft")
    assert browser.run(PLACE) < places[-1]
    assert browser.run("document.querySelectorAll('.point[tabindex=\"0\"]').length") == 1
    browser.run("document.querySelector('#map-kinds input[value=source]').click()")
    assert browser.run("document.querySelector('[data-kind=source] path').getClientRects().length") == 0
    assert browser.run("document.querySelector('.point[tabindex=\"0\"]').getClientRects().length") == 1
