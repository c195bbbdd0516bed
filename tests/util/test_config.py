import pytest
import yaml

from l2a.config import DistillConfig, as_yaml, load_config, override, settle
from l2a.util.cards import find_card
from l2a.util.errors import UsageError


def test_flags_override_the_file_and_the_file_overrides_the_preset(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("shots: 8\nkd:\n  rounds: 3\n")
    config = load_config("quick", file, {"shots": 4, "kd.temperature": 3, "seed": None})
    assert (config.shots, config.kd.rounds, config.kd.temperature, config.compare) == (4, 3, 3.0, False)


def test_all_wrong_keys_are_reported_together_with_suggestions():
    with pytest.raises(UsageError) as caught:
        override(DistillConfig(), {"selector.agnt": "ppo", "kd.tempratur": 2, "shotts": 1})
    message = str(caught.value)
    assert "'agent'" in message and "'temperature'" in message and "'shots'" in message


@pytest.mark.parametrize("change", [{"shots": 0}, {"kd.alpha": 1.5}, {"seed": "one"}, {"compare": 1}, {"kd": 3}])
def test_wrong_values_are_refused(change):
    with pytest.raises(UsageError):
        override(DistillConfig(), change)


def test_the_printed_configuration_reads_back(tmp_path):
    config = load_config("full", None, {"seed": 7, "target_columns.text": "body"})
    file = tmp_path / "printed.yaml"
    file.write_text(as_yaml(config))
    assert load_config("default", file) == config


def test_exponents_without_a_dot_are_numbers(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("kd: {learning_rate: 1e-4}")
    assert load_config("default", file).kd.learning_rate == 1e-4


@pytest.mark.parametrize("preset", ["quick", "default", "full", "screening", "standard"])
def test_shipped_presets_are_valid(preset):
    assert isinstance(load_config(preset), DistillConfig)


def test_a_card_of_the_working_directory_adds_a_name_and_hides_none(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quick.yaml").write_text("shots: 5")
    (tmp_path / "configs" / "default.yaml").write_text("defaults: [hydra]")
    (tmp_path / "configs" / "mine.yaml").write_text("shots: 6")
    assert load_config("quick").shots == 32 and "quick.yaml" in caplog.text
    assert load_config("default") == settle(DistillConfig())
    assert load_config("mine").shots == 6


def test_a_key_that_stands_twice_is_refused(tmp_path):
    file = tmp_path / "twice.yaml"
    file.write_text("kd:\n  rounds: 1\n  alpha: 0.5\n  rounds: 2\n")
    with pytest.raises(UsageError, match="'rounds' is given twice"):
        load_config("default", file)


def test_an_unknown_card_lists_what_exists():
    with pytest.raises(UsageError, match="did you mean 'quick'"):
        find_card("configs", "qick")


def test_python_objects_in_yaml_are_refused(tmp_path):
    file = tmp_path / "evil.yaml"
    file.write_text(yaml.dump(DistillConfig))
    with pytest.raises(UsageError):
        load_config("default", file)
