import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from l2a.data.examples import Domain, Examples, HeldOut


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Every test has its own cache and working directory."""
    monkeypatch.setenv("L2A_CACHE", str(tmp_path / "cache"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return tmp_path / "cache"


@pytest.fixture
def write(tmp_path):
    """Write a file of the working directory and give its path."""

    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / "work" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


@pytest.fixture
def make_examples():
    def make(prefix: str, counts: dict[str, int]) -> Examples:
        names = tuple(counts)
        labels = np.concatenate([np.full(count, i, dtype=np.int64) for i, count in enumerate(counts.values())])
        return Examples(tuple((f"{prefix} {i}",) for i in range(len(labels))), labels, names)

    return make


@pytest.fixture
def make_domain(make_examples):
    def make(train: dict[str, int], dev: dict[str, int], test: dict[str, int], name: str = "target") -> Domain:
        held_out = HeldOut.of(make_examples("test text", test))
        train_examples, dev_examples = make_examples("train text", train), make_examples("dev text", dev)
        return Domain(name, tuple(train), False, train_examples, dev_examples, held_out, {})

    return make


@pytest.fixture
def make_tar(tmp_path):
    def make(name: str, members: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
        with tarfile.open(tmp_path / name, "w:gz") as tar:
            for member, content in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            for member, destination in (links or {}).items():
                info = tarfile.TarInfo(member)
                info.type, info.linkname = tarfile.SYMTYPE, destination
                tar.addfile(info)
        return tmp_path / name

    return make


@pytest.fixture
def make_wheel(tmp_path):
    def make(package: str, members: dict[str, bytes], folder: str = "index") -> Path:
        path = tmp_path / folder / f"{package}-1.0-py3-none-any.whl"
        path.parent.mkdir(exist_ok=True)
        info = f"{package}-1.0.dist-info"
        members = {
            **members, f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n".encode(),
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n", f"{info}/RECORD": b"",
        }  # fmt: skip
        with zipfile.ZipFile(path, "w") as wheel:
            for member, content in members.items():
                wheel.writestr(member, content)
        return path

    return make
