import contextlib
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from l2a.experiments.runner import RESULTS_FILE, CellResult, from_line, read_results, save_result, to_line
from l2a.util import files

Make = Callable[..., CellResult]
KEPT = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob(f"*/{RESULTS_FILE}"))
as_fixture = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@as_fixture
@given(accuracy=st.floats(0, 1), pair=st.text(max_size=8), facts=st.dictionaries(st.text(max_size=4), st.integers()))
def test_a_result_survives_its_line(make_result, accuracy, pair, facts):
    result = make_result(accuracy=accuracy, pair=pair, diagnostics=facts)
    assert from_line(to_line(result).encode("utf-8", "surrogatepass")) == result
    numbers = {"a": np.float32(0.5), "b": np.int64(3), "c": np.float64(0.1)}
    assert from_line(to_line(make_result(diagnostics=numbers)).encode()).diagnostics == {"a": 0.5, "b": 3, "c": 0.1}


@as_fixture
@given(position=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_no_changed_byte_gives_a_wrong_result(make_result, position, byte):
    result = make_result(accuracy=0.8125)
    line = bytearray(to_line(result).encode())
    line[position % len(line)] = byte
    with contextlib.suppress(ValueError):
        assert from_line(bytes(line)) == result  # such as a space for a space


@pytest.mark.parametrize(
    "damage", [lambda text: text[:-40], lambda text: text.replace("0.25", "0.95"), lambda text: ""]
)
def test_a_damaged_line_costs_its_own_cell_only(tmp_path, make_result, caplog, damage):
    for seed in range(3):
        save_result(tmp_path, make_result(seed=seed, accuracy=0.25 * seed))
    lines = (tmp_path / RESULTS_FILE).read_text().split("\n")
    lines[1] = damage(lines[1])
    (tmp_path / RESULTS_FILE).write_text("\n".join(lines))
    assert [result.seed for result in read_results(tmp_path)] == [0, 2]
    assert ("line 2 is damaged" in caplog.text) == bool(lines[1])
    (tmp_path / RESULTS_FILE).write_bytes(bytes(range(256)) * 4)
    assert read_results(tmp_path) == ()


@pytest.mark.parametrize("card", [path.parent for path in KEPT], ids=lambda folder: folder.name)
def test_lines_of_earlier_versions_can_be_read(card):
    assert len(read_results(card)) == len((card / RESULTS_FILE).read_text("utf-8").splitlines()) > 0


def test_a_cell_that_ran_again_replaces_its_old_result(tmp_path, make_result):
    save_result(tmp_path, make_result(accuracy=0.1, key="old"))
    save_result(tmp_path, make_result(accuracy=0.9, key="new"))
    assert [result.key for result in read_results(tmp_path)] == ["new"]
    assert (tmp_path / ".locks" / ".gitignore").read_text() == "*\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".locks", RESULTS_FILE]


def test_the_order_of_the_file_does_not_depend_on_the_order_of_the_run(tmp_path, make_result):
    results = [make_result(seed=seed, variant=variant) for seed in range(3) for variant in "ba"]
    for result in results:
        save_result(tmp_path / "one", result)
    for result in reversed(results):
        save_result(tmp_path / "two", result)
    assert (tmp_path / "one" / RESULTS_FILE).read_bytes() == (tmp_path / "two" / RESULTS_FILE).read_bytes()


def save_many(folder, results):
    for result in results:
        save_result(folder, result)


def test_two_writers_lose_nothing(tmp_path, make_result):
    context = multiprocessing.get_context("fork")
    work = [[make_result(seed=seed, variant=variant) for seed in range(8)] for variant in "ab"]
    writers = [context.Process(target=save_many, args=(tmp_path, results)) for results in work]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(read_results(tmp_path)) == 16


def test_any_changed_source_of_the_package_is_other_code(tmp_path, monkeypatch):
    def found():
        files.code_fingerprint.cache_clear()
        return files.code_fingerprint()

    before = found()
    package = tmp_path / "l2a"
    shutil.copytree(files.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(files, "PACKAGE", package)
    assert found() == before
    (package / "kd" / "losses.py").open("a").write("\n")
    assert found() != before
    monkeypatch.undo()
    found()
