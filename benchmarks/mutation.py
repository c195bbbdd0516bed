"""Mutation check: ``nox -s mutation -- --sample 200`` writes benchmarks/results/mutation.json.

Each mutant changes one comparison, operator, constant, condition or returned value of ``l2a/kd``, ``l2a/generator`` or
``l2a/selector`` in a copy of the checkout, and the fast tests of its folder run on it until one fails. Mutants are
drawn by a seed; finished ones are kept, so that the command goes on where it was stopped.
"""

import argparse
import ast
import copy
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "mutation.json"
FOLDERS = ("kd", "generator", "selector")
COPIED = ("l2a", "tests", "agents", "configs", "domains", "benchmarks", "pyproject.toml")
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield what may stand in a node's place, each with the name of the change."""
    new: Any = copy.deepcopy(node)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        new.ops[0] = COMPARISONS[type(node.ops[0])]()
        yield "comparison", new
    elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in ARITHMETIC:
        new.op = ARITHMETIC[type(node.op)]()
        yield "arithmetic", new
    elif isinstance(node, ast.BoolOp):
        new.op = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
        yield "boolean", new
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield "negation", new.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        new.value = not node.value if isinstance(node.value, bool) else node.value + 1
        yield "constant", new
    elif isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
        new.value = ast.Constant(None)
        yield "return", new


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def mutants(path: Path) -> list[tuple[str, int, str, str]]:
    """List a module's mutants: an identifier, the line, the change and the changed source.

    Annotations, decorators and the insides of formatted texts stay: they decide no result.
    """
    source = path.read_text("utf-8")
    tree, found = ast.parse(source), []
    silent = {id(part) for node in ast.walk(tree) for kept in _silent(node) for part in ast.walk(kept)}
    lines = source.splitlines(keepends=True)
    for number, node in enumerate(ast.walk(tree)):
        if id(node) in silent or not hasattr(node, "lineno"):
            continue
        replaced = [(node, kind, new) for kind, new in changes(node)]
        if isinstance(node, ast.If | ast.IfExp | ast.While):
            replaced.append((node.test, "condition", ast.UnaryOp(ast.Not(), node.test)))
        for part, kind, new in replaced:
            name = f"{path.relative_to(ROOT).as_posix()}:{node.lineno}:{node.col_offset}:{kind}:{number}"
            found.append((name, node.lineno, kind, _replaced(lines, part, new)))
    return found


def _silent(node: ast.AST) -> list[ast.AST]:
    if isinstance(node, ast.FunctionDef):
        return [*node.decorator_list, *([node.returns] if node.returns else [])]
    if isinstance(node, ast.ClassDef):
        return list(node.decorator_list)
    if isinstance(node, ast.JoinedStr):
        return list(node.values)
    return [node.annotation] if isinstance(node, ast.AnnAssign | ast.arg) and node.annotation else []


def _replaced(lines: list[str], node: Any, new: ast.AST) -> str:
    """The source with one node written anew; whatever else stands on its lines stays."""
    first, last = lines[node.lineno - 1].encode(), lines[node.end_lineno - 1].encode()
    text = ast.unparse(new)
    text = f"({text})" if isinstance(new, ast.expr) else text.replace("\n", "\n" + " " * node.col_offset)
    middle = first[: node.col_offset] + text.encode() + last[node.end_col_offset :]
    return "".join([*lines[: node.lineno - 1], middle.decode(), *lines[node.end_lineno :]])


def is_killed(sandbox: Path, path: Path, source: str, seconds: float) -> bool:
    """Run the tests of a mutant's folder on it; one that never ends is killed too."""
    target = sandbox / path.relative_to(ROOT)
    original = target.read_text("utf-8")
    target.write_text(source, "utf-8")
    environment = {**os.environ, "PYTHONPATH": str(sandbox), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
    try:
        tests = sandbox / "tests" / path.parent.name
        done = subprocess.run(
            [*command, str(tests)], cwd=sandbox, env=environment, capture_output=True, timeout=seconds
        )
        return done.returncode != 0
    except subprocess.TimeoutExpired:
        return True
    finally:
        target.write_text(original, "utf-8")


def summary(done: dict[str, bool], seed: int) -> dict[str, Any]:
    """Say what share of the mutants was killed, in all and by module."""
    modules: dict[str, list[int]] = {}
    for name, killed in done.items():
        counts = modules.setdefault(name.split(":")[0], [0, 0])
        counts[0] += killed
        counts[1] += 1
    by_module = {name: {"killed": killed, "mutants": count} for name, (killed, count) in sorted(modules.items())}
    share = round(sum(done.values()) / len(done), 4)
    facts = {"killed_share": share, "sample": len(done), "seed": seed, "modules": by_module}
    return {**facts, "survived": [name for name, killed in done.items() if not killed], "mutants": done}


def main() -> None:
    """Draw mutants, run the tests on those that are not finished, and write the result after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=200, help="mutants in all")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after this time; run again to go on")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one mutant")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    files = [path for folder in FOLDERS for path in sorted((ROOT / "l2a" / folder).glob("*.py"))]
    every = [(name, path, source) for path in files for name, _, _, source in mutants(path)]
    chosen = random.Random(options.seed).sample(every, min(options.sample, len(every)))
    known = json.loads(options.output.read_text("utf-8"))["mutants"] if options.output.exists() else {}
    done = {name: known[name] for name, _, _ in chosen if name in known}
    with tempfile.TemporaryDirectory() as folder:
        sandbox = Path(folder)
        for part in COPIED:
            (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, sandbox / part)
        for folder_name in FOLDERS:
            path = ROOT / "l2a" / folder_name / "__init__.py"
            if is_killed(sandbox, path, path.read_text("utf-8"), 10 * options.timeout):
                sys.exit(f"the tests of {folder_name} fail without any change; mend them first")
        deadline = time.monotonic() + 60 * options.minutes
        for name, path, source in chosen:
            if name in done or time.monotonic() > deadline:
                continue
            done[name] = is_killed(sandbox, path, source, options.timeout)
            print(f"{len(done)}/{len(chosen)} {'killed' if done[name] else 'SURVIVED'} {name}", flush=True)
            options.output.write_text(json.dumps(summary(done, options.seed), indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
