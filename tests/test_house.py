"""The house stays small, and data flow one way through its folders."""

import ast
from pathlib import Path

from benchmarks import house

ROOT = Path(__file__).parents[1]
LIMITS = {"files": 55, "code_lines": 8_500, "import_share": 0.09}
"""The aim for the code lines is 8,500."""
ORDER = (
    "util", "config", "data", "teacher", "student", "generator", "kd", "selector", "pretrain", "evaluation", "report",
    "serving", "pipeline", "experiments", "cli",
)  # fmt: skip
"""A module imports only from its own folder and from those before it."""


def test_the_package_stays_within_its_limits_and_its_tests_are_no_longer_than_it():
    found = house.count(ROOT / "l2a")
    assert {name: found[name] for name, limit in LIMITS.items() if found[name] > limit} == {}
    assert house.count(ROOT / "tests")["code_lines"] <= found["code_lines"]


def test_a_line_is_code_when_it_holds_more_than_comments_and_docstrings():
    source = '"""Module."""\n\nimport os  # why\n\ndef f():\n    """Doc.\n\n    More."""\n    return (\nos)\n'
    assert house.code_lines(source) == {3, 5, 9, 10}
    assert house.import_lines(source) == {3}


def test_no_module_imports_from_a_folder_to_its_right():
    seen, wrong = set(), []
    for path in (ROOT / "l2a").rglob("*.py"):
        place = path.relative_to(ROOT / "l2a").with_suffix("").parts[0]
        seen.add(place)
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            parts = [name.split(".")[1] for name in names if name.startswith("l2a.")]
            if place in ORDER and any(ORDER.index(part) > ORDER.index(place) for part in parts):
                wrong.append(f"{path}:{node.lineno} imports {names}")
    assert seen >= set(ORDER) and not wrong
