import json
import platform
import re
import resource
import subprocess
import sys
from importlib.metadata import version

import pytest
import yaml

from tests.conftest import write_domain

from .conftest import COMMANDS


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nsys.argv = ['l2a', '--help']\nfrom l2a.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'sklearn', 'gymnasium', 'pandas', 'datasets', 'matplotlib'}\n"
        "sys.exit(bool(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.slow
def test_help_is_quick():
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "l2a", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Processor time and the best of several, so that a busy machine does not fail it.
    assert min(seconds() for _ in range(7)) < 0.3


def test_no_network_and_nothing_cached_is_a_failed_run(run, tmp_path, monkeypatch):
    write_domain(tmp_path / "source.jsonl", 60, seed=1)
    write_domain(tmp_path / "target.jsonl", 60, seed=2, prefix="this ")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    request = "distill --source source.jsonl --target target.jsonl --output-dir run --shots 4 --dev-shots 4"
    code, _, err = run(*request.split())
    assert code == 1 and "all-mpnet-base-v2" in err and "Traceback" not in err
    assert "failed.log.jsonl" in err and (tmp_path / "run" / "failed.log.jsonl").read_text()


def test_the_configuration_is_printed_and_columns_are_named_for_both_sides_or_for_one(run):
    columns = "--source-text-column review --target-text-column tweet --label-column stars"
    code, out, _ = run("distill", "--print-config", "--shots", "7", "--preset", "fast", *columns.split())
    config = yaml.safe_load(out)
    assert code == 0 and config["shots"] == 7 and config["compare"] is False
    assert config["source_columns"] == {"text": "review", "text_pair": None, "label": "stars"}
    assert config["target_columns"] == {"text": "tweet", "text_pair": None, "label": "stars"}


def test_an_error_is_one_line_and_moves_no_cursor(run):
    _, _, errors = run("cache", "clear", "a\x1b[31mb\nerror: c\r\udce9")
    assert errors.count("\n") == 1 and errors.startswith("error: ") and "\x1b" not in errors and "\r" not in errors
    assert "a\\x1b[31mb" in errors


def test_a_bug_report_has_versions_machine_and_cache_and_survives_a_broken_torch(run, monkeypatch, tmp_path):
    monkeypatch.setenv("L2A_CACHE", str(tmp_path))
    facts = json.loads(run("env", "--json")[1])
    assert facts["packages"]["stable-baselines3"] == version("stable-baselines3") and None not in facts.values()
    assert facts["python"].startswith(platform.python_version()) and facts["cache"] == f"{tmp_path}, 0.0 MB"
    assert {"matplotlib", "onnx"} <= set(facts["packages"]) and "threads" in facts["arithmetic"]
    assert facts["variables"]["L2A_CACHE"] == str(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    code, out, _ = run("env")
    assert code == 0 and "cannot be imported" in out and "arithmetic" not in out


@pytest.mark.parametrize(
    "words",
    [
        "pretrain --text {good} --protect {odd} --output-dir general", "augment {good} new.jsonl --source {folder}",
        "export run --texts {odd}", "evaluate {student} {odd}", "distill --source {odd} --target {odd}",
    ],
)  # fmt: skip
def test_a_missing_column_is_to_be_named_by_options_that_the_command_has(run, words, classifier_folder, tmp_path):
    odd, good = tmp_path / "folder" / "train.csv", tmp_path / "good.csv"
    odd.parent.mkdir()
    odd.write_text("body,mood\na good film,positive\na bad one,negative\n")
    good.write_text("text\na good film\n")
    places = {"odd": odd, "good": good, "folder": odd.parent, "student": classifier_folder}
    command, *rest = words.format_map(places).split()
    code, _, err = run(command, *rest)
    assert code == 2 and "no text column" in err and "'body', 'mood'; name one by" in err
    options = {option for parameter in COMMANDS.commands[command].params for option in parameter.opts}
    assert set(re.findall(r"name one by (--[a-z-]+)", err)) <= options
