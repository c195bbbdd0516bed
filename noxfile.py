"""Checks and demonstrations; `nox` alone runs what a change must pass."""

import nox

nox.options.sessions = ["lint", "types", "docs", "tests"]
nox.options.reuse_existing_virtualenvs = True
CONSTRAINTS = ("-c", "constraints.txt")


@nox.session
def lint(session: nox.Session) -> None:
    """Style and formatting."""
    session.install(*CONSTRAINTS, "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Static types."""
    session.install(*CONSTRAINTS, "-e", ".[dev]")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, with broken links and missing pages as errors."""
    session.install(*CONSTRAINTS, "mkdocs-material", "mkdocstrings[python]")
    session.run("mkdocs", "build", "--strict", "--site-dir", session.create_tmp())


@nox.session
def tests(session: nox.Session) -> None:
    """The fast suite, then the slow one; `nox -s tests -- -m "not slow"` runs the fast one alone."""
    session.install(*CONSTRAINTS, "-e", ".[dev]")
    if session.posargs:
        session.run("pytest", *session.posargs)
    else:
        session.run("pytest", "-m", "not slow", "--durations=5")
        session.run("pytest", "-m", "slow", "--durations=5")


@nox.session
def demo(session: nox.Session) -> None:
    """The main job on the embedded teacher and domains, at the quick budget."""
    session.install(*CONSTRAINTS, ".")
    session.run("l2a", "distill", "--preset", "quick", "--output-dir", "runs/demo", "--overwrite")


@nox.session
def bench(session: nox.Session) -> None:
    """The table of the README (three targets, three seeds, every row; finished cells are kept), then bench_kd."""
    session.install(*CONSTRAINTS, "-e", ".[experiments]")
    session.run("l2a", "experiment", "run", "shipped", *session.posargs)
    session.run("l2a", "experiment", "report", "shipped")
    session.notify("bench_kd", [])  # without the arguments of this session


@nox.session
def bench_kd(session: nox.Session) -> None:
    """The KD trainer beside its peers, in minutes; `-- --smoke --output FILE` tries it in a few steps."""
    session.install(*CONSTRAINTS, "-e", ".", "accelerate", "textbrewer==0.2.1.post1")
    session.run("python", "benchmarks/kd/run.py", *session.posargs)
