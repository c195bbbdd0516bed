"""Checks and demonstrations; `nox` alone runs what a change must pass."""

import re
from pathlib import Path

import nox

nox.options.sessions = ["lint", "docs", "tests"]
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = False  # a Python that is not installed is reported as skipped
CONSTRAINTS = ("-c", "constraints.txt")


@nox.session
def lint(session: nox.Session) -> None:
    """Style and formatting."""
    session.install(*CONSTRAINTS, "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, with broken links and missing pages as errors."""
    session.install(*CONSTRAINTS, "mkdocs-material", "mkdocs-jupyter", "mkdocstrings[python]")
    session.run("mkdocs", "build", "--strict", "--site-dir", session.create_tmp())


@nox.session
def tests(session: nox.Session) -> None:
    """Static types, the fast suite, then the slow one; `nox -s tests -- -m "not slow"` runs the fast one alone."""
    session.install(*CONSTRAINTS, "-e", ".[dev]")
    session.install("--no-deps", "axe-playwright-python==0.1.8")  # for the axe-core in it; a test asks Chromium alone
    if session.posargs:
        session.run("pytest", *session.posargs)
    else:
        session.run("mypy")
        session.run("pytest", "-n", "2", "--dist", "worksteal", "-m", "not slow", "--durations=5")
        session.run("pytest", "-n", "2", "-m", "slow", "--durations=5")


@nox.session
def demo(session: nox.Session) -> None:
    """The main job on the embedded teacher and domains."""
    session.install(*CONSTRAINTS, ".")
    session.run("l2a", "distill", "--output-dir", "runs/demo", "--overwrite")


@nox.session
def bench(session: nox.Session) -> None:
    """The table of the README (three targets, three seeds, every row), then the speed of the parts."""
    session.install(*CONSTRAINTS, "-e", ".[experiments]")
    session.run("l2a", "experiment", "run", "shipped", *session.posargs)
    session.run("l2a", "experiment", "report", "shipped")
    for part in ("bench_kd", "bench_generator", "bench_selector"):
        session.notify(part, [])  # without the arguments of this session


@nox.session
def bench_kd(session: nox.Session) -> None:
    """The KD trainer against its peers, in minutes; `-- --smoke --output FILE` tries it in a few steps."""
    session.install(*CONSTRAINTS, "-e", ".", "accelerate", "textbrewer==0.2.1.post1")
    session.run("python", "benchmarks/kd/run.py", *session.posargs)


@nox.session
def bench_generator(session: nox.Session) -> None:
    """The generator's speed against its reference, nlpaug and TextAttack, and its share of a run."""
    session.install(*CONSTRAINTS, "-e", ".[experiments]")
    needed = ("nltk", "lru-dict", "editdistance", "lemminflect", "terminaltables", "word2number", "num2words",
              "more-itertools", "jieba", "Levenshtein", "bert-score", "language_tool_python", "pinyin",
              "OpenHowNet", "langdetect")  # fmt: skip
    session.install(*CONSTRAINTS, "nlpaug==1.1.11", *needed)
    # Without its dependencies: flair's pins rule out current numpy and transformers, and nothing measured calls it.
    session.install("--no-deps", "textattack==0.3.11")
    session.run("python", "benchmarks/generator/run.py", *session.posargs)


@nox.session
def bench_selector(session: nox.Session) -> None:
    """Speed of the surrogate environment, the selector's share of a run and the correlation of its two rewards."""
    session.install(*CONSTRAINTS, "-e", ".")
    session.run("python", "benchmarks/selector/bench.py", *session.posargs)


@nox.session
def house(session: nox.Session) -> None:
    """Count files, code lines and imports of the package."""
    session.run("python", "benchmarks/house.py")


@nox.session
def fuzz(session: nox.Session) -> None:
    """For the night: the properties in the tests with a thousand examples each, then an hour of damaged files."""
    session.install(*CONSTRAINTS, "-e", ".[dev]", "atheris")
    session.run("pytest", "-m", "not slow", "--hypothesis-profile=nightly")
    session.run("python", "benchmarks/fuzz.py", "--minutes", "60", *session.posargs)


@nox.session
def trust(session: nox.Session) -> None:
    """Wrong requests that are refused unclearly, and files on which something crashes; `-- --minutes 1` tries it."""
    session.install(*CONSTRAINTS, "-e", ".[dev]", "atheris")
    session.run("python", "benchmarks/trust.py", *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    """Share of the branches of l2a/ that the fast suite takes, into benchmarks/results/trust.json."""
    session.install(*CONSTRAINTS, "-e", ".[dev]", "coverage")
    session.run("coverage", "run", "--branch", "--source=l2a", "-m", "pytest", "-m", "not slow", "-p", "no:xdist")
    session.run("coverage", "json", "-o", f"{session.create_tmp()}/coverage.json")
    session.run("python", "benchmarks/trust.py", "--coverage", f"{session.create_tmp()}/coverage.json")


@nox.session
def mutation(session: nox.Session) -> None:
    """Share of small faults in kd/, generator/ and selector/ that their fast tests notice; `-- --sample 400`."""
    session.install(*CONSTRAINTS, "-e", ".[dev]", "mutmut")
    session.run("python", "benchmarks/mutation.py", *session.posargs)


@nox.session
def optimum(session: nox.Session) -> None:
    """Load an export by optimum, which needs older transformers than l2a; `-- runs/latest/onnx` names it."""
    session.install("torch==2.13.0", "optimum-onnx[onnxruntime]==0.1.0")
    session.run("python", "benchmarks/load_with_optimum.py", *session.posargs)


EXTRAS = ("experiments", "export")
LOCK = "requirements.lock"


@nox.session
def lock(session: nox.Session) -> None:
    """Write requirements.lock anew, after a change of pyproject.toml or constraints.txt."""
    session.install("uv==0.13.9")
    extras = [word for extra in EXTRAS for word in ("--extra", extra)]
    session.run("uv", "pip", "compile", "--universal", "--python-version", "3.11", "--generate-hashes", "--no-annotate",
                "--no-header", *extras, *CONSTRAINTS, "-q", "-o", LOCK, "pyproject.toml")  # fmt: skip
    text = Path(LOCK).read_text("utf-8").replace(" ; sys_platform == 'darwin' or sys_platform == 'linux' \\", " \\")
    Path(LOCK).write_text(
        "# Every package that l2a and its extras need to run, with the hashes of its files, for Linux and macOS; made "
        "from\n# pyproject.toml and constraints.txt by `nox -s lock`. How to install from it: docs/supply_chain.md.\n"
        + text
    )


@nox.session
def audit(session: nox.Session) -> None:
    """Known vulnerabilities of what requirements.lock names; fails where they cannot be looked up as of today."""
    session.install(*CONSTRAINTS, "-e", ".", "pip-audit==2.10.1")
    session.run("python", "benchmarks/supply_chain.py", "audit")


@nox.session
def sbom(session: nox.Session) -> None:
    """The software bill of materials of requirements.lock, in CycloneDX's JSON: build/sbom.json."""
    session.install("cyclonedx-bom==7.5.0")
    Path("build").mkdir(exist_ok=True)
    session.run("cyclonedx-py", "requirements", LOCK, "--pyproject", "pyproject.toml", "--output-reproducible",
                "-o", "build/sbom.json")  # fmt: skip


@nox.session
def licences(session: nox.Session) -> None:
    """The licences of all packages that l2a needs to run, as docs/licences.md."""
    session.install(*CONSTRAINTS, f".[{','.join(EXTRAS)}]", "pip-licenses==5.5.5")
    session.run("python", "benchmarks/supply_chain.py", "licences")


@nox.session(python=["3.11", "3.12", "3.13"], venv_backend="venv")
@nox.parametrize("end", ["lowest", "highest"])
def versions(session: nox.Session, end: str) -> None:
    """The fast suite on the lowest and highest versions of pyproject.toml, torch as pinned, on each Python found."""
    session.install("uv==0.13.9")
    chosen = Path(session.create_tmp()) / f"{end}.txt"
    resolution = "lowest-direct" if end == "lowest" else "highest"
    session.run("uv", "pip", "compile", "--resolution", resolution, "--extra", "dev", "-q", "-o", str(chosen),
                "pyproject.toml")  # fmt: skip
    # torch's own requirements are those of its build, such as CUDA's, which a CPU build does without.
    others = re.sub(r"^(torch|triton|nvidia-|cuda-).*\n", "", chosen.read_text("utf-8"), flags=re.MULTILINE)
    chosen.write_text(others)
    session.install("-c", str(chosen), "torch==2.13.0")
    session.install("--no-deps", "-r", str(chosen))
    session.install("--no-deps", "-e", ".")
    session.run("pytest", "-n", "2", "-m", "not slow", *session.posargs)
