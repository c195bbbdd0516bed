import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import l2a
from l2a.cli.app import domains_app
from l2a.data.domains import check_domain

GOOD = """text,label,split
one two,x,train
ONE  two,x,train
three,y,train
three,x,dev
four five six,y,dev
one two,x,test
"""


def invoke(*arguments):
    return CliRunner().invoke(domains_app, list(arguments))


def test_a_report_counts_sizes_labels_lengths_and_copies(write):
    found, counts, notes = check_domain(str(write("x.csv", GOOD)))
    assert (found.name, found.is_pair, found.label_names, found.problems) == ("x", False, ("x", "y"), [])
    assert {split: of_split["examples"] for split, of_split in counts.items()} == {"train": 3, "dev": 2, "test": 1}
    assert counts["train"] == {
        "examples": 3, "label x": 2, "label y": 1, "words, median": 2, "words, longest": 2, "characters, longest": 8,
        "duplicates": 1,
    }  # fmt: skip
    assert notes == [
        "1 texts of train are also in dev; copies are drawn once",
        "1 texts of train are also in test; they are never drawn for training",
        "1 texts have different labels in different rows",
    ]


def test_a_report_names_every_bad_line_and_counts_the_others(write):
    found, counts, _ = check_domain(str(write("x.csv", "text,label\na,x\n,y\nb,\nc,y,z\nd,x\n")))
    assert [problem.partition(":")[0].rpartition(" ")[2] for problem in found.problems] == ["3", "4", "5"]
    assert sum(of_split["examples"] for of_split in counts.values()) == 2


def test_check_prints_the_numbers_and_the_overlap(write):
    result = invoke("check", str(write("x.csv", GOOD)))
    assert result.exit_code == 0
    for expected in ("single texts, labels: x, y", "label x", "2 (67%)", "1 texts of train are also in test",
                     "1 texts have different labels", "nothing is wrong"):  # fmt: skip
        assert expected in result.output


def test_check_exits_2_and_shows_problems_by_line_up_to_fifty(write):
    result = invoke("check", str(write("x.csv", b"text,label\ncaf\xe9,x\n")))
    assert result.exit_code == 2 and "x.csv, line 2: not UTF-8" in result.output
    result = invoke("check", str(write("x.jsonl", "nope\n" * 60)))
    assert "line 50:" in result.output and "line 51:" not in result.output and "and 10 more problems" in result.output


def test_check_shows_brackets_as_they_are(write):
    result = invoke("check", str(write("x.csv", "text,label,split\na,[b],train\nc,[/d],train\n")))
    assert "labels: [/d], [b]" in result.output and "can only be a source" in result.output


def test_check_takes_columns(write):
    path = str(write("x.csv", "a,b,c,split\nt1,t2,x,train\nt3,t4,y,test\nt5,t6,y,train\n"))
    result = invoke("check", path, "--text-column", "a", "--text-pair-column", "b", "--label-column", "c")
    assert result.exit_code == 0 and "pairs of texts, labels: x, y" in result.output


def test_list_and_show_need_no_network(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("COLUMNS", "200")
    listed, shown = invoke("list"), invoke("show", "tweets")
    assert all(name in listed.output for name in ("movies", "products", "editorials", "tweets"))
    assert "vaderSentiment 3.3.2 (sdist)" in shown.output and "MIT" in shown.output


def test_a_foreign_file_among_the_cards_is_left_out_with_a_note(write, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    write("domains/app.yaml", "server: {port: 80}\n")
    write("domains/broken.yaml", "a: [")
    write("domains/mine.yaml", "name: mine\ndescription: d\ntask: t\nlabels: [x, y]\nlicence: MIT\ndata: posts.csv\n")
    result = invoke("list")
    assert result.exit_code == 0 and "tweets" in result.output and "mine" in result.output
    assert re.search(r"note: skipped.*app\.yaml.*note: skipped.*broken\.yaml", result.output, re.DOTALL)


def test_a_card_of_the_working_directory_never_hides_a_shipped_one(write):
    write("domains/tweets.yaml", "name: tweets\ndescription: HIDDEN\ntask: t\nlabels: [x]\nlicence: MIT\ndata: p.csv\n")
    assert "HIDDEN" not in invoke("list").output + invoke("show", "tweets").output


def test_the_list_wraps_on_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    lines = invoke("list").output.splitlines()
    assert max(map(len, lines)) <= 40 and any(line.startswith("editorials  ") for line in lines)
    assert any(line.rstrip().endswith("labels: negative, positive") for line in lines)


def test_an_unknown_card_and_a_key_given_twice_are_refused(write):
    write("domains/mine.yaml", "name: mine\nname: mine\n")
    assert "'name' is given twice" in str(invoke("show", "mine").exception)
    assert "did you mean 'tweets'" in str(invoke("show", "tweet").exception)


@pytest.mark.parametrize(
    ("module", "light"), [("l2a.cli.app", set()), ("l2a.data.domains", {"numpy"}), ("l2a.data.bank", {"numpy"})]
)
def test_importing_loads_nothing_heavy(module, light):
    heavy = {"torch", "datasets", "pandas", "pyarrow", "unearth", "httpx2", "numpy"} - light
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(Path(l2a.__file__).parents[1])}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
