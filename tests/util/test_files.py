"""Output folders and the cache: whole or not at all, ours alone, one writer at a time."""

import contextlib
import json
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from l2a.util import Checkpoint, RunError, UsageError, files, fingerprint
from l2a.util.files import MARK, output_folder, read_mark


@pytest.fixture
def entry():
    """An entry of the cache, built where it is missing; the second value counts the builds."""
    built = []

    def get(kind="kind", key="key", content="right"):
        return files.cached_folder(kind, key, lambda path: built.append(key) or (path / "x").write_text(content)), built

    return get


def test_equal_content_gives_equal_fingerprints_and_any_change_another():
    base = {"a": [1, 2.0, None], "b": np.arange(3)}
    assert fingerprint(base) == fingerprint({"b": np.arange(3), "a": [1, 2.0, None]})
    changed = [{**base, "b": np.arange(4)}, {**base, "b": np.arange(3.0)}, {**base, "a": [1, 2.0, ""]}, [base, base]]
    assert len({fingerprint(value) for value in [base, *changed]}) == 5
    assert len({fingerprint(*value) for value in (["ab", "c"], ["a", "bc"], [["ab"], ["c"]], [["ab", "c"]])}) == 4
    assert len({fingerprint(value) for value in (1, "1", True, b"1", 1.0)}) == 5
    assert fingerprint("x", 1.5, [None]) == "9be55334ad0ffaee3164e59e2a73e23f", "kept results are found by it"


def test_an_entry_is_built_once_also_by_two_threads(entry):
    with ThreadPoolExecutor(2) as pool:
        (one, built), (other, _) = pool.map(lambda _: entry(), range(2))
    assert one == other and built == ["key"] and json.loads((one / "manifest.json").read_text()).keys() == {"x"}


def test_processes_share_one_cache(tmp_path, private_cache):
    code = """
import sys, time
from l2a.util.files import cached_folder
def build(folder):
    time.sleep(0.2)
    (folder / "x").write_text("right")
    print("built", file=open(sys.argv[1], "a"))
assert (cached_folder("kind", "key", build) / "x").read_text() == "right"
"""
    command = [sys.executable, "-c", code, str(tmp_path / "builds")]
    started = [subprocess.Popen(command) for _ in range(4)]
    assert [process.wait() for process in started] == [0] * 4
    assert (tmp_path / "builds").read_text() == "built\n"


def test_a_damaged_entry_is_noticed_and_built_again(entry, caplog):
    (entry()[0] / "x").write_text("wrong")
    assert (entry()[0] / "x").read_text() == "right" and "damaged" in caplog.text


def test_a_failed_build_leaves_nothing(entry):
    def fail(folder):
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match="disk is full"):
        files.cached_folder("kind", "key", fail)
    assert [path.name for path in entry(key="other")[0].parent.iterdir() if path.suffix != ".lock"] == ["other"]


def test_what_a_killed_build_left_is_removed(entry):
    folder = entry()[0]
    (left := folder.parent / ".key.l2a-new.abc").mkdir()
    (own := folder.parent / ".key.mine").mkdir()
    assert entry()[1] == ["key"] and not left.exists() and own.exists()


def test_an_interrupted_folder_keeps_the_old_content(tmp_path):
    target = tmp_path / "run"
    with files.atomic_folder(target) as folder:
        (folder / "x").write_text("old")
    with pytest.raises(KeyboardInterrupt), files.atomic_folder(target) as folder:
        (folder / "x").write_text("new")
        raise KeyboardInterrupt
    assert (target / "x").read_text() == "old" and list(tmp_path.iterdir()) == [target]
    with files.atomic_folder(target) as folder:
        (folder / "y").write_text("new")
    assert [path.name for path in target.iterdir()] == ["y"]


def test_the_cache_is_listed_and_cleared_by_kind(entry):
    for kind, key in (("teachers", "a"), ("teachers", "b"), ("artifacts", "c")):
        entry(kind, key)
    assert {kind: count for kind, (count, _) in files.cache_sizes().items()} == {"artifacts": 1, "teachers": 2}
    with pytest.raises(UsageError, match="teachers"):
        files.clear_cache(("teacher",))
    assert files.clear_cache(("teachers",)) > 10 and list(files.cache_sizes()) == ["artifacts"]


def write(path, content, overwrite=False):
    with output_folder(path, "run", overwrite) as folder:
        (folder / "student").mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)


def content_of(path):
    found = {file.relative_to(path).as_posix(): file.read_text() for file in path.rglob("*") if file.is_file()}
    return {name: text for name, text in found.items() if name not in (MARK, files.LOCK)}


