"""Wrong requests over all commands: each is refused in one clear sentence that names what is wrong, no traceback.

A case is a command line, in which ``{name}`` stands for a planted file, and what the sentence must mention.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from l2a.cli.app import main
from tests.conftest import write_domain

pytestmark = pytest.mark.slow
ROW = '{"text": "good film", "label": "a", "split": "train"}\n'
CSV = "text,label,split\ngood film,a,train\nbad film,b,train\nfine film,a,test\n"
DATA = ["--source", "{source}", "--target", "{target}", "--shots", "4", "--dev-shots", "4", "--output-dir", "{out}"]
PAIR = ["--source", "{source}", "--target", "{target}"]
DISTILL = ["distill", *DATA, "--teacher", "{encoder}", "--preset", "quick"]


def text_files() -> dict[str, bytes]:
    """Files that hold something wrong, by name."""
    return {
        "empty.csv": b"",
        "header.csv": b"text,label\n",
        "semicolon.csv": b"text;label;split\ngood film;a;train\nbad film;b;train\n",
        "ragged.csv": CSV.encode() + b"one,two,three,four\n",
        "quote.csv": b'text,label\n"never closed,a\n',
        "twice.csv": b"text,text,label\na,b,c\n",
        "nan.csv": b"text,label,split\ngood,NaN,train\nbad,b,train\nfine,c,test\n",
        "split.csv": b"text,label,split\ngood,a,trian\nbad,b,train\n",
        "nolabel.csv": b"text,label,split\ngood,,train\nbad,b,train\n",
        "columns.csv": b"body,verdict\ngood,a\nbad,b\n",
        "latin.csv": "text,label\ncaf\u00e9,a\n".encode("latin-1"),
        "utf16.csv": "text,label\ngood,a\n".encode("utf-16"),
        "nul.jsonl": b'{"text": "a\x00b", "label": "a"}\n',
        "broken.jsonl": ROW.encode() + b'{"text": "bad\n',
        "list.jsonl": b'["good", "a"]\n',
        "list.json": b'[{"text": "good", "label": "a"}]',
        "surrogate.jsonl": b'{"text": "\\ud800", "label": "a"}\n',
        "number.jsonl": b'{"text": 3, "label": "a"}\n',
        "blank.jsonl": b'{"text": "  ", "label": "a"}\n',
        "oneclass.jsonl": ROW.encode() * 3,
        "notest.csv": b"text,label,split\ngood,negative,train\nbad,positive,train\n",
        "labels.csv": b"text,label,split\ngood,no,train\nbad,yes,train\nfine,no,test\n",
        "broken.parquet": b"PAR1 not really",
        "empty.parquet": b"",
        "book.xlsx": b"PK\x03\x04",
        "data.pkl": b"\x80\x04.",
        "empty.txt": b"\n\n",
        "binary.txt": bytes(range(256)),
        "words.txt": b"good film\nbad film\n",
        "key.yaml": b"kd: {tempratur: 2}\n",
        "twice.yaml": b"shots: 1\nshots: 2\n",
        "list.yaml": b"- shots\n",
        "broken.yaml": b"kd: {alpha: [\n",
        "object.yaml": b"!!python/object/apply:os.system ['true']\n",
        "nan.yaml": b"kd: {learning_rate: .nan}\n",
        "infinite.yaml": b"kd: {learning_rate: .inf}\n",
        "type.yaml": b"kd: {rounds: many}\n",
        "binary.yaml": b"\xff\xfe\x00",
        "shares.yaml": b"kd: {target_share: 0.9, augmented_share: 0.9}\n",
    }


@pytest.fixture(scope="module")
def planted(encoder_folder: Path, classifier_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Everything that cases refer to, by name."""
    root = tmp_path_factory.mktemp("bad")
    for name, content in text_files().items():
        (root / name).write_bytes(content)
    found = {name: str(root / name) for name in text_files()}
    found |= {"source": str(write_domain(root / "source.jsonl", 80, 1)), "encoder": str(encoder_folder)}
    found |= {"target": str(write_domain(root / "target.jsonl", 80, 2, "this ")), "classifier": str(classifier_folder)}
    for name, change in model_faults().items():
        shutil.copytree(encoder_folder, root / name)
        change(root / name)
        found[name] = str(root / name)
    (root / "folder").mkdir()
    (root / "full").mkdir()
    (root / "full" / "metrics.json").write_text("mine")
    found |= {"folder": str(root / "folder"), "full": str(root / "full"), "words": str(root / "words.txt")}
    return found | {"below_file": str(root / "words.txt" / "run"), "missing": str(root / "missing")}


