import errno
import os

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from l2a.generator.chain import CandidatePool
from l2a.report.run_folder import write_augmentations
from l2a.selector.problem import Selection
from l2a.teacher.labelling import TeacherOutputs
from l2a.util.errors import RunError

COLUMNS = [
    "text",
    "text_pair",
    "origin",
    "operator",
    "degree",
    "teacher_probabilities",
    "selector_score",
    "kept",
    "round",
]


def make_round(inputs):
    size, zeros = len(inputs), np.zeros(len(inputs), np.float32)
    origins = tuple(f"source:{i}" for i in range(size))
    outputs = TeacherOutputs(np.zeros((size, 2), np.float32), np.zeros((size, 4), np.float32))
    degrees = np.linspace(0, 1, size, dtype=np.float32)
    pool = CandidatePool(inputs, origins, ("augpro_mix",) * size, degrees, outputs, zeros, zeros, zeros)
    return pool, Selection(np.arange(size) % 2 == 0, np.arange(size, dtype=np.float32), "random", {})


def test_every_candidate_of_every_round_is_written(tmp_path):
    path = tmp_path / "augmentations.parquet"
    write_augmentations(path, [make_round((("one",), ("two",))), make_round((("three",),))])
    frame = pd.read_parquet(path)
    assert list(frame.columns) == COLUMNS
    assert frame["text"].tolist() == ["one", "two", "three"]
    assert frame["text_pair"].isna().all()
    assert frame["round"].tolist() == [0, 0, 1]
    assert frame["kept"].tolist() == [True, False, True]
    assert frame["origin"].tolist() == ["source:0", "source:1", "source:0"]
    assert frame["degree"].tolist() == [0.0, 1.0, 0.0]
    assert frame["selector_score"].tolist() == [0.0, 1.0, 0.0]
    assert [list(row) for row in frame["teacher_probabilities"]] == [[0.5, 0.5]] * 3


def test_pairs_keep_both_sides(tmp_path):
    write_augmentations(tmp_path / "pairs.parquet", [make_round((("premise", "claim"),))])
    assert pd.read_parquet(tmp_path / "pairs.parquet")[["text", "text_pair"]].values.tolist() == [["premise", "claim"]]


def test_no_round_gives_an_empty_file_with_all_columns(tmp_path):
    write_augmentations(tmp_path / "none.parquet", [])
    frame = pd.read_parquet(tmp_path / "none.parquet")
    assert list(frame.columns) == COLUMNS and frame.empty


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.text(), st.text()), max_size=8))
def test_any_text_is_read_back(tmp_path, inputs):
    write_augmentations(tmp_path / "any.parquet", [make_round(tuple(inputs))])
    frame = pd.read_parquet(tmp_path / "any.parquet")
    assert list(zip(frame["text"], frame["text_pair"], strict=True)) == inputs


def test_a_lone_surrogate_does_not_stop_the_run(tmp_path):
    write_augmentations(tmp_path / "odd.parquet", [make_round((("bad \ud83d end",),))])
    assert pd.read_parquet(tmp_path / "odd.parquet")["text"].tolist() == ["bad ? end"]


def test_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="disk is full"):
        write_augmentations(tmp_path / "full.parquet", [make_round((("one",),))])
    assert list(tmp_path.iterdir()) == []
