"""The snippets of docs/python.md run as they stand, on data in memory and tiny models."""

import re
from pathlib import Path

import pytest

from tests.conftest import LABELS, make_examples

PAGE = Path(__file__).parents[1] / "docs" / "python.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


def labelled(count: int, seed: int, prefix: str) -> list[tuple[str, str]]:
    examples = make_examples(count, seed)
    tags = ["".join("abcdefghij"[int(digit)] for digit in str(number)) for number in range(count)]
    texts = (f"{prefix} {text} {tag}" for (text,), tag in zip(examples.inputs, tags, strict=True))
    return [(text, LABELS[label]) for text, label in zip(texts, examples.labels, strict=True)]


def test_each_snippet_is_short():
    assert len(SNIPPETS) >= 7
    assert max(len(snippet.strip().splitlines()) for snippet in SNIPPETS) <= 15


@pytest.mark.slow
def test_the_snippets_run_in_their_order(encoder_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = {
        "teacher": {"model": str(encoder_folder), "learning_rate": 1e-3, "frozen_layers": 0},
        "student": {"max_share": 0.9}, "generator": {"chains": 8}, "selector": {"agent": "random"},
        "kd": {"warmup_steps": 10, "rounds": 1, "round_steps": 10, "pool_size": 48}, "dev_shots": 6,
    }  # fmt: skip
    names = {
        "mine": labelled(150, 2, "this phone"), "plenty": labelled(200, 1, "the story"),
        "more": [text for text, _ in labelled(60, 3, "a phone")], "small": small, "model": str(encoder_folder),
    }  # fmt: skip
    for number, snippet in enumerate(SNIPPETS):
        exec(compile(snippet, f"snippet {number} of {PAGE.name}", "exec"), names)
    assert "environment" in names and "Interval" in capsys.readouterr().out
    assert (tmp_path / "runs" / "mine" / "l2a.json").exists()
