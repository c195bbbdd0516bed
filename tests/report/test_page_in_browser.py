"""The page as a reader has it: laid out, filtered, and read with the keyboard; ``checks.html`` looks at it."""

import html
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


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_reader_can_see_filter_and_walk_through_the_page(tmp_path):
    fill(tmp_path)
    (tmp_path / "report.html").write_text(render_page(tmp_path))
    checks = shutil.copy(Path(__file__).with_name("checks.html"), tmp_path)
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={tmp_path / 'profile'}", Path(checks).as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(html.unescape(re.search('<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)[1]))

    assert "CONSOLE" not in done.stderr and (found["hacked"], found["loaded"]) == (None, [])
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