def model_faults() -> dict[str, Callable[[Path], object]]:
    """Model folders that hold something wrong, by name."""

    def no_padding(folder: Path) -> None:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (path := folder / name).exists():
                content = json.loads(path.read_text())
                content.pop("pad_token", None)
                path.write_text(json.dumps(content))
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["padding"] = None
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": None}))

    def added_tokens(folder: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens([f"added{i}" for i in range(80)])
        tokenizer.save_pretrained(folder)

    def remote_code(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config |= {"model_type": "stranger", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
        path.write_text(json.dumps(config))
        (folder / "code.py").write_text("raise SystemError('code of the model folder has run')\n")

    weights = "model.safetensors"
    return {
        "no_padding": no_padding,
        "added_tokens": added_tokens,
        "remote_code": remote_code,
        "no_weights": lambda folder: (folder / weights).unlink(),
        "torn_weights": lambda folder: os.truncate(folder / weights, 1000),
        "garbage_weights": lambda folder: (folder / weights).write_bytes(b"garbage"),
        "broken_config": lambda folder: (folder / "config.json").write_text("{"),
        "no_config": lambda folder: (folder / "config.json").unlink(),
        "no_tokenizer": lambda folder: [path.unlink() for path in folder.glob("*token*")],
        "broken_tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{"),
    }


CASES: list[tuple[list[str], str]] = [
    # options and configuration
    (["distil"], "distil"),
    (["distill", "--bogus", "1"], "--bogus"),
    (["distill", "--shots", "few"], "--shots"),
    ([*DISTILL, "--shots", "0"], "shots"),
    ([*DISTILL, "--shots", "-3"], "shots"),
    ([*DISTILL, "--seed", "99999999999999999999"], "seed"),
    ([*DISTILL, "--seed", "-1"], "seed"),
    ([*DISTILL, "--max-length", "2"], "max_length"),
    ([*DISTILL, "--max-length", "5000"], "5000"),
    ([*DISTILL, "--preset", "qick"], "quick"),
    ([*DISTILL, "--preset", ""], "default, full"),
    ([*DISTILL, "--config", "{missing}"], "missing"),
    ([*DISTILL, "--config", "{folder}"], "folder"),
    *(([*DISTILL, "--config", f"{{{name}.yaml}}"], word) for name, word in (
        ("key", "temperature"), ("twice", "shots"), ("list", "list"), ("broken", "broken.yaml"),
        ("object", "object.yaml"),
        ("nan", "learning_rate"), ("infinite", "learning_rate"), ("type", "rounds"), ("binary", "binary.yaml"),
        ("shares", "share"),
    )),
    # data
    *((["distill", "--source", "{source}", "--target", f"{{{name}}}"], word) for name, word in (
        ("empty.csv", "empty"), ("header.csv", "rows"), ("semicolon.csv", "semicolon"), ("ragged.csv", "line 5"),
        ("quote.csv", "quote"), ("twice.csv", "twice"), ("nan.csv", "label"), ("split.csv", "trian"),
        ("nolabel.csv", "label"), ("columns.csv", "body"), ("latin.csv", "UTF-8"), ("utf16.csv", "UTF-16"),
        ("nul.jsonl", "NUL"), ("broken.jsonl", "line 2"), ("list.jsonl", "object"), ("list.json", "one class"),
        ("surrogate.jsonl", "surrogate"), ("number.jsonl", "text"), ("blank.jsonl", "empty"),
        ("oneclass.jsonl", "class"),
        ("notest.csv", "test"), ("labels.csv", "label"), ("broken.parquet", "Parquet"), ("empty.parquet", "empty"),
        ("book.xlsx", ".xlsx"), ("data.pkl", ".pkl"), ("missing", "missing"), ("folder", "train"),
    )),
    (["distill", "--target", "{target}", "--output-dir", "{out}"], "source"),
    (["distill", "--source", "{source}", "--target", "twets"], "tweets"),
    (["distill", "--source", "{source}", "--target", "{target}", "--shots", "500"], "500"),
    ([*DISTILL, "--label-column", "verdict"], "verdict"),
    ([*DISTILL, "--text-column", "body"], "body"),
    ([*DISTILL, "--source", "{target}"], "source"),
    *(([*DISTILL, "--unlabelled", f"{{{name}}}"], word) for name, word in (
        ("empty.txt", "empty"), ("binary.txt", "UTF-8"), ("missing", "missing"), ("folder", "folder"),
    )),
    # models and agents
    *(([*DISTILL, "--teacher", f"{{{name}}}"], word) for name, word in (
        ("missing", "missing"), ("folder", "folder"), ("words", "words"), ("no_padding", "padding"),
        ("added_tokens", "embedding"), ("remote_code", "remote_code"), ("no_weights", "no_weights"),
        ("torn_weights", "torn_weights"), ("garbage_weights", "garbage_weights"), ("broken_config", "broken_config"),
        ("no_config", "no_config"), ("no_tokenizer", "tokenizer"), ("broken_tokenizer", "tokenizer"),
    )),
    ([*DISTILL, "--fine-tuned-teacher", "--teacher", "{encoder}"], "label"),
    ([*DISTILL, "--teacher", "mpnetbase"], "did you mean 'mpnet-base'"),
    *(([*DISTILL, "--student", f"{{{name}}}"], word) for name, word in (
        ("missing", "missing"), ("encoder", "max_share"), ("no_padding", "padding"), ("added_tokens", "embedding"),
        ("torn_weights", "torn_weights"), ("no_tokenizer", "tokenizer"),
    )),
    ([*DISTILL, "--selector", "pppo"], "ppo"),
    ([*DISTILL, "--selector", "{folder}"], "policy.json"),
    # output
    ([*DISTILL, "--output-dir", "/dev/null/x"], "/dev/null"),
    ([*DISTILL, "--output-dir", "{words}"], "words.txt"),
    ([*DISTILL, "--output-dir", "{below_file}"], "words.txt"),
    ([*DISTILL, "--output-dir", "{full}", "--overwrite"], "other files"),
    # other commands
    (["augment", "{missing}", "{out}.jsonl"], "missing"),
    (["augment", "{folder}", "{out}.jsonl"], "folder"),
    (["augment", "{words}", "{out}.csv"], ".jsonl"),
    (["augment", "{words}", "{words}", "--overwrite"], "words.txt"),
    (["augment", "{words}", "{out}.jsonl", "--operator", "augpro_mx"], "augpro_mix"),
    (["augment", "{words}", "{out}.jsonl", "--operator", "mixkd"], "mixkd"),
    (["augment", "{words}", "{out}.jsonl", "--operator", "source"], "--source"),
    (["augment", "{words}", "{out}.jsonl", "--operator", "augpro_fgsm", "--teacher", "{encoder}"], "--student"),
    (["augment", "{words}", "{out}.jsonl", "--degree", "most"], "degree"),
    (["augment", "{words}", "{out}.jsonl", "--degree", "2"], "degree"),
    (["augment", "{words}", "{out}.jsonl", "--copies", "0"], "copies"),
    (["augment", "{columns.csv}", "{out}.jsonl", "--teacher", "{encoder}"], "--text-column"),
    (["augment", "{binary.txt}", "{out}.jsonl", "--teacher", "{encoder}"], "UTF-8"),
    (["augment", "{words}", "/dev/null/x.jsonl", "--teacher", "{encoder}"], "/dev/null"),
    (["pretrain", "--text", "{missing}.txt", "--output-dir", "{out}"], "missing"),
    (["pretrain", "--text", "{words}", "--output-dir", "{out}", "--steps", "0"], "steps"),
    (["pretrain", "--text", "{words}", "--output-dir", "{full}"], "full"),
    (["pretrain", "--text", "{words}", "--output-dir", "{out}", "--heads", "7"], "heads"),
    (["pretrain", "--output-dir", "{out}"], "--text"),
    (["domains", "show", "twets"], "tweets"),
    (["domains", "check", "{broken.jsonl}"], "line 2"),
    (["domains", "check", "{folder}"], "train"),
    (["domains", "check", "{missing}.csv"], "missing"),
    (["selector", "train", "--output-dir", "{out}", "--pair", "onlyone"], "onlyone"),
    (["selector", "train", "--output-dir", "{out}", "--source", "{source}"], "--target"),
    (["selector", "train", "--output-dir", "{out}", "--agent", "random", *PAIR], "random"),
    (["selector", "train", "--output-dir", "{full}", "--source", "{source}", "--target", "{target}"], "other files"),
    (["selector", "evaluate", "{folder}"], "policy.json"),
    (["selector", "evaluate", "ppo"], "ppo"),
    (["selector", "show", "{missing}"], "missing"),
    (["experiment", "run", "shiped"], "shipped"),
    (["experiment", "run", "{key.yaml}"], "key"),
    (["experiment", "run", "shipped", "--workers", "0"], "workers"),
    (["experiment", "run", "shipped", "--backend", "spark"], "spark"),
    (["experiment", "report", "shipped", "--results", "{missing}"], "shipped"),
    (["cache", "clear", "teecher"], "teecher"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "word"), CASES, ids=[f"{i}-{word}" for i, (_, word) in enumerate(CASES)])
def test_a_wrong_request_is_one_clear_sentence(arguments, word, planted, tmp_path, monkeypatch, capsys):
    names = planted | {"out": str(tmp_path / "out")}
    filled = [_fill(argument, names) for argument in arguments]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["l2a", *filled])
    with pytest.raises(SystemExit) as stopped:
        main()
    captured = capsys.readouterr()
    said = captured.err + captured.out
    assert stopped.value.code in (1, 2), said
    assert word.lower() in said.lower() and "Traceback" not in said, said
    last = captured.err.strip().splitlines()[-1] if captured.err.strip() else said.strip().splitlines()[-1]
    assert len(last) < 700 and " came;" not in last and "needed" not in last, last


def _fill(argument: str, names: dict[str, str]) -> str:
    for name in sorted(names, key=len, reverse=True):
        argument = argument.replace("{" + name + "}", names[name])
    return argument
