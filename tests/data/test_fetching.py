import errno
import sys
from contextlib import contextmanager

import pytest

from l2a.data import fetch as archives
from l2a.data import fetch as artifacts
from l2a.data import fetch as download
from l2a.data.fetch import Artifact, fetch_artifact
from l2a.util.errors import RunError
from l2a.util.files import sha256_file


@pytest.fixture
def index(make_wheel, tmp_path, monkeypatch):
    """A package index that is a folder with one wheel; pip reads it without a network."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return make_wheel("toydata", {"toydata/rows.csv": b"text,label\n", "toydata/__init__.py": b"raise SystemExit"})


def artifact(sha256, members=("toydata/rows.csv",)):
    return Artifact("toydata", "1.0", "wheel", sha256, members, size=600)


class Recorder:
    def __init__(self):
        self.stages, self.advanced = [], 0

    @contextmanager
    def stage(self, name, total=None):
        self.stages.append(name)
        yield self._advance

    def _advance(self, amount):
        self.advanced += amount

    def event(self, name, **values):
        pass


def test_a_package_is_fetched_once_and_then_read_from_the_cache(index, cache, monkeypatch):
    wanted, progress = artifact(sha256_file(index)), Recorder()
    folder = fetch_artifact(wanted, progress)
    assert (folder / "toydata/rows.csv").read_bytes() == b"text,label\n"
    assert not (folder / "toydata/__init__.py").exists() and folder.is_relative_to(cache)
    assert progress.stages == ["fetch toydata 1.0 (kB)"]
    monkeypatch.setattr(artifacts, "download", None)
    assert fetch_artifact(wanted) == folder


def test_a_damaged_cache_entry_is_fetched_again(index, monkeypatch):
    monkeypatch.setattr(artifacts, "download", lambda *_: index)
    wanted = artifact(sha256_file(index))
    (fetch_artifact(wanted) / "toydata/rows.csv").write_bytes(b"broken")
    assert (fetch_artifact(wanted) / "toydata/rows.csv").read_bytes() == b"text,label\n"


def test_another_hash_is_refused_and_leaves_nothing(index, cache):
    with pytest.raises(RunError, match=r"toydata==1\.0: the package index offers a file with another sha256"):
        fetch_artifact(artifact("0" * 64))
    assert not [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_the_hash_is_checked_again_after_pip(index, monkeypatch):
    monkeypatch.setattr(artifacts, "download", lambda *_: index)
    with pytest.raises(RunError, match=f"has sha256 {sha256_file(index)}, {'0' * 64} is needed"):
        fetch_artifact(artifact("0" * 64))


def test_no_network_and_nothing_cached_is_one_sentence_with_the_fix(index, cache):
    index.unlink()
    message = "cannot download toydata==1.0: the package index cannot be reached and nothing is cached; connect once"
    with pytest.raises(RunError, match=message) as caught:
        fetch_artifact(artifact("0" * 64))
    assert "\n" not in str(caught.value)


def test_a_missing_member_leaves_no_cache_entry(index, cache, monkeypatch):
    monkeypatch.setattr(artifacts, "download", lambda *_: index)
    with pytest.raises(RunError, match="no member matches gone"):
        fetch_artifact(artifact(sha256_file(index), ("gone",)))
    assert not [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_a_full_disk_is_named_and_leaves_nothing(index, cache, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifacts, "download", lambda *_: index)
    monkeypatch.setattr(archives, "_copy", full)
    with pytest.raises(RunError, match="the disk is full"):
        fetch_artifact(artifact(sha256_file(index)))
    assert not [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("/usr/bin/python: No module named pip", "this Python has no pip; run .* -m ensurepip"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "the disk is full"),
        ("ERROR: something\nelse", r"pip failed \(ERROR: something\); try `pip download toydata==1.0`"),
        ("", "pip failed"),
    ],
)
def test_other_failures_of_pip_are_explained(index, monkeypatch, output, message):
    script = f"import sys; sys.stderr.write({output!r}); sys.exit(1)"
    monkeypatch.setattr(download, "_command", lambda *_: [sys.executable, "-c", script])
    with pytest.raises(RunError, match=f"cannot download toydata==1.0: {message}"):
        fetch_artifact(artifact("0" * 64))


def test_the_bar_follows_the_bytes_on_disk_and_stops_at_the_size(index, monkeypatch):
    script = "import os, time; open(os.environ['TMPDIR'] + '/part', 'wb').write(bytes(50_000)); time.sleep(0.4)"
    monkeypatch.setattr(download, "_command", lambda *_: [sys.executable, "-c", script])
    progress = Recorder()
    with pytest.raises(RunError):
        fetch_artifact(Artifact("toydata", "1.0", "wheel", "0" * 64, ("x",), size=40_000), progress)
    assert progress.advanced == 40
