from pathlib import Path

import typer
from typer.testing import CliRunner

from l2a.cli.data import pretrain_command

SIZES = {"embedding-size": 8, "hidden-size": 16, "layers": 1, "intermediate-size": 16, "heads": 2, "positions": 32}
TINY = [f"--{name}={value}" for name, value in {**SIZES, "steps": 2, "variants": 5, "max-length": 32}.items()]


def run(*arguments: str) -> object:
    app = typer.Typer()
    app.command()(pretrain_command)
    return CliRunner().invoke(app, arguments)


def test_the_command_writes_a_student(text_file: Path, encoder_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    result = run("--text", str(text_file), "--teacher", str(encoder_folder), "--output-dir", str(folder), *TINY)
    assert result.exit_code == 0, result.output
    assert (folder / "model.safetensors").exists()
    assert "--steps 2" in (folder / "README.md").read_text()


def test_the_column_of_the_text_can_be_named(text_file: Path, encoder_folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "texts.csv"
    table.write_text(
        "\n".join(["number,phrase", *(f"{i},{line}" for i, line in enumerate(text_file.read_text().splitlines()))])
    )
    flags = ["--text", str(table), "--teacher", str(encoder_folder), "--output-dir", str(tmp_path / "made"), *TINY]
    refused = run(*flags)
    assert refused.exit_code != 0 and "--text-column" in str(refused.exception)
    result = run(*flags, "--text-column", "phrase")
    assert result.exit_code == 0, result.output
    assert "--text-column phrase" in (tmp_path / "made" / "README.md").read_text()


def test_a_missing_text_is_named(tmp_path: Path) -> None:
    result = run("--text", str(tmp_path / "none.txt"), "--output-dir", str(tmp_path / "made"))
    assert result.exit_code != 0
    assert "none.txt: cannot be read (No such file" in str(result.exception)
