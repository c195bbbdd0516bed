"""The documentation keeps its word: its commands parse, its files are valid, and its recipes run on tiny models.

A page is read from top to bottom: a ``console`` or ``bash`` block holds commands, a ``python`` block is executed, and a
``yaml`` block with a title is the file of that name.
"""

import ast
import importlib.util
import json
import re
import shlex
import shutil
from functools import cache
from http.server import HTTPServer
from itertools import dropwhile, groupby, pairwise
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import typer.main
import yaml
from nbclient import NotebookClient
from typer.testing import CliRunner

from l2a.cli.app import app
from l2a.config import load_config
from l2a.data.domains import load_card
from l2a.experiments.card import load_experiment
from l2a.pipeline.distill import distill
from l2a.selector.agents import load_agent
from tests.conftest import labelled, write_domain

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}
COMMANDS = typer.main.get_command(app)
BLOCK = re.compile(r'^( *)```(\w+)(?: title="([^"]+)")?\n(.*?)^\1```$', re.DOTALL | re.MULTILINE)
OTHERS = {"python", "pip", "nox", "curl", "accelerate", "torchrun", "docker", "hf", "cat", "export", "source", "scp"}
"""First words of commands that are not l2a's; files and sessions that they name are looked for, nothing is run."""


@cache
def blocks(page):
    """Blocks of a page in their order: language, title, text without the indentation."""
    found = BLOCK.findall(PAGES[page])
    return [(language, title, re.sub(f"^{indent}", "", text, flags=re.M)) for indent, language, title, text in found]


def commands(text):
    """Commands of a block as lists of words, without comments, redirections and settings of the environment."""
    for line in text.replace("\\\n", " ").splitlines():
        reader = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        reader.whitespace_split = True
        # What follows < or > is a file, and what stands before a command with = a setting.
        for is_end, part in groupby(reader, lambda word: set(word) <= set("|&;")):
            kept = [word for before, word in pairwise(["", *part]) if not {before[:1], word[0]} & {"<", ">"}]
            words = list(dropwhile(re.compile("[A-Z0-9_]+=").match, kept))
            if words and not is_end:
                yield words


def find_command(words):
    """The command that ``l2a WORDS`` means, and the words that are its own."""
    command, rest = COMMANDS, list(words)
    while rest and hasattr(command, "commands") and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"l2a has no command {rest[0]}"
        command = command.commands[rest.pop(0)]
    return command, rest


SHELL = ("bash", "console")
SHOWN = {page: [words for name, _, text in blocks(page) if name in SHELL for words in commands(text)] for page in PAGES}


