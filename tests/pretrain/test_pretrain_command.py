from pathlib import Path

import typer
from typer.testing import CliRunner

from l2a.cli.data import pretrain_command


def run(*arguments: str) -> object:
    app = typer.Typer()
    app.command()(pretrain_command)
    return CliRunner().invoke(app, arguments)


def test_the_command_writes_a_student(text_file: Path, encoder_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    sizes = ["--embedding-size", "8", "--hidden-size", "16", "--layers", "1", "--intermediate-size", "16"]
    result = run(
        "--text", str(text_file), "--teacher", str(encoder_folder), "--output-dir", str(folder), "--steps", "2",
        "--variants", "5", "--max-length", "32", "--heads", "2", *sizes,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (folder / "model.safetensors").exists()
    assert "--steps 2" in (folder / "README.md").read_text()


def test_a_missing_text_is_named(tmp_path: Path) -> None:
    result = run("--text", str(tmp_path / "none.txt"), "--output-dir", str(tmp_path / "made"))
    assert result.exit_code != 0
    assert "no such file" in str(result.exception)
