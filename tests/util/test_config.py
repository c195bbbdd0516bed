import dataclasses
import json
import logging
import math
import re
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml
from hypothesis import given, settings, strategies as st

from l2a.config import DistillConfig, GeneratorConfig, as_yaml, load_config, override, settle
from l2a.util import Progress, UsageError, find_card
from l2a.util.cards import shipped_folder


def load(tmp_path, text, **options):
    (tmp_path / "own.yaml").write_text(text)
    return load_config("default", tmp_path / "own.yaml", **options)


def test_flags_override_the_file_and_the_file_overrides_the_preset(tmp_path):
    (tmp_path / "mine.yaml").write_text("shots: 8\nkd:\n  rounds: 3\n")
    config = load_config("fast", tmp_path / "mine.yaml", {"shots": 4, "kd.temperature": 3, "seed": None})
    assert (config.shots, config.kd.rounds, config.kd.temperature, config.compare) == (4, 3, 3.0, False)


def test_all_wrong_keys_are_reported_together_with_suggestions():
    with pytest.raises(UsageError, match=r"'shots'.*'agent'.*'temperature'"):
        override(DistillConfig(), {"selector.agnt": "ppo", "kd.tempratur": 2, "shotts": 1})


WRONG = [
    ({"shots": 0}, "shots is 0; give a whole number of at least 1 or null"),
    ({"kd.alpha": 1.5}, "kd.alpha is 1.5; give a number from 0 to 1"),
    ({"seed": "one"}, "seed is 'one'; give a whole number from 0 to 2147483647"),
    ({"seed": 2**31}, "seed is 2147483648; give a whole number from 0 to 2147483647"),
    ({"compare": 1}, "compare is 1; give true or false"),
    ({"kd": 3}, "kd is 3; give a mapping of its keys to values"),
    ({"generator.operators": {"knn": -1}}, "generator.operators.knn is -1.0; give a number of 0 or more"),
    ({"target_columns.text": 3}, "target_columns.text is 3; give printable text or null"),
    ({"teacher.frozen_layers": "atuo"}, r"frozen_layers is 'atuo' \(did you mean 'auto'\?\); give auto or a whole"),
]


@pytest.mark.parametrize(("change", "problem"), WRONG)
def test_wrong_values_are_refused_by_name(change, problem):
    with pytest.raises(UsageError, match=problem):
        override(DistillConfig(), change)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "much", True, None, -1])
@pytest.mark.parametrize("name", ["kd.learning_rate", "teacher.source_epochs", "student.max_share", "kd.pool_size"])
def test_a_number_that_is_none_is_refused_by_name(name, value):
    section, field = name.split(".")
    with pytest.raises(UsageError, match=rf"{section}\.{field} is .*; give (auto or )?a (number|share|whole number)"):
        dataclasses.replace(getattr(DistillConfig(), section), **{field: value})


def test_every_number_of_every_section_refuses_nan():
    config = DistillConfig()
    for part in (config, config.teacher, config.generator, config.selector, config.kd):
        for field in dataclasses.fields(part):
            if type(getattr(part, field.name)) in (int, float):
                with pytest.raises(UsageError, match=f"{field.name} is nan"):
                    dataclasses.replace(part, **{field.name: math.nan})
    assert GeneratorConfig(tau=math.inf).tau == math.inf


def test_source_and_shots_follow_from_the_target():
    assert (settle(DistillConfig()).source, settle(DistillConfig()).shots) == ("movies", 32)
    assert settle(DistillConfig(source="mine.csv", shots=4)).source == "mine.csv"
    assert settle(DistillConfig(source="movies", target="mine.csv")).shots is None
    with pytest.raises(UsageError, match=r"source is not given.*'mine.csv'"):
        settle(load_config("default", flags={"target": "mine.csv"}))


@pytest.mark.parametrize("preset", ["fast", "default", "full", "screening", "standard"])
def test_shipped_presets_are_valid_and_read_back_as_they_are_printed(tmp_path, preset):
    config = load_config(preset, None, {"seed": 7, "target_columns.text": "body"})
    assert load(tmp_path, as_yaml(config)) == config


def test_a_card_of_the_working_directory_adds_a_name_and_hides_none(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    for name, content in (("fast", "shots: 5"), ("default", "defaults: [hydra]"), ("mine", "shots: 6")):
        (tmp_path / "configs" / f"{name}.yaml").write_text(content)
    assert load_config("fast").shots is None and "fast.yaml" in caplog.text
    assert load_config("default") == DistillConfig() and load_config("mine").shots == 6
    with pytest.raises(UsageError, match="did you mean 'fast'"):
        find_card("configs", "fsat")


def test_a_copy_of_a_shipped_card_is_no_matter_and_one_that_cannot_be_read_is_told(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shipped_folder("configs"), tmp_path / "configs")
    assert find_card("configs", "fast") == shipped_folder("configs") / "fast.yaml" and not caplog.text
    monkeypatch.setattr(Path, "read_bytes", Mock(side_effect=PermissionError))
    assert find_card("configs", "fast") == shipped_folder("configs") / "fast.yaml" and "is not used" in caplog.text


def test_yaml_is_read_strictly_and_exponents_without_a_dot_are_numbers(tmp_path):
    assert load(tmp_path, "kd: {learning_rate: 1e-4}").kd.learning_rate == 1e-4
    with pytest.raises(UsageError, match="'rounds' is given twice"):
        load(tmp_path, "kd:\n  rounds: 1\n  alpha: 0.5\n  rounds: 2\n")
    with pytest.raises(UsageError, match="not YAML"):
        load(tmp_path, yaml.dump(DistillConfig))


def test_a_warning_is_shown_once_even_by_a_quiet_run_and_is_kept(tmp_path, capsys):
    logger = logging.getLogger("l2a.data.readers")
    with Progress(tmp_path / "log.jsonl", -1) as progress:
        for _ in range(2):
            logger.warning("%d texts are odd; mend them", 3)
        logger.info("all is well")
        progress.say("all is well")
    logger.warning("too late")
    assert progress.warnings == ["3 texts are odd; mend them"]
    assert capsys.readouterr().err.count("warning: 3 texts are odd; mend them\n") == 1
    assert [json.loads(line)["event"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == ["warning"]


def test_a_terminal_shows_a_bar_of_the_whole_run_with_the_time_left(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    with Progress() as progress:
        advance = progress.whole("methods", 3)
        for _ in range(2):
            with progress.stage("train", 10) as step:
                step(10)
            advance(1)
    assert list(progress.seconds_by_stage) == ["train"]
    last = [line for line in capsys.readouterr().err.splitlines() if "methods" in line][-1]
    assert "2/3" in last and len(re.findall(r"\d:\d\d:\d\d", last)) == 2  # since the start, and left


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from(["auto", "1e-4"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = [*DistillConfig.__dataclass_fields__, *(f"{one}.{field}" for one in ("teacher", "generator", "kd", "selector")
          for field in getattr(DistillConfig(), one).__dataclass_fields__)]  # fmt: skip


@settings(max_examples=15)
@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=9), PLAIN, max_size=3))
def test_any_settings_are_refused_or_come_back_from_their_file(tmp_path_factory, changes):
    try:
        config = override(DistillConfig(), changes)
    except UsageError as error:
        assert str(error).startswith(("settings: ", "kd."))
        return
    file = tmp_path_factory.mktemp("config") / "own.yaml"
    file.write_text(as_yaml(config))
    assert load_config("default", file) == config
