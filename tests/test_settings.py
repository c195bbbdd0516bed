"""Settings refuse what they cannot use, by name."""

import dataclasses
import math

import pytest

from l2a.config import DistillConfig, StudentConfig, load_config, settle
from l2a.util.errors import UsageError


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), "much", True, None, -1])
@pytest.mark.parametrize("name", ["kd.learning_rate", "teacher.source_epochs", "student.max_share", "kd.pool_size"])
def test_a_number_that_is_none_is_refused_by_name(name, value):
    section, field = name.split(".")
    part = getattr(DistillConfig(), section)
    with pytest.raises(UsageError, match=rf"{section}\.{field} is .*; give (auto or )?a (number|share|whole number)"):
        dataclasses.replace(part, **{field: value})


def test_every_number_of_every_section_refuses_nan():
    sections = [
        DistillConfig(),
        *(getattr(DistillConfig(), name) for name in ("teacher", "generator", "selector", "kd")),
    ]
    for part in sections:
        for field in dataclasses.fields(part):
            if type(getattr(part, field.name)) in (int, float):
                with pytest.raises(UsageError, match=f"{field.name} is nan"):
                    dataclasses.replace(part, **{field.name: math.nan})


def test_a_wrong_word_is_refused_with_the_nearest_right_one():
    with pytest.raises(UsageError, match=r"student.preset is 'narow' \(did you mean 'narrow'\?\)"):
        StudentConfig(preset="narow")
    with pytest.raises(UsageError, match=r"seed is 99999999999999999999; give a whole number from 0 to 2147483647"):
        DistillConfig(seed=99999999999999999999)


def test_source_and_shots_follow_from_the_target():
    assert (settle(DistillConfig()).source, settle(DistillConfig()).shots) == ("movies", 32)
    assert settle(DistillConfig(source="mine.csv", shots=4)).source == "mine.csv"
    own = settle(DistillConfig(source="movies", target="mine.csv"))
    assert own.shots is None
    with pytest.raises(UsageError, match=r"source is not given.*'mine.csv'"):
        load_config("default", flags={"target": "mine.csv"})
