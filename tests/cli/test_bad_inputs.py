"""Wrong requests over all commands: each is refused in one clear sentence that names what is wrong, no traceback.

A case is a command line, in which ``{name}`` stands for a planted file, and what the sentence must mention.
"""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.conftest import write_domain

ROW = '{"text": "good film", "label": "a", "split": "train"}\n'
CSV = "text,label,split\ngood film,a,train\nbad film,b,train\nfine film,a,test\n"
PAIR = ["--source", "{source}", "--target", "{target}"]
SHOTS = ["--shots", "4", "--dev-shots", "4"]
DISTILL = ["distill", *PAIR, *SHOTS, "--output-dir", "{out}", "--teacher", "{encoder}", "--preset", "fast"]
FILES = {
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
    "mixed.txt": b"one\ttwo\nthree\n",
    "row.csv": b"text\ngood\n  \n",
    "rows.xml": b"<a/>",
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
"""Files that hold something wrong, by name."""


def without_padding(folder: Path) -> None:
    for name in ("tokenizer_config.json", "tokenizer.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"pad_token": None, "padding": None}))


def with_added_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"added{i}" for i in range(80)])
    tokenizer.save_pretrained(folder)


def with_remote_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "stranger", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemError('code of the model folder has run')\n")


WEIGHTS = "model.safetensors"
MODEL_FAULTS = {
    "no_padding": without_padding,
    "added_tokens": with_added_tokens,
    "remote_code": with_remote_code,
    "no_weights": lambda folder: (folder / WEIGHTS).unlink(),
    "torn_weights": lambda folder: os.truncate(folder / WEIGHTS, 1000),
    "garbage_weights": lambda folder: (folder / WEIGHTS).write_bytes(b"garbage"),
    "broken_config": lambda folder: (folder / "config.json").write_text("{"),
    "no_config": lambda folder: (folder / "config.json").unlink(),
    "no_tokenizer": lambda folder: [path.unlink() for path in folder.glob("*token*")],
    "broken_tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{"),
}
"""What is done to a model folder, by its name."""


@pytest.fixture(scope="module")
def planted(encoder_folder, tmp_path_factory):
    """Everything that cases refer to, by name."""
    root = tmp_path_factory.mktemp("bad")
    for name, content in FILES.items():
        (root / name).write_bytes(content)
    for name, change in MODEL_FAULTS.items():
        shutil.copytree(encoder_folder, root / name)
        change(root / name)
    write_domain(root / "source", 80, 1).rename(root / "source.jsonl")
    write_domain(root / "target", 80, 2, "this ").rename(root / "target.jsonl")
    for name in ("folder", "full"):
        (root / name).mkdir()
    (root / "full" / "metrics.json").write_text("mine")
    names = {path.name: str(path) for path in root.iterdir()} | {"encoder": str(encoder_folder)}
    names |= {name: str(root / f"{name}.jsonl") for name in ("source", "target")}
    names |= {"words": str(root / "words.txt"), "below_file": str(root / "words.txt" / "run")}
    return names | {"missing": str(root / "missing")}


