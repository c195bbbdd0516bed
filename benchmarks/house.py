"""Counts the package's code: ``python benchmarks/house.py`` writes benchmarks/results/house.json.

A code line holds a token that is neither a comment nor part of a docstring. A file counts when it has one.
"""

import ast
import io
import json
import tokenize
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "house.json"
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
COUNTS = ("files", "code_lines", "import_lines", "total_lines")


def code_lines(source: str) -> set[int]:
    """Find the lines of a module with a token that is neither a comment nor part of a docstring."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return lines


def import_lines(source: str) -> set[int]:
    """Find the lines of a module that its import statements take, wherever they stand."""
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {line for node in imports for line in range(node.lineno, (node.end_lineno or 0) + 1)}


def count(package: Path) -> dict[str, Any]:
    """Count a package.

    Args:
        package: Its folder.

    Returns:
        ``files``, ``code_lines``, ``total_lines`` and ``import_share``, the imports' share of the code lines; the same
        for each folder under ``folders``, by its path from the package.
    """
    folders: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(COUNTS, 0))
    for path in sorted(package.rglob("*.py")):
        source = path.read_text("utf-8")
        code, total = code_lines(source), len(source.splitlines())
        found = (int(bool(code)), len(code), len(code & import_lines(source)), total)
        here = folders[path.parent.relative_to(package).as_posix()]
        here.update({name: here[name] + value for name, value in zip(COUNTS, found, strict=True)})
    whole = {name: sum(here[name] for here in folders.values()) for name in COUNTS}
    return {**_with_share(whole), "folders": {name: _with_share(here) for name, here in sorted(folders.items())}}


def _with_share(counts: dict[str, int]) -> dict[str, Any]:
    share = counts["import_lines"] / max(1, counts["code_lines"])
    return {**{name: counts[name] for name in COUNTS if name != "import_lines"}, "import_share": round(share, 4)}


if __name__ == "__main__":
    RESULT.write_text(json.dumps(count(ROOT / "l2a"), indent=1) + "\n", "utf-8")
    print(RESULT.read_text("utf-8"))