@pytest.mark.parametrize("page", [page for page in PAGES if "```" in PAGES[page]])
def test_the_commands_and_files_that_a_page_shows_are_valid(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for title in write_files(page, tmp_path):
        load = {"domains": load_card, "experiments": load_experiment}.get((tmp_path / title).parent.name)
        if load:
            load(Path(title).stem if load is load_card else title)
        elif "agent" in title:
            load_agent(f"./{title}")
    for words in SHOWN[page]:
        if words[0] != "l2a":
            assert words[0] in OTHERS, words
            for session in re.findall(r"^nox -s (\w+)", shlex.join(words)):
                assert f"def {session}(" in (ROOT / "noxfile.py").read_text(), words
            for script in re.findall(r"benchmarks/[\w/]+\.py", shlex.join(words)):
                source = (ROOT / script).read_text()
                assert all(f'"{word}"' in source for word in words if word.startswith("--")), words
            continue
        command, rest = find_command(words[1:])
        with command.make_context("l2a", list(rest)) as context:
            given = context.params
        if command.name == "distill":
            settings = CliRunner().invoke(app, [*words[1:], "--print-config"])
            assert settings.exit_code == 0, (words, settings.exception, settings.output)
        elif "preset" in given:
            load_config(given["preset"], given["config"], {"target": "tweets"})


def test_commands_in_the_text_of_pages_exist_with_their_options():
    found = {page: re.findall(r"`(l2a [a-z][^`]*)`", BLOCK.sub("", text)) for page, text in PAGES.items()}
    inline = {(page, " ".join(command.split())) for page, shown in found.items() for command in shown}
    assert len(inline) > 30
    for page, shown in inline:
        command, rest = find_command(re.split(r" \||\.\.\.", shown)[0].split()[1:])
        options = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
        missing = {word.split("=")[0] for word in rest if word.startswith("-")} - options - {"--help"}
        assert not missing, f"{page}: `{shown}` has {missing}"


TINY = {
    "teacher": {"learning_rate": 1e-3, "frozen_layers": 0}, "student": {"max_share": 0.9, "preset": "narrow"},
    "generator": {"chains": 8}, "dev_shots": 6, "max_length": 24, "compare": False, "report": False,
    "kd": {"warmup_steps": 40, "rounds": 1, "round_steps": 20, "pool_size": 48, "learning_rate": 2e-3},
    "selector": {"training_steps": 64, "real_evaluations": 3, "batch": 8, "episode_steps": 4},
}  # fmt: skip
"""Settings that each run gets beneath its own."""


def merge(base, more):
    """Settings with others laid over them."""
    both = {**base, **more}
    return both | {key: {**base[key], **more[key]} for key in base.keys() & more.keys() if isinstance(base[key], dict)}


def write_files(page, folder):
    """Write the files that a page shows, and return their names."""
    files = {title: text for language, title, text in blocks(page) if language == "yaml" and title}
    for title, text in files.items():
        (folder / title).parent.mkdir(parents=True, exist_ok=True)
        (folder / title).write_text(text)
    return list(files)


STAND_INS = {
    "tweets": "mine.csv", "products": "mine.csv", "editorials": "more.csv", "movies": "theirs.csv",
    "neutral": "unlabelled.txt", "cardiffnlp/tweet_eval:sentiment": "theirs.csv", "minilm-l6": "my-encoder",
    "mpnet-base": "my-encoder", "distilbert/distilbert-base-uncased": "my-encoder", "8000": "0", "4000": "3",
}  # fmt: skip
"""What would be fetched, or taken from other programs, and the small local thing in its place."""
# Checked but not run: grids take hours (tests/experiments runs small ones), and the other is made from the program.
ONLY_READ = {"docs/experiments.md", "docs/cli.md"}
SKIPPED = {
    ("l2a", "domains", "check", "cardiffnlp/tweet_eval:sentiment"), ("l2a", "experiment"), ("l2a", "cache"),
    ("l2a", "push", "runs/latest"),
}  # fmt: skip
"""Commands that would fetch or change something outside the folder."""


@pytest.fixture(scope="module")
def workplace(encoder_folder, tokenizer, tmp_path_factory):
    """A folder with the files that the pages speak of, and one finished run."""
    folder = tmp_path_factory.mktemp("work")
    shutil.copytree(encoder_folder, folder / "my-encoder")
    mine, theirs = labelled(150, 2, "this phone "), labelled(240, 1, "the story ")
    more = labelled(90, 3, "a battery ")
    tables = {"mine": mine, "topics": mine, "theirs": theirs, "other_topics": theirs, "movies": theirs}
    for name, rows in {**tables, "more": more, "new": more, "texts": more}.items():
        pd.DataFrame(rows, columns=["text", "label"]).to_csv(folder / f"{name}.csv", index=False)
    for name, rows in {"pairs": mine, "other_pairs": theirs, "new_pairs": more}.items():
        frame = pd.DataFrame(rows, columns=["text", "label"]).assign(text_pair=lambda it: "it was " + it["label"])
        frame.to_csv(folder / f"{name}.csv", index=False)
        frame.to_parquet(folder / f"{name}.parquet")
    for name in ("unlabelled", "texts", "tweets"):
        (folder / f"{name}.txt").write_text("".join(f"{text}\n" for text, _ in labelled(80, 4, "a very fine film ")))
    (folder / "tiny.yaml").write_text(yaml.safe_dump(merge(TINY, {"teacher": {"model": "my-encoder"}})))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("L2A_CACHE", str(folder / "cache"))
        run_command(["l2a", "distill", "--target", "mine.csv", "--source", "theirs.csv", "--report"])
    shutil.copytree(folder / "runs" / "latest" / "student", folder / "my-classifier")
    return folder


def run_command(words):
    """Run one command on the stand-ins; a run gets the tiny settings beneath its own."""
    words = [":".join(STAND_INS.get(part, part) for part in STAND_INS.get(word, word).split(":")) for word in words]
    command, _ = find_command(words[1:])
    if command.name == "headroom":  # an oracle needs more labels than the stand-ins have
        return
    flags = {option for parameter in command.params for option in parameter.opts}
    if "--preset" in flags:
        settings = yaml.safe_load(Path("tiny.yaml").read_text())
        if "--config" in words:
            settings = merge(settings, yaml.safe_load(Path(words[words.index("--config") + 1]).read_text()))
        Path("merged.yaml").write_text(yaml.safe_dump(settings))
        words += ["--config", "merged.yaml"]
        if command.name == "distill":
            written = words[words.index("--output-dir") + 1] if "--output-dir" in words else "runs/latest"
            shutil.rmtree(written, ignore_errors=True)
    elif "--teacher" in flags and "--teacher" not in words:
        words += ["--teacher", "my-encoder"]
    if command.name == "pretrain":
        words += ["--max-length", "32", "--embedding-size", "16", "--hidden-size", "32"]
    result = CliRunner().invoke(app, words[1:], input=Path("texts.txt").read_bytes() if "-" in words else None)
    assert result.exit_code == 0, (shlex.join(words), result.exception, result.output)


WITH_PYTHON = {page for page in PAGES if any(language == "python" for language, _, _ in blocks(page))}
WITH_L2A = {page for page in PAGES if any(words[0] == "l2a" for words in SHOWN[page])}


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(WITH_PYTHON | (WITH_L2A - ONLY_READ)))
def test_a_page_runs_from_top_to_bottom(page, workplace, tmp_path, monkeypatch):
    folder = tmp_path / "work"
    shutil.copytree(workplace, folder, ignore=shutil.ignore_patterns("cache"))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("L2A_CACHE", str(workplace / "cache"))
    write_files(page, folder)
    small = yaml.safe_load(Path("tiny.yaml").read_text())

    def quick(*given, **own):
        return distill(*given, **(own if given else merge(small, own)))

    monkeypatch.setattr("l2a.pipeline.distill.distill", quick)
    monkeypatch.setattr("l2a.pipeline.estimator.distill", quick)
    monkeypatch.setattr(HTTPServer, "serve_forever", lambda self: self.server_close())
    mine, plenty, more = labelled(150, 2, "this phone "), labelled(200, 1, "the story "), labelled(60, 3, "a phone ")
    (texts, labels), (more, _) = (map(list, zip(*rows, strict=True)) for rows in (mine, more))
    frame = pd.DataFrame(plenty, columns=["text", "label"])
    names = {"mine": mine, "plenty": plenty, "more": more, "texts": texts, "labels": labels, "frame": frame}
    names |= {"model": "my-encoder", "small": {key: small[key] for key in small if key != "max_length"}}
    for language, _, text in blocks(page):
        if language == "python":
            for name, stand_in in STAND_INS.items():
                text = text.replace(f'"{name}"', f'"{stand_in}"').replace(f"{name})", f"{stand_in})")
            exec(compile(text, page, "exec"), names)
        for words in commands(text) if language in SHELL else ():
            if words[0] == "l2a" and not any(tuple(words[: len(start)]) == start for start in SKIPPED):
                run_command(words)


