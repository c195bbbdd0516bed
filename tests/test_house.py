"""The house stays small, and data flow one way through its folders."""

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIMITS = {"files": 80, "code_lines": 8_500, "import_share": 0.11}
"""Aims: 80 files, 7,000 code lines, 0.09."""
ORDER = (
    "util", "config", "data", "teacher", "student", "generator", "kd", "selector", "pretrain", "evaluation", "report",
    "pipeline", "experiments", "cli",
)  # fmt: skip
"""A module imports only from its own folder and from those before it."""


def house():
    spec = importlib.util.spec_from_file_location("house", ROOT / "benchmarks" / "house.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", LIMITS)
def test_the_package_stays_within_its_limits(name):
    assert house().count(ROOT / "l2a")[name] <= LIMITS[name]


def test_a_line_is_code_when_it_holds_more_than_comments_and_docstrings():
    lines = [
        '"""Module."""',
        "",
        "import os  # why",
        "",
        "def f():",
        '    """Doc.',
        "",
        '    More."""',
        "    return (",
        "os)",
    ]
    source = "\n".join(lines) + "\n"
    assert house().code_lines(source) == {3, 5, 9, 10}
    assert house().import_lines(source) == {3}


def folder_of(module):
    return module.split(".")[1] if "." in module else None


@pytest.mark.parametrize("folder", ORDER)
def test_no_module_imports_from_a_folder_to_its_right(folder):
    package = ROOT / "l2a"
    files = (
        [package / f"{folder}.py"] if (package / f"{folder}.py").exists() else sorted((package / folder).rglob("*.py"))
    )
    assert files
    wrong = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                part = folder_of(name) if name.startswith("l2a.") else None
                if part in ORDER and ORDER.index(part) > ORDER.index(folder):
                    wrong.append(f"{path.relative_to(package)}:{node.lineno} imports {name}")
    assert not wrong
