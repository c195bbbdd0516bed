"""Cells are run once, in any order and number of processes; the file of results survives."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from l2a.experiments import runner
from l2a.experiments.runner import RESULTS_FILE, Workers, cost_seconds, from_line, read_results, save_result, to_line
from l2a.pipeline.methods import run_method
from l2a.util import files
from l2a.util.errors import RunError, UsageError
from l2a.util.files import fingerprint

from .conftest import planned, run_tiny, write_card, write_card_of_one_cell


def without_times(folder):
    return [replace(result, wall_seconds=0.0) for result in read_results(folder)]


def rows_run(trace):
    return [line.rsplit(" ", 1)[0] for line in trace.read_text().splitlines()] if trace.exists() else []


def test_every_cell_runs_once_on_one_thread_and_none_again_for_whatever_card(workspace, fake_run_method, trace):
    def teachers():
        return [cell.teacher_mark and cell.teacher_mark.exists() for cell in planned(workspace)[0]]

    assert teachers() == [None, False, False]
    torch.set_num_threads(2)
    outcomes = run_tiny(workspace, fake_run_method, "results/tiny")
    assert Counter(outcome.status for outcome in outcomes) == {"ran": 12}
    assert torch.get_num_threads() == 2 and teachers() == [None, True, True]
    assert run_tiny(workspace, fake_run_method, "results/tiny") == []
    results = read_results(workspace / "results/tiny")
    assert {result.diagnostics["threads"] for result in results} == {1}
    assert sorted(results[0].data) == ["land.jsonl", "sky.jsonl"] and results[0].labels_used == (4 + 2 * 16) * 2
    assert results[0].code == runner.code_fingerprint()
    outcomes = run_tiny(workspace, fake_run_method, "results/other")
    assert Counter(outcome.status for outcome in outcomes) == {"found": 12}
    assert read_results(workspace / "results/other") == results
    assert set(Counter(rows_run(trace)).values()) == {1}


def test_cells_run_again_when_their_line_is_damaged_or_their_settings_change(workspace, fake_run_method, trace):
    run_tiny(workspace, fake_run_method)
    path, before = workspace / "results" / RESULTS_FILE, without_times(workspace / "results")
    path.write_text(path.read_text().replace('"accuracy": ', '"accuracy": 1', 1))
    trace.unlink()
    run_tiny(workspace, fake_run_method)
    assert len(rows_run(trace)) == 1 and without_times(workspace / "results") == before
    trace.unlink()
    plain = {"method": "plain_kd_student", "overrides": {"kd.alpha": 0.5}}
    write_card(workspace, variants={"tfidf": {"method": "tfidf_logreg"}, "plain": plain})
    run_tiny(workspace, fake_run_method)
    assert {line.split()[2] for line in rows_run(trace)} == {"plain_kd_student"}
    assert len(read_results(workspace / "results")) == 12  # one line a cell: the old ones are replaced


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["loky", "dask"])
def test_results_are_identical_with_one_and_with_two_workers(workspace, fake_run_method, backend):
    run_tiny(workspace, fake_run_method, "one/tiny")
    run_tiny(workspace, fake_run_method, "two/tiny", workers=Workers(2, backend))
    one = without_times(workspace / "one/tiny")
    assert one == without_times(workspace / "two/tiny") and len({it.diagnostics["drawn"] for it in one}) > 1


def test_a_failed_cell_is_reported_and_stops_no_other(workspace, fake_run_method, monkeypatch):
    monkeypatch.setenv("FAIL_METHOD", "plain_kd_student")
    outcomes = Counter((status, message) for _, status, message in run_tiny(workspace, fake_run_method))
    assert outcomes == {("ran", ""): 8, ("failed", "the row failed, as it was told to"): 4}
    monkeypatch.delenv("FAIL_METHOD")
    assert len(run_tiny(workspace, fake_run_method)) == 4 and len(read_results(workspace / "results")) == 12


def test_an_unexpected_error_is_a_failed_cell_too(workspace, caplog):
    def broken(config, row, *_):
        raise ZeroDivisionError("one over nothing")

    assert {it.message for it in run_tiny(workspace, broken)} == {"ZeroDivisionError: one over nothing"}
    assert "Traceback" in caplog.text


def test_variants_that_differ_only_in_what_their_method_never_reads_run_once(workspace, fake_run_method, trace):
    variants = {
        f"{method}_{preset}": {"method": method, "overrides": {"student.preset": preset}}
        for method in ("tfidf_logreg", "plain_kd_student") for preset in ("auto", "narrow")
    }  # fmt: skip
    write_card(workspace, variants=variants, seeds=[0])
    run_tiny(workspace, fake_run_method)
    assert Counter(line.split()[2] for line in rows_run(trace)) == {"tfidf_logreg": 2, "plain_kd_student": 4}
    assert len(read_results(workspace / "results")) == 8


def test_a_group_that_another_runner_holds_is_left_to_it(workspace, fake_run_method):
    held = runner.lock_for(workspace / "results", fingerprint("sea_sky", 4, 0))
    seen = []

    def run_and_release(config, row, *_):
        seen.append(f"{config.source} {config.seed}")
        if len(seen) == 9:  # every cell of the three other groups
            held.release()
        return fake_run_method(config, row)

    held.acquire()
    assert len(run_tiny(workspace, run_and_release)) == 12 and seen[-3:] == ["sea.jsonl 0"] * 3


@pytest.mark.slow
def test_two_runners_at_once_run_every_cell_once(workspace, fake_run_method, trace, monkeypatch):
    monkeypatch.setenv("METHOD_SECONDS", "0.02")
    context = multiprocessing.get_context("fork")
    runners = [context.Process(target=run_tiny, args=(workspace, fake_run_method)) for _ in range(2)]
    for process in runners:
        process.start()
    for process in runners:
        process.join()
    assert len(read_results(workspace / "results")) == 12
    assert set(Counter(rows_run(trace)).values()) == {1}


@pytest.mark.slow
def test_a_killed_runner_loses_only_the_cell_it_was_running(workspace, fake_run_method, trace, monkeypatch):
    monkeypatch.setenv("METHOD_SECONDS", "0.05")
    process = multiprocessing.get_context("fork").Process(target=run_tiny, args=(workspace, fake_run_method))
    process.start()
    while len(rows_run(trace)) < 5:
        time.sleep(0.005)
    process.kill()
    process.join()
    finished = len(read_results(workspace / "results"))
    monkeypatch.setenv("METHOD_SECONDS", "0")
    assert finished >= 4 and len(run_tiny(workspace, fake_run_method)) == 12 - finished
    run_tiny(workspace, fake_run_method, "at_once/tiny")
    assert without_times(workspace / "results") == without_times(workspace / "at_once/tiny")


@pytest.mark.slow
def test_a_result_does_not_depend_on_what_is_cached(workspace, encoder_folder):
    write_card_of_one_cell(workspace, "l2a_student", encoder_folder)
    run_tiny(workspace, run_method, "cold/tiny")
    run_tiny(workspace, run_method, "warm/tiny")
    both = [it for name in ("cold/tiny", "warm/tiny") for it in read_results(workspace / name)]
    facts = [{name: fact for name, fact in it.diagnostics.items() if "seconds" not in name} for it in both]
    assert facts[0] == facts[1] and both[0].predictions == both[1].predictions


@pytest.mark.slow
def test_a_worker_that_dies_is_a_clear_error_and_the_rest_is_kept(workspace, fake_run_method):
    def deadly(config, row, *_):
        if config.seed == 1:
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        return fake_run_method(config, row)

    with pytest.raises(RunError, match="worker process was killed"):
        run_tiny(workspace, deadly, workers=Workers(2))
    assert {result.seed for result in read_results(workspace / "results")} == {0}


def test_the_cost_is_learned_from_finished_cells(workspace, make_result):
    slow = [make_result(variant=name, seconds=100.0, wall_seconds=110.0) for name in ("tfidf", "plain", "random")]
    learned = planned(workspace, slow)
    assert cost_seconds(planned(workspace), 1) == 12 * 30 + 4 * 30  # a teacher for each pair and seed
    costs = [12 * 100 + 4 * 10, (12 * 100 + 4 * 10) / 2, 3 * 100 + 10]  # the cells of a group run one after another
    assert [cost_seconds(learned, workers) for workers in (1, 2, 100)] == costs


def test_an_address_of_a_backend_that_runs_on_this_machine_is_refused():
    with pytest.raises(UsageError, match="add --backend dask"):
        Workers(1, address="tcp://somewhere:1")


@pytest.mark.slow
def test_no_scheduler_at_the_address_is_a_clear_error(workspace, fake_run_method):
    with pytest.raises(RunError, match="no Dask scheduler answers"):
        run_tiny(workspace, fake_run_method, workers=Workers(1, "dask", "tcp://127.0.0.1:9"))


def test_experiments_are_not_loaded_by_the_command_line():
    code = "import l2a.cli.research, sys; print([m for m in ('numpy', 'torch', 'joblib', 'scipy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


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
    line = bytearray(to_line(make_result()).encode())
    line[position % len(line)] = byte
    with contextlib.suppress(ValueError):
        assert from_line(bytes(line)) == make_result()  # such as a space for a space


@pytest.mark.parametrize("damage", [lambda line: line[:-40], lambda line: line.replace("0.25", "0.95"), lambda _: ""])
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


def test_the_file_depends_neither_on_the_order_of_the_run_nor_on_results_that_were_replaced(tmp_path, make_result):
    results = [make_result(seed=seed, variant=variant) for seed in range(3) for variant in "ba"]
    for one, other in zip(results, reversed(results), strict=True):
        for folder, result in (("one", one), ("two", replace(other, key="old")), ("two", other)):
            save_result(tmp_path / folder, result)
    assert (tmp_path / "one" / RESULTS_FILE).read_bytes() == (tmp_path / "two" / RESULTS_FILE).read_bytes()
    assert (tmp_path / "one" / ".locks" / ".gitignore").read_text() == "*\n"
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [".locks", RESULTS_FILE]


def test_two_writers_lose_nothing(tmp_path, make_result):
    results = [make_result(seed=seed, variant=variant) for seed in range(8) for variant in "ab"]
    with multiprocessing.get_context("fork").Pool(2) as writers:
        writers.map(partial(save_result, tmp_path), results, chunksize=1)
    assert read_results(tmp_path) == tuple(results)


def test_any_changed_source_of_the_package_is_other_code(tmp_path, monkeypatch):
    found = files.code_fingerprint.__wrapped__  # which keeps no answer
    before, package = found(), tmp_path / "l2a"
    shutil.copytree(files.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(files, "PACKAGE", package)
    assert found() == before
    (package / "kd" / "losses.py").open("a").write("\n")
    assert found() != before
