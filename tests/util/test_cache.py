import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest

from l2a.util import files
from l2a.util.errors import RunError, UsageError
from l2a.util.files import fingerprint


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
from pathlib import Path
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
    for content, error in (("old", None), ("new", KeyboardInterrupt)):
        with pytest.raises(error) if error else nullcontext(), files.atomic_folder(target) as folder:
            (folder / "x").write_text(content)
            if error:
                raise error
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


def test_a_cache_that_is_a_file_or_cannot_be_made_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("L2A_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="L2A_CACHE"):
        files.cache_root()
    monkeypatch.setenv("L2A_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(RunError, match="a part of the path is a file"):
        files.cache_root()
