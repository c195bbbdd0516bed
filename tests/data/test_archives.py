import stat
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2a.data import fetch as archives
from l2a.data.fetch import read_tar_members, unpack
from l2a.util.errors import RunError


def everything_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def test_only_wanted_members_are_unpacked_without_the_top_folder(make_tar, out):
    archive = make_tar("p.tar.gz", {"p-1/data/a.txt": b"a", "p-1/data/b/c.txt": b"c", "p-1/setup.py": b"evil"})
    unpack(archive, ("data/*",), out)
    assert everything_in(out) == {"data/a.txt", "data/b/c.txt"}
    assert (out / "data/b/c.txt").read_bytes() == b"c"


def test_wheels_are_unpacked_too(make_wheel, out):
    unpack(make_wheel("p", {"p/model/w.bin": b"w", "p/code.py": b"x"}), ("p/model/*",), out)
    assert everything_in(out) == {"p/model/w.bin"}


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/etc/evil", "a\\..\\evil", "C:evil"])
def test_members_that_lead_out_are_refused(make_tar, out, tmp_path, name):
    before = everything_in(tmp_path)
    archive = make_tar("p.tar.gz", {f"p-1/{name}": b"x"})
    with pytest.raises(RunError, match="leads out of its folder; the archive is not safe"):
        unpack(archive, ("*",), out)
    assert everything_in(tmp_path) == before | {"p.tar.gz"}


def test_links_are_refused(make_tar, out):
    archive = make_tar("p.tar.gz", {}, {"p-1/data": "/etc/passwd"})
    with pytest.raises(RunError, match="is a link or a device, not a plain file"):
        unpack(archive, ("data",), out)


def test_links_in_a_wheel_are_refused(tmp_path, out):
    info = zipfile.ZipInfo("p/data")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "p.whl", "w") as wheel:
        wheel.writestr(info, "/etc/passwd")
    with pytest.raises(RunError, match="is a link"):
        unpack(tmp_path / "p.whl", ("p/data",), out)


@pytest.mark.parametrize(("limit", "value"), [("MEMBER_LIMIT", 99), ("TOTAL_LIMIT", 150)])
def test_bombs_are_refused(make_tar, out, monkeypatch, limit, value):
    monkeypatch.setattr(archives, limit, value)
    monkeypatch.setattr(archives, "CHUNK", 10)
    archive = make_tar("p.tar.gz", {"p/a": b"0" * 100, "p/b": b"0" * 100})
    with pytest.raises(RunError, match=rf"unpacks to more than {'99' if value == 99 else '50'} bytes"):
        unpack(archive, ("a", "b"), out)


def test_a_pattern_that_matches_nothing_is_refused(make_tar, out):
    with pytest.raises(RunError, match=r"no member matches gone\.txt"):
        unpack(make_tar("p.tar.gz", {"p/a": b"a"}), ("a", "gone.txt"), out)


@given(st.binary(max_size=60))
def test_damaged_archives_are_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    archive = folder / "p.tar.gz"
    archive.write_bytes(b"\x1f\x8b\x08\x00" + data)
    with pytest.raises(RunError, match="not a readable archive"):
        unpack(archive, ("a",), folder)
    with pytest.raises(RunError, match="not a readable archive"):
        read_tar_members(archive, ("a",))


def test_members_are_read_in_the_wanted_order(make_tar):
    archive = make_tar("p.tar.gz", {"b": b"2", "a": b"1", "c": b"3"})
    assert list(read_tar_members(archive, ("a", "b")).items()) == [("a", b"1"), ("b", b"2")]


def test_reading_a_member_that_is_missing_or_a_link_is_refused(make_tar):
    archive = make_tar("p.tar.gz", {"a": b"1"}, {"b": "a"})
    for name in ("gone", "b"):
        with pytest.raises(RunError, match=f"no plain file {name} in it"):
            read_tar_members(archive, ("a", name))
