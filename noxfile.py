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
    session.install(*CONSTRAINTS, "mkdocs-material", "mkdocs-jupyter", "mkdocstrings[python]")
    session.run("mkdocs", "build", "--strict", "--site-dir", session.create_tmp())


@nox.session
def tests(session: nox.Session) -> None:
    """The fast suite, then the slow one; `nox -s tests -- -m "not slow"` runs the fast one alone."""
    session.install(*CONSTRAINTS, "-e", ".[dev]")
    if session.posargs:
        session.run("pytest", *session.posargs)
    else:
        session.run("pytest", "-n", "2", "-m", "not slow", "--durations=5")
        session.run("pytest", "-m", "slow", "--durations=5")


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
def mutation(session: nox.Session) -> None:
    """Share of small faults in kd/, generator/ and selector/ that their fast tests notice; `-- --sample 400`."""
    session.install(*CONSTRAINTS, "-e", ".[dev]", "mutmut")
    session.run("python", "benchmarks/mutation.py", *session.posargs)
