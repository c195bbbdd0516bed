"""The commands as a user types them; `l2a selector` from end to end on tiny data."""

import json
import platform
import re
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from l2a.selector.algorithms import Training
from tests.conftest import write_domain

from .conftest import COMMANDS

HELP = "sys.argv = ['l2a', '--help']\ntry:\n    l2a.cli.app.main()\nexcept SystemExit:\n    pass"
HEAVY = {"torch", "transformers", "sklearn", "gymnasium", "pandas", "datasets", "matplotlib", "pyarrow"}


@pytest.mark.parametrize("module", ["l2a.cli.app", "l2a.data.domains", "l2a.data.bank"])
def test_help_and_the_modules_that_read_data_load_nothing_heavy(module):
    then, also = (HELP, {"numpy"}) if module == "l2a.cli.app" else ("", set())
    code = f"import sys, {module}\n{then}\nsys.exit(bool({HEAVY | {'unearth', 'httpx2'} | also} & set(sys.modules)))"
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


def test_the_configuration_is_printed_and_columns_are_named_for_both_sides_or_for_one(run):
    columns = "--source-text-column review --target-text-column tweet --label-column stars"
    code, out, _ = run("distill", "--print-config", "--shots", "7", "--preset", "fast", *columns.split())
    config = yaml.safe_load(out)
    assert code == 0 and config["shots"] == 7 and config["compare"] is False
    for side, text in (("source", "review"), ("target", "tweet")):
        assert config[f"{side}_columns"] == {"text": text, "text_pair": None, "label": "stars"}


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


def test_a_missing_package_is_named_with_what_installs_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "joblib", None)
    code, _, err = run("experiment", "run", "shipped")
    assert code == 2 and "joblib" in err and "install 'l2a[experiments,export]'" in err


REQUESTS = [
    "pretrain --text {good} --protect {odd} --output-dir general", "augment {good} new.jsonl --source {folder}",
    "export run --texts {odd}", "evaluate {student} {odd}", "distill --source {odd} --target {odd}",
]  # fmt: skip


@pytest.mark.parametrize("words", REQUESTS)
def test_a_missing_column_is_to_be_named_by_options_that_the_command_has(run, words, classifier_folder, tmp_path):
    places = {"odd": tmp_path / "train.csv", "good": tmp_path / "good.csv"}
    places["odd"].write_text("body,mood\na good film,positive\na bad one,negative\n")
    places["good"].write_text("text\na good film\n")
    places |= {"folder": tmp_path, "student": classifier_folder}
    command, *rest = words.format_map(places).split()
    code, _, err = run(command, *rest)
    assert code == 2 and "no text column" in err and "'body', 'mood'; name one by" in err
    options = {option for parameter in COMMANDS.commands[command].params for option in parameter.opts}
    assert set(re.findall(r"name one by (--[a-z-]+)", err)) <= options


SETTINGS = """
max_length: 24
dev_shots: 6
teacher: {learning_rate: 0.001, frozen_layers: 0, source_epochs: 4}
student: {max_share: 0.9}
kd: {warmup_steps: 20, rounds: 1, round_steps: 5, pool_size: 48, learning_rate: 0.002}
generator: {chains: 8}
selector: {batch: 8, episode_steps: 4, real_evaluations: 3}
"""


@pytest.mark.slow
def test_a_policy_is_trained_compared_shown_and_used(run, encoder_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("settings.yaml").write_text(SETTINGS)
    write_domain(tmp_path / "source.jsonl", 200, seed=1, prefix="the story ")
    write_domain(tmp_path / "target.jsonl", 150, seed=2, prefix="this phone ")
    base = ["--config", "settings.yaml", "--teacher", str(encoder_folder), "--shots", "8"]
    domains = ["--source", "source.jsonl", "--target", "target.jsonl"]

    def done(request, *options):
        code, out, err = run(*request.split(), *options)
        assert code == 0, err
        return out

    pair = "source.jsonl:target.jsonl"
    out = done(f"selector train --pair {pair} --agent a2c --steps 128 --seed 0 --seed 1 --output-dir learnt", *base)
    assert "reward of training episodes" in out and "learnt" in out
    facts = json.loads(Path("learnt/policy.json").read_text())["facts"]
    assert facts["pairs"] == [pair] and facts["seeds"] == [0, 1] and facts["steps"] == 128

    out = done("selector evaluate learnt --updates 2", *domains, *base)
    assert all(name in out for name in ("policy", "all", "random", "nearest", "glitter", "low_variance"))
    assert "after 2 updates" in out and "was trained on" in out

    out = done("selector show learnt")
    assert "a2c" in out and "seeds" in out and "reward of training episodes" in out and "give --source" in out

    out = done("selector show learnt", *domains, *base)
    assert "permutation importance" in out and "log_density" in out and "operator" in out
    first_words = [line.split()[:1] for line in out.splitlines()]
    assert first_words.count(["kept"]) == first_words.count(["dropped"]) == 10

    done("distill --selector learnt --no-compare --output-dir run", *domains, *base)
    assert json.loads(Path("run/selector/selection.json").read_text())["agent"] == "learnt"


@pytest.fixture
def configs(monkeypatch):
    """The configurations that a training would get; nothing is trained."""
    seen, nothing = [], Training((), (), 0, 0.0)
    monkeypatch.setattr("l2a.pipeline.policies.train_selector", lambda runs, *_: seen.extend(runs) or nothing)
    return seen


AGENTS = [("{}", "", "ppo"), ("selector: {agent: dvrl}", "", "dvrl"), ("selector: {agent: dvrl}", "--agent a2c", "a2c")]


@pytest.mark.parametrize(("file", "flags", "trained"), AGENTS)
def test_the_agent_to_train_is_that_of_the_flag_then_of_the_file(run, tmp_path, configs, file, flags, trained):
    (tmp_path / "own.yaml").write_text(file)
    code, _, err = run(*f"selector train --config {tmp_path / 'own.yaml'} --output-dir policy {flags}".split())
    assert code == 0 and [config.selector.agent for config in configs] == [trained], err


def test_pairs_and_seeds_each_give_a_configuration(run, configs):
    pairs = ["--source", "movies", "--target", "tweets", "--pair", "movies:products", "--seed", "3", "--seed", "4"]
    assert run("selector", "train", "--output-dir", "policy", *pairs, "--source-text-column", "body")[0] == 0
    assert run("selector", "train", "--output-dir", "policy", "--pair", "theirs.csv:mine.csv")[0] == 0
    assert [config.shots for config in configs] == [32] * 4 + [None], "all labels of a target that is not shipped"
    made = [(config.source, config.target, config.seed, config.source_columns.text) for config in configs[:4]]
    assert made == [("movies", target, seed, "body") for target in ("tweets", "products") for seed in (3, 4)]