@pytest.mark.skipif(
    f"typer=={typer.__version__}\n" not in (ROOT / "constraints.txt").read_text(), reason="another version"
)
def test_the_page_of_the_command_line_is_current():
    from benchmarks import cli_page

    assert cli_page.page() == PAGES["docs/cli.md"], "options have changed; run: python benchmarks/cli_page.py"


def test_the_cost_of_many_texts_follows_from_the_measured_rates():
    found = json.loads((ROOT / "benchmarks" / "results" / "export.json").read_text())
    alone = [found["export"]["models"][0]["latency_ms"], found["teacher_latency_ms"]]
    rates = [found["texts_per_second"][name] for name in ("predict", "student")]
    rates += [1000 / latency["batch_1"] for latency in alone]
    for rate in rates:
        assert f"| {rate:,.0f} | {1e7 / rate / 3600:,.1f} | {1e7 / rate / 3600 / 16:,.1f} |" in PAGES["docs/scale.md"]


@pytest.mark.slow
def test_the_tour_runs_and_shows_what_it_gave(workplace, monkeypatch):
    tour = nbformat.read(ROOT / "docs" / "tour.ipynb", 4)
    code = [cell for cell in tour.cells if cell.cell_type == "code"]
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert sum(bool(cell.outputs) for cell in code) > 8 and (ROOT / "docs" / "tour.ipynb").stat().st_size < 60_000
    assert code[0].metadata["tags"] == ["parameters"]
    names, small = ("my-encoder", "mine.jsonl", "theirs.jsonl"), {**TINY, "shots": 16}
    code[0].source = f"teacher, target, source = {names}\nsmall = {small}"
    write_domain(workplace / "mine.jsonl", 500, 2, "this phone ")
    write_domain(workplace / "theirs.jsonl", 500, 1, "the story ")
    monkeypatch.setenv("L2A_CACHE", str(workplace / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    NotebookClient(tour, timeout=600, resources={"metadata": {"path": workplace}}).execute()


def test_the_commands_of_the_checkout_find_what_they_import():
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("l2a."):
                found = dir(importlib.import_module(node.module))
                missing = [one.name for one in node.names if one.name not in found]
                missing = [name for name in missing if importlib.util.find_spec(f"{node.module}.{name}") is None]
                assert not missing, f"{path}:{node.lineno}: {node.module} has no {missing}"
