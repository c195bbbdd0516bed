import json
import threading
from pathlib import Path

import numpy as np
import pytest

from l2a.util.errors import RunError, UsageError
from l2a.util.files import (
    atomic_folder,
    atomic_write_text,
    cache_root,
    cache_sizes,
    cached_folder,
    clear_cache,
    fingerprint,
)


def test_equal_content_gives_equal_fingerprints_and_any_change_another():
    base = {"a": [1, 2.0, None], "b": np.arange(3)}
    assert fingerprint(base) == fingerprint({"b": np.arange(3), "a": [1, 2.0, None]})
    changed = [{**base, "b": np.arange(4)}, {**base, "b": np.arange(3.0)}, {**base, "a": [1, 2.0, ""]}, [base, base]]
    assert len({fingerprint(value) for value in [base, *changed]}) == 5


def test_boundaries_between_parts_count():
    assert fingerprint("ab", "c") != fingerprint("a", "bc")
    assert fingerprint(["ab"], ["c"]) != fingerprint(["ab", "c"])
    assert fingerprint(1) != fingerprint("1") != fingerprint(True)


def test_an_entry_is_built_once():
    calls = []

    def build(folder: Path) -> None:
        calls.append(folder)
        (folder / "x").write_text("content")

    assert cached_folder("kind", "key", build) == cached_folder("kind", "key", build)
    assert len(calls) == 1


def test_a_damaged_entry_is_noticed_and_built_again(caplog):
    folder = cached_folder("kind", "key", lambda path: atomic_write_text(path / "x", "right"))
    (folder / "x").write_text("wrong")
    assert (
        cached_folder("kind", "key", lambda path: atomic_write_text(path / "x", "right")) / "x"
    ).read_text() == "right"
    assert "damaged" in caplog.text


def test_a_failed_build_leaves_nothing():
    def build(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match="disk is full"):
        cached_folder("kind", "key", build)
    built = cached_folder("kind", "key", lambda path: atomic_write_text(path / "x", "1"))
    assert json.loads((built / "manifest.json").read_text()).keys() == {"x"}
    assert [path.name for path in built.parent.iterdir() if not path.name.startswith(".key.lock")] == ["key"]


def test_two_threads_that_want_one_entry_build_it_once():
    built, barrier = [], threading.Barrier(2)

    def want() -> None:
        barrier.wait()
        cached_folder("kind", "key", lambda path: (built.append(1), atomic_write_text(path / "x", "1")))

    threads = [threading.Thread(target=want) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


def test_an_interrupted_folder_keeps_the_old_content(tmp_path):
    target = tmp_path / "run"
    with atomic_folder(target) as folder:
        (folder / "x").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(target) as folder:
        (folder / "x").write_text("new")
        raise KeyboardInterrupt
    assert (target / "x").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_cache_is_listed_and_cleared_by_kind(tmp_path, monkeypatch):
    monkeypatch.setenv("L2A_CACHE", str(tmp_path / "cache"))
    for kind, key in (("teachers", "a"), ("teachers", "b"), ("artifacts", "c")):
        cached_folder(kind, key, lambda path: atomic_write_text(path / "x", "12345"))
    assert {kind: count for kind, (count, _) in cache_sizes().items()} == {"artifacts": 1, "teachers": 2}
    with pytest.raises(UsageError, match="teachers"):
        clear_cache(("teacher",))
    assert clear_cache(("teachers",)) > 10 and list(cache_sizes()) == ["artifacts"]


def test_a_cache_that_is_a_file_or_cannot_be_made_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("L2A_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="L2A_CACHE"):
        cache_root()
    monkeypatch.setenv("L2A_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(RunError, match="a part of the path is a file"):
        cache_root()


def test_what_a_killed_build_left_is_removed(tmp_path):
    folder = cached_folder("kind", "key", lambda path: atomic_write_text(path / "x", "1"))
    (left := folder.parent / ".key.l2a-new.abc").mkdir()
    (own := folder.parent / ".key.mine").mkdir()
    cached_folder("kind", "key", lambda path: None)
    assert not left.exists() and own.exists()
