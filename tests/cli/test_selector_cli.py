"""`l2a selector` from end to end on tiny data."""

import json
from pathlib import Path

import pytest

from l2a.selector.algorithms import Training
from tests.conftest import write_domain

SETTINGS = """
max_length: 24
dev_shots: 6
teacher: {learning_rate: 0.001, frozen_layers: 0, source_epochs: 4}
student: {max_share: 0.9}
kd: {warmup_steps: 20, rounds: 1, round_steps: 5, pool_size: 48, learning_rate: 0.002}
generator: {chains: 8}
selector: {batch: 8, episode_steps: 4, real_evaluations: 3}
"""


@pytest.fixture
def base(tmp_path: Path, encoder_folder: Path) -> list[str]:
    (tmp_path / "settings.yaml").write_text(SETTINGS)
    return ["--config", str(tmp_path / "settings.yaml"), "--teacher", str(encoder_folder), "--shots", "8"]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    source = write_domain(tmp_path / "source.jsonl", 200, seed=1, prefix="the story ")
    return str(source), str(write_domain(tmp_path / "target.jsonl", 150, seed=2, prefix="this phone "))


@pytest.mark.slow
def test_a_policy_is_trained_compared_shown_and_used(run, base, pair, tmp_path):
    folder, domains = str(tmp_path / "policy"), ["--source", pair[0], "--target", pair[1]]
    code, out, err = run(
        "selector", "train", "--pair", ":".join(pair), "--agent", "a2c", "--steps", "128", "--seed", "0", "--seed", "1",
        "--output-dir", folder, *base,
    )  # fmt: skip
    assert code == 0, err
    assert "reward of training episodes" in out and folder in out
    facts = json.loads((tmp_path / "policy" / "policy.json").read_text())["facts"]
    assert facts["pairs"] == [":".join(pair)] and facts["seeds"] == [0, 1] and facts["steps"] == 128

    code, out, err = run("selector", "evaluate", folder, *domains, "--updates", "2", *base)
    assert code == 0, err
    assert all(name in out for name in ("policy", "all", "random", "nearest", "glitter", "low_variance"))
    assert "after 2 updates" in out and "was trained on" in out

    code, out, err = run("selector", "show", folder)
    assert code == 0, err
    assert "a2c" in out and "seeds" in out and "reward of training episodes" in out and "give --source" in out

    code, out, err = run("selector", "show", folder, *domains, *base)
    assert code == 0, err
    assert "permutation importance" in out and "log_density" in out and "operator" in out
    assert sum(line.split()[:1] == ["kept"] for line in out.splitlines()) == 10
    assert sum(line.split()[:1] == ["dropped"] for line in out.splitlines()) == 10

    done = str(tmp_path / "run")
    code, _, err = run("distill", *domains, "--selector", folder, "--no-compare", "--output-dir", done, *base)
    assert code == 0, err
    assert json.loads((tmp_path / "run" / "selector" / "selection.json").read_text())["agent"] == folder


@pytest.fixture
def configs(monkeypatch):
    """The configurations that a training would get; nothing is trained."""
    seen = []
    nothing = Training((), (), 0, 0.0)
    monkeypatch.setattr("l2a.pipeline.policies.train_selector", lambda runs, *_: seen.extend(runs) or nothing)
    return seen


@pytest.mark.parametrize(
    ("file", "flags", "trained"),
    [
        ("seed: 0", [], "ppo"),
        ("selector: {agent: dvrl}", [], "dvrl"),
        ("selector: {agent: dvrl}", ["--agent", "a2c"], "a2c"),
    ],
)
def test_the_agent_to_train_is_that_of_the_flag_then_of_the_file(run, tmp_path, configs, file, flags, trained):
    (tmp_path / "own.yaml").write_text(file)
    code, _, err = run("selector", "train", "--config", str(tmp_path / "own.yaml"), "--output-dir", "policy", *flags)
    assert code == 0, err
    assert [config.selector.agent for config in configs] == [trained]


def test_pairs_and_seeds_each_give_a_configuration(run, configs):
    pairs = ["--source", "movies", "--target", "tweets", "--pair", "movies:products", "--seed", "3", "--seed", "4"]
    assert run("selector", "train", "--output-dir", "policy", *pairs, "--source-text-column", "body")[0] == 0
    assert run("selector", "train", "--output-dir", "policy", "--pair", "theirs.csv:mine.csv")[0] == 0
    assert [config.shots for config in configs] == [32] * 4 + [None], "all labels of a target that is not shipped"
    made = [(config.source, config.target, config.seed, config.source_columns.text) for config in configs[:4]]
    assert made == [("movies", target, seed, "body") for target in ("tweets", "products") for seed in (3, 4)]
