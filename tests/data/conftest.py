import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from l2a.data.examples import Domain, Examples, HeldOut


@pytest.fixture(autouse=True)
def cache(private_cache, tmp_path, monkeypatch):
    """Every test has its own cache and working directory."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return private_cache


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
def make_domain():
    """Make a domain of distinct texts, so many of each class in each split."""

    def examples(split: str, counts: dict[str, int]) -> Examples:
        labels = np.array([i for i, count in enumerate(counts.values()) for _ in range(count)], np.int64)
        return Examples(tuple((f"{split} text {i}",) for i in range(len(labels))), labels, tuple(counts))

    def make(train: dict[str, int], dev: dict[str, int], test: dict[str, int], name: str = "target") -> Domain:
        held_out = HeldOut.of(examples("test", test))
        return Domain(name, tuple(train), False, examples("train", train), examples("dev", dev), held_out, {})

    return make


@pytest.fixture
def make_tar(tmp_path):
    def make(name: str, members: dict[str, bytes]) -> Path:
        with tarfile.open(tmp_path / name, "w:gz") as tar:
            for member, content in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return tmp_path / name

    return make


@pytest.fixture
def make_wheel(tmp_path):
    def make(package: str, members: dict[str, bytes]) -> Path:
        path = tmp_path / "index" / f"{package}-1.0-py3-none-any.whl"
        path.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(path, "w") as wheel:
            for member, content in members.items():
                wheel.writestr(member, content)
        return path

    return make