CASES: list[tuple[list[str], str]] = [
    # options and configuration
    (["distil"], "distil"),
    (["distill", "--bogus", "1"], "--bogus"),
    (["distill", "--shots", "few"], "--shots"),
    ([*DISTILL, "--shots", "0"], "shots is 0; give a whole number of at least 1"),
    ([*DISTILL, "--shots", "-3"], "shots"),
    ([*DISTILL, "--seed", "99999999999999999999"], "seed"),
    ([*DISTILL, "--seed", "-1"], "seed"),
    ([*DISTILL, "--max-length", "2"], "max_length"),
    ([*DISTILL, "--max-length", "5000"], "5000"),
    ([*DISTILL, "--preset", "fsat"], "did you mean 'fast'"),
    ([*DISTILL, "--preset", ""], "default, fast"),
    ([*DISTILL, "--config", "{missing}"], "missing: no such file"),
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
        ("notest.csv", "test"), ("labels.csv", "yes"), ("broken.parquet", "Parquet"), ("empty.parquet", "empty"),
        ("book.xlsx", ".xlsx"), ("data.pkl", ".pkl"), ("missing", "missing"), ("folder", "train"),
    )),
    (["distill", "--target", "{target}", "--output-dir", "{out}"], "source"),
    (["distill", "--source", "{source}", "--target", "twets"], "did you mean 'tweets'"),
    (["distill", "--source", "{source}", "--target", "{target}", "--shots", "500"], "500"),
    ([*DISTILL, "--label-column", "verdict"], "verdict"),
    ([*DISTILL, "--text-column", "body"], "body"),
    ([*DISTILL, "--source", "{target}"], "source"),
    *(([*DISTILL, "--unlabelled", f"{{{name}}}"], word) for name, word in (
        ("empty.txt", "empty"), ("binary.txt", "NUL"), ("missing", "missing"), ("folder", "folder"),
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
    (["augment", "{missing}.txt", "{out}.jsonl"], "missing.txt: cannot be read"),
    (["augment", "{missing}.csv", "{out}.jsonl"], "missing.csv: cannot be read"),
    (["augment", "{empty.txt}", "{out}.jsonl"], "the file is empty"),
    (["augment", "{mixed.txt}", "{out}.jsonl"], "mixed"),
    (["augment", "{row.csv}", "{out}.jsonl"], "line 3"),
    (["augment", "{header.csv}", "{out}.jsonl"], "no rows"),
    (["augment", "{rows.xml}", "{out}.jsonl"], ".xml"),
    (["augment", "{folder}", "{out}.jsonl"], "folder"),
    (["augment", "{words}", "{out}.csv"], ".jsonl"),
    (["augment", "{words}", "{words}", "--overwrite"], "words.txt"),
    (["augment", "{words}", "{out}.jsonl", "--operator", "augpro_mx"], "did you mean 'augpro_mix'"),
    (["augment", "{words}", "{out}.jsonl", "--operator", "mixkd"], "makes no texts"),
    (["augment", "{words}", "{out}.jsonl", "--operator", "source"], "--source"),
    (["augment", "{words}", "{out}.jsonl", "--operator", "augpro_fgsm", "--teacher", "{encoder}"], "--student"),
    (["augment", "{words}", "{out}.jsonl", "--degree", "most"], "--degree"),
    (["augment", "{words}", "{out}.jsonl", "--degree", "nan"], "--degree"),
    (["augment", "{words}", "{out}.jsonl", "--degree", "2"], "--degree"),
    (["augment", "{words}", "{out}.jsonl", "--copies", "0"], "--copies"),
    (["augment", "{words}", "{out}.jsonl", "--batch-size", "0"], "--batch-size"),
    (["augment", "{words}", "{out}.jsonl", "--source", "nowhere.csv"], "nowhere.csv"),
    (["augment", "{words}", "{out}.jsonl", "--teacher", "./nowhere"], "nowhere"),
    (["augment", "{columns.csv}", "{out}.jsonl", "--teacher", "{encoder}"], "--text-column"),
    (["augment", "{binary.txt}", "{out}.jsonl", "--teacher", "{encoder}"], "UTF-8"),
    (["augment", "{words}", "/dev/null/x.jsonl", "--teacher", "{encoder}"], "/dev/null"),
    (["pretrain", "--text", "{missing}.txt", "--output-dir", "{out}"], "missing"),
    (["pretrain", "--text", "{words}", "--output-dir", "{out}", "--steps", "0"], "steps"),
    (["pretrain", "--text", "{words}", "--output-dir", "{full}"], "full"),
    (["pretrain", "--text", "{words}", "--output-dir", "{out}", "--hidden-size", "7"], "hidden_size"),
    (["pretrain", "--output-dir", "{out}"], "--text"),
    (["domains", "show", "twets"], "tweets"),
    (["domains", "check", "{broken.jsonl}"], "line 2"),
    (["domains", "check", "{folder}"], "train"),
    (["domains", "check", "{missing}.csv"], "missing"),
    (["selector", "train", "--output-dir", "{out}", "--pair", "onlyone"], "onlyone; give SOURCE:TARGET"),
    (["selector", "train", "--output-dir", "{out}", "--pair", "a:b:c"], "one colon"),
    (["selector", "train", "--output-dir", "{out}", "--source", "{source}"], "give the missing one"),
    (["selector", "train", "--output-dir", "{out}", "--agent", "random", *PAIR], "does not learn"),
    (["selector", "train", "--output-dir", "{out}", "--agent", "pppo"], "did you mean 'ppo'"),
    (["selector", "train", "--output-dir", "{out}", "--steps", "0"], "selector.training_steps"),
    (["selector", "train", "--output-dir", "{full}", "--source", "{source}", "--target", "{target}"], "other files"),
    (["selector", "evaluate", "{folder}"], "holds no policy.json"),
    (["selector", "evaluate", "ppo"], "without a trained policy"),
    (["selector", "show", "{missing}"], "missing"),
    (["selector", "show", "nothing"], "no card 'nothing'"),
    (["experiment", "run", "shiped"], "shipped"),
    (["experiment", "run", "{key.yaml}"], "key"),
    (["experiment", "run", "shipped", "--workers", "0"], "workers"),
    (["experiment", "run", "shipped", "--backend", "spark"], "spark"),
    (["experiment", "run", "shipped", "--only", "movies 32"], "pair shots seed variant"),
    (["experiment", "report", "shipped", "--results", "{missing}"], "shipped"),
    (["report", "{full}"], "finished run"),
    (["report", "{missing}"], "finished run"),
    (["cache", "clear", "teecher"], "teecher"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "word"), CASES, ids=[f"{i}-{word}" for i, (_, word) in enumerate(CASES)])
def test_a_wrong_request_is_one_clear_sentence(arguments, word, planted, run, tmp_path, monkeypatch):
    names = planted | {"out": str(tmp_path / "out")}
    monkeypatch.chdir(tmp_path)
    code, shown, errors = run(*(re.sub(r"{([^}]+)}", lambda found: names[found[1]], one) for one in arguments))
    said = errors + shown
    assert code == (1 if "/dev/null/x.jsonl" in arguments else 2), said
    assert word.lower() in said.lower() and "Traceback" not in said, said
    assert {path.name for path in tmp_path.rglob("*")} <= {"runs"}
    last = (errors.strip() or shown.strip()).splitlines()[-1]
    assert len(last) < 700 and " came;" not in last and "needed" not in last, last
