"""The page as a reader has it: laid out, filtered, and read with the keyboard; ``checks.html`` looks at it."""

import html
import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from l2a.report.page import render_page
from tests.report.conftest import fill

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
           "--allow-file-access-from-files", "--enable-logging=stderr", "--dump-dom")  # fmt: skip
AXE = importlib.util.find_spec("axe_playwright_python")  # which comes with axe-core; nothing of it is imported
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")]
needs_axe = pytest.mark.skipif(AXE is None, reason="there is no axe-core")
ASK_AXE = """<script>%s</script><script>
addEventListener("load", async () => {
  for (const part of document.querySelectorAll("details")) part.open = true;
  const { passes, violations } = await axe.run();
  const wrong = violations.map(({ id, nodes }) => `${id}: ${nodes.map((node) => node.html.slice(0, 99))}`);
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const found = document.body.appendChild(document.createElement("pre"));
  found.textContent = JSON.stringify({ dark, passes: passes.map(({ id }) => id), wrong });
  found.id = "found";
});
</script></body>"""


def open_page(page, *options):
    """What a page writes into its element "found", and what the browser says."""
    command = [CHROMIUM, *OPTIONS, *options, f"--user-data-dir={page.parent / 'profile'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(html.unescape(re.search('<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)[1])), done.stderr


def ask_axe(folder, page, scheme, width):
    """What axe-core says of a page."""
    axe = (Path(AXE.origin).parent / "axe.min.js").read_text("utf-8")
    # The page lets no script but its own run.
    drawn = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    (folder / "report.html").write_text(drawn.replace("</body>", ASK_AXE % axe))
    options = (f"--window-size={width},900", f"--blink-settings=preferredColorScheme={int(scheme == 'light')}")
    return open_page(folder / "report.html", *options, "--virtual-time-budget=60000")[0]


def test_a_reader_can_see_filter_and_walk_through_the_page(tmp_path):
    fill(tmp_path)
    (tmp_path / "report.html").write_text(render_page(tmp_path))
    found, said = open_page(Path(shutil.copy(Path(__file__).with_name("checks.html"), tmp_path)))

    assert "CONSOLE" not in said and (found["hacked"], found["loaded"]) == (None, [])
    assert (found["cut"], found["overlapping"], found["wider"]) == ([], [], [0, 0, 0])

    texts = json.loads((tmp_path / "report.json").read_text())["test"]["texts"]
    right, total = sum(it["teacher"][0] == it["label"] for it in texts), len(texts)
    of_label = sum(it["label"] == found["label"] for it in texts)
    assert 0 < right < total == found["all"] and 0 < of_label < total
    assert found["chosen"] == [[n, f"{n} of {total} shown"] for n in (right, 0, right, total, of_label)]

    assert found["focused"].startswith("source, teacher: class ") and found["said"] == found["focused"]
    *walked, back = found["places"]
    assert walked == sorted(set(walked)) and back < walked[-1]
    assert found["sources"] == 0 and found["reachable"] == [1]


@needs_axe
@pytest.mark.parametrize(("scheme", "width"), [("light", 1300), ("dark", 1300), ("light", 400), ("dark", 400)])
def test_axe_core_finds_nothing_wrong(tmp_path, scheme, width):
    fill(tmp_path)
    found = ask_axe(tmp_path, render_page(tmp_path), scheme, width)
    assert found["dark"] == (scheme == "dark") and {"color-contrast", "label", "region"} <= set(found["passes"])
    assert found["wrong"] == []


@needs_axe
def test_axe_core_finds_what_is_wrong_with_a_faulty_page(tmp_path):
    fill(tmp_path)
    wrong, shown = '<p style="color: #888; background: #777">grey</p><img src=""></main>', render_page(tmp_path)
    faulty = shown.replace("</main>", wrong)
    assert faulty != shown
    found = ask_axe(tmp_path, faulty.replace('<html lang="en">', "<html>"), "light", 1300)
    assert {line.partition(":")[0] for line in found["wrong"]} == {"color-contrast", "html-has-lang", "image-alt"}
