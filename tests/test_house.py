"""The house stays small, and data flow one way through its folders."""

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIMITS = {"files": 80, "code_lines": 9_800, "import_share": 0.1122}
"""Aims: 80 files, 7,000 code lines, 0.09."""
ORDER = (
    "util", "config", "data", "teacher", "student", "generator", "kd", "selector", "pretrain", "evaluation", "report",
    "serving", "pipeline", "experiments", "cli",
)  # fmt: skip
"""A module imports only from its own folder and from those before it."""


SPEC = importlib.util.spec_from_file_location("house", ROOT / "benchmarks" / "house.py")
HOUSE = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(HOUSE)


def test_the_package_stays_within_its_limits():
    found = HOUSE.count(ROOT / "l2a")
    assert {name: found[name] for name, limit in LIMITS.items() if found[name] > limit} == {}


def test_a_line_is_code_when_it_holds_more_than_comments_and_docstrings():
    source = '"""Module."""\n\nimport os  # why\n\ndef f():\n    """Doc.\n\n    More."""\n    return (\nos)\n'
    assert HOUSE.code_lines(source) == {3, 5, 9, 10}
    assert HOUSE.import_lines(source) == {3}


@pytest.mark.parametrize("folder", ORDER)
def test_no_module_imports_from_a_folder_to_its_right(folder):
    package = ROOT / "l2a"
    files = [*package.glob(f"{folder}.py"), *sorted((package / folder).rglob("*.py"))]
    assert files
    wrong = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                part = name.split(".")[1] if name.startswith("l2a.") else None
                if part in ORDER and ORDER.index(part) > ORDER.index(folder):
                    wrong.append(f"{path.relative_to(package)}:{node.lineno} imports {name}")
    assert not wrong