OLD_RUN = {"metrics.json": "old", "student/model": "old", "only_old": "old"}
NEW_RUN = {"metrics.json": "new", "student/model": "new", "only_new": "new"}


def test_overwriting_replaces_what_a_run_wrote_and_nothing_else(tmp_path):
    path = tmp_path / "run"
    write(path, OLD_RUN)
    (path / "notes.txt").write_text("mine")
    (path / "student" / "mine").write_text("mine")
    write(path, NEW_RUN, overwrite=True)
    assert content_of(path) == NEW_RUN | {"notes.txt": "mine", "student/mine": "mine"}
    assert set(read_mark(path / MARK)["files"]) == set(NEW_RUN)
    assert stat.S_IMODE((path / "metrics.json").stat().st_mode) & 0o044


@pytest.mark.parametrize("name", ["metrics.json", "policy.json", "anything"])
def test_a_folder_without_our_mark_is_never_touched(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(UsageError, match="other files"):
        write(tmp_path, NEW_RUN, overwrite=True)
    assert content_of(tmp_path) == {name: "precious"}


def test_a_finished_run_is_replaced_only_on_request(tmp_path):
    write(tmp_path / "run", OLD_RUN)
    with pytest.raises(UsageError, match="--overwrite"):
        write(tmp_path / "run", NEW_RUN)
    with pytest.raises(UsageError, match="other files"), output_folder(tmp_path / "run", "policy", True):
        pass


def test_a_users_file_in_the_place_of_a_new_one_is_kept(tmp_path):
    write(tmp_path / "run", OLD_RUN)
    (tmp_path / "run" / "only_new").write_text("mine")
    with pytest.raises(RunError, match="only_new"):
        write(tmp_path / "run", NEW_RUN, overwrite=True)
    assert content_of(tmp_path / "run") == OLD_RUN | {"only_new": "mine"}


def test_a_failed_run_leaves_the_old_one_and_its_own_log(tmp_path):
    write(tmp_path / "run", OLD_RUN)
    with pytest.raises(KeyboardInterrupt), output_folder(tmp_path / "run", "run", True) as folder:
        (folder / "log.jsonl").write_text("why")
        raise KeyboardInterrupt
    assert content_of(tmp_path / "run") == OLD_RUN | {files.FAILED_LOG: "why"}
    write(tmp_path / "run", NEW_RUN, overwrite=True)
    assert content_of(tmp_path / "run") == NEW_RUN


class Killed(BaseException):
    """Stands for a kill: nothing may clean up after it."""


@pytest.mark.parametrize("step", range(12))
def test_a_kill_at_any_step_leaves_the_old_run_or_the_new_one(tmp_path, monkeypatch, step):
    path, steps = tmp_path / "run", []
    write(path, OLD_RUN)

    def or_killed(real):
        def act(*arguments, **options):
            steps.append(real)
            if len(steps) == step + 1:
                raise Killed
            return real(*arguments, **options) if len(steps) <= step else None

        return act

    with monkeypatch.context() as patch:
        for owner, name in ((files.os, "replace"), (files.shutil, "rmtree"), (files.Path, "unlink")):
            patch.setattr(owner, name, or_killed(getattr(owner, name)))
        with contextlib.suppress(Killed):
            write(path, NEW_RUN, overwrite=True)
    with pytest.raises(UsageError, match="--overwrite"):  # the next look at the folder recovers it
        write(path, {}, overwrite=False)
    assert content_of(path) == (OLD_RUN if step < 3 else NEW_RUN)
    assert set(read_mark(path / MARK)["files"]) == set(content_of(path))
    assert not [child for child in path.iterdir() if child.name.startswith(".l2a-")]


def keep(folder, *states, settings=None):
    checkpoint = Checkpoint(folder, settings or {"seed": 0})
    for state in states:
        checkpoint.save("stage", state)
    return checkpoint


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(min_size=1, max_size=50), st.booleans(), st.integers(0, 10**6))
def test_a_damaged_state_is_never_taken_for_a_whole_one(caplog, state, cut, place):
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = keep(Path(folder) / "kept", state)
        (file,) = Path(folder).glob("kept/stage.*")
        place %= 8 * len(state)
        flipped = bytes(byte ^ (1 << place % 8 if i == place // 8 else 0) for i, byte in enumerate(state))
        file.write_bytes(state[: place // 8] if cut else flipped)
        assert checkpoint.load("stage") is None and "older state" in caplog.text
        (older := file.with_name(file.name)).unlink()
        checkpoint.save("stage", b"before")
        older.write_bytes(flipped)
        assert checkpoint.load("stage") == b"before", "the older file is still whole"


@pytest.mark.parametrize("damage", [lambda text: text[:40], lambda text: text.replace('"seed": 0', '"seed": 4')])
def test_a_state_of_other_settings_or_with_a_damaged_mark_is_refused(tmp_path, damage):
    keep(tmp_path / "kept", b"state")
    assert keep(tmp_path / "kept").load("stage") == b"state"
    with pytest.raises(UsageError, match=r'"seed": 0 there, "seed": 1 here.*delete the folder'):
        keep(tmp_path / "kept", settings={"seed": 1})
    mark = tmp_path / "kept" / MARK
    mark.write_text(damage(mark.read_text()))
    with pytest.raises(UsageError, match="delete the folder"):
        keep(tmp_path / "kept")
    mark.unlink()
    assert keep(tmp_path / "kept", settings={"seed": 1}).load("stage") is None


def test_a_state_of_another_version_is_refused_as_such(tmp_path, monkeypatch):
    keep(tmp_path / "kept", b"state")
    monkeypatch.setattr("l2a.util.files.code_fingerprint", lambda: "of other code")
    with pytest.raises(UsageError, match="kept keeps an interrupted run of another version of l2a; finish it with"):
        keep(tmp_path / "kept")


FAILING = [("fdopen", 28, "full"), ("fsync", 28, "full"), ("replace", 30, "read")]


@pytest.mark.parametrize(("call", "number", "said"), FAILING)
def test_a_write_that_fails_leaves_the_last_state(tmp_path, monkeypatch, call, number, said):
    checkpoint = keep(tmp_path / "kept", b"first", b"second")
    with monkeypatch.context() as patch, pytest.raises(RunError, match=said):
        patch.setattr(files.os, call, Mock(side_effect=OSError(number, "no")))
        checkpoint.save("stage", b"third")
    assert checkpoint.load("stage") == b"second"
    assert sorted(path.suffix for path in (tmp_path / "kept").iterdir()) == [".json", ".safetensors"]


def test_the_state_of_a_run_goes_when_the_run_is_finished(tmp_path):
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), output_folder(path, "run"):
        keep(path / files.CHECKPOINT, b"state")
        raise KeyboardInterrupt
    with output_folder(path, "run") as folder:
        assert keep(path / files.CHECKPOINT).load("stage") == b"state"
        (folder / "model").write_text("done")
    assert content_of(path) == {"model": "done"} and not (path / files.CHECKPOINT).exists()


def test_two_runs_cannot_write_one_folder(tmp_path):
    with output_folder(tmp_path / "run", "run"), pytest.raises(RunError, match="another run is writing"):
        write(tmp_path / "run", NEW_RUN)


DISK = [(files.tempfile, "mkdtemp", 30, "is read-only"), (files, "atomic_write_text", 28, "disk is full")]


@pytest.mark.parametrize(("owner", "call", "number", "said"), DISK)
def test_a_failure_of_the_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, owner, call, number, said):
    with monkeypatch.context() as patch, pytest.raises(RunError, match=said):
        patch.setattr(owner, call, Mock(side_effect=OSError(number, "no")))
        write(tmp_path / "run", NEW_RUN)
    assert not any(tmp_path.iterdir())
    write(tmp_path / "run", NEW_RUN)
    assert content_of(tmp_path / "run") == NEW_RUN


def test_the_mark_tells_what_every_file_held(tmp_path):
    write(tmp_path / "run", NEW_RUN)
    mark = json.loads((tmp_path / "run" / MARK).read_text())
    assert mark["kind"] == "run" and mark["files"]["metrics.json"] == files.sha256_file(tmp_path / "run/metrics.json")
    (tmp_path / "run" / MARK).write_text("[]")
    with pytest.raises(UsageError, match="other files"):
        write(tmp_path / "run", NEW_RUN, overwrite=True)


@pytest.mark.parametrize("name", ["../mine", "/{}/mine", "link/mine", "a/../../mine"])
@pytest.mark.parametrize("ready", ["", files.READY])
def test_a_mark_that_names_files_elsewhere_removes_and_moves_nothing(tmp_path, name, ready):
    (tmp_path / "mine").write_text("mine")
    output = tmp_path / "output"
    (output / ready).mkdir(parents=True)
    (output / ready / "link").symlink_to(tmp_path)
    mark = {"format": 1, "kind": "run", "files": {name.format(tmp_path): "0"}}
    (output / ready / MARK).write_text(json.dumps(mark))
    with contextlib.suppress(UsageError), output_folder(output, "run", overwrite=True) as folder:
        (folder / "metrics.json").write_text("new")
    assert (tmp_path / "mine").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "output"}
