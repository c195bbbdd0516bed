"""Wrong requests over all commands: each is refused in one clear sentence that names what is wrong, no traceback.

A case of ``wrong_requests.txt`` is a command line, in which ``{name}`` stands for a planted file, after variables of
the environment, and what the sentence must mention. `benchmarks/trust.py` counts the cases and those that fail.
"""

import bz2
import errno
import gzip
import json
import lzma
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
from transformers import AutoTokenizer

from l2a.util.cards import shipped_folder
from tests.conftest import write_domain
from tests.data.bad_files import BAD_FILES

CSV = "text,label,split\ngood film,a,train\nbad film,b,train\nfine film,a,test\n"
PAIR = "--source {source} --target {target} --shots 4 --dev-shots 4 --teacher {encoder}"
COMMANDS = {
    "DISTILL": f"distill {PAIR} --output-dir {{out}} --preset fast",
    "PRETRAIN": "pretrain --output-dir {out} --teacher {encoder}",
    "TRAIN": f"selector train {PAIR} --output-dir {{out}} --max-length 32",
}
"""Beginnings of requests that are right so far."""
FILES = {name: content for name, content, _ in BAD_FILES} | {
    "unclosed.csv": b'text,label\n"never closed,a\n',
    "raw_nul.jsonl": b'{"text": "a\x00b", "label": "a"}\n',
    "notest.csv": b"text,label,split\ngood,negative,train\nbad,positive,train\n",
    "labels.csv": b"text,label,split\ngood,no,train\nbad,yes,train\nfine,no,test\n",
    "data.pkl": b"\x80\x04.",
    "empty.txt": b"\n\n",
    "binary.txt": bytes(range(256)),
    "mixed.txt": b"one\ttwo\nthree\n",
    "row.csv": b"text\ngood\n  \n",
    "rows.xml": b"<a/>",
    "words.txt": b"good film\nbad film\n",
    "binary.csv": bytes(range(256)) * 9,
    "cut.csv.bz2": bz2.compress(CSV.encode())[:-9],
    "cut.csv.gz": gzip.compress(CSV.encode())[:-9],
    "cut.csv.xz": lzma.compress(CSV.encode())[:-9],
    "escape.yaml": b"name: ../../escape\ndescription: d\npreset: fast\npairs: []\nvariants: {}\n",
    "import.yaml": b"description: d\nalgorithm: os.system\n",
    "module.yaml": b"description: d\nalgorithm: no.such.Class\n",
    "roomy.yaml": b"student: {max_share: 1}\n",
    "rule.yaml": b"description: d\nalgorithm: 'rule: rnadom'\n",
    "width.yaml": b"description: d\nalgorithm: stable_baselines3.PPO\nhidden: [0]\n",
    "full/metrics.json": b"mine",
    "here/agents/ppo.yaml": b"description: d\nalgorithm: 'rule: all'\n",
    "here/agents/stranger.yaml": b"description: d\nalgorithm: evil.Class\n",
    "here/configs/mine.yaml": b"kd: {alpha: 2}\n",
    "here/domains/address.yaml": b"{name: address, description: d, task: t, licence: l, labels: [a, b], data: 'http://x/y.csv'}",
    "here/domains/outside.yaml": b"""{name: outside, description: d, task: t, licence: l, labels: [a, b],
        artifact: {package: x, version: '1', kind: sdist, sha256: "0", members: [../../x]},
        ratings: {member: x, threshold: 1, split_by: text}}""",
    "here/domains/other.yaml": b"{name: movies, description: d, task: t, licence: l, labels: [a, b], data: x.csv}",
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


def with_added_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"added{i}" for i in range(80)])
    tokenizer.save_pretrained(folder)


def with_remote_code(folder: Path) -> None:
    code = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    change_json("config.json", model_type="stranger", auto_map=code)(folder)
    (folder / "code.py").write_text("raise SystemError('code of the model folder has run')\n")


def with_shards_of_pickles(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "other.safetensors")
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"x": "pickled.bin"}}))


def change_json(name: str, **changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))

    return change


WEIGHTS = "model.safetensors"
PANIC = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
POLICY = "policy.safetensors"
FAULTS: dict[str, Callable[[Path], object]] = {
    "bomb": change_json("config.json", hidden_size=640_000),
    "layers": change_json("config.json", num_hidden_layers=10**7),
    "negative": change_json("config.json", hidden_size=-64),
    "decoder": change_json("config.json", model_type="gpt2"),
    "both_ways": change_json("config.json", model_type="bart"),
    "no_type": change_json("config.json", model_type=None),
    "panic": change_json("tokenizer.json", normalizer=PANIC),
    "pickles": with_shards_of_pickles,
    "no_padding": change_json("tokenizer_config.json", pad_token=None, tokenizer_class="PreTrainedTokenizerFast"),
    "added_tokens": with_added_tokens,
    "remote_code": with_remote_code,
    "no_weights": lambda folder: (folder / WEIGHTS).unlink(),
    "torn_weights": lambda folder: os.truncate(folder / WEIGHTS, 1000),
    "garbage_weights": lambda folder: (folder / WEIGHTS).write_bytes(b"garbage"),
    "broken_config": lambda folder: (folder / "config.json").write_text("{"),
    "no_config": lambda folder: (folder / "config.json").unlink(),
    "no_tokenizer": lambda folder: [path.unlink() for path in folder.glob("*token*")],
    "broken_tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{"),
    "policy_bomb": change_json("policy.json", hidden=[10**9, 10**9]),
    "policy_format": change_json("policy.json", format=9),
    "policy_json": lambda folder: (folder / "policy.json").write_text("{"),
    "policy_list": lambda folder: (folder / "policy.json").write_text("[]"),
    "policy_names": change_json("policy.json", feature_names=3),
    "policy_pickle": lambda folder: (folder / POLICY).write_bytes(b"\x80\x04cos\nsystem\n."),
    "policy_torn": lambda folder: os.truncate(folder / POLICY, 100),
    "policy_no_weights": lambda folder: (folder / POLICY).unlink(),
}
"""What is done to the folder of a model or a policy, by its name."""


@pytest.fixture(scope="module")
def planted(encoder_folder, classifier_folder, tmp_path_factory):
    """Everything that cases refer to, by name."""
    root = tmp_path_factory.mktemp("bad")
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    for name, change in FAULTS.items():
        whole = shipped_folder("agents") / "pretrained" if name.startswith("policy") else encoder_folder
        change(shutil.copytree(whole, root / name))
    for name in ("run", "onnx", "temperature"):
        shutil.copytree(classifier_folder, root / name / ("student" if name == "run" else ""))
    (root / "run" / "metrics.json").write_text("{")
    (root / "onnx" / WEIGHTS).unlink()
    (root / "onnx" / "model.onnx").write_bytes(b"no model")
    (root / "temperature" / "l2a.json").write_text('{"temperature": -1}')
    (root / "folder").mkdir()
    names = {path.name: str(path) for path in root.iterdir()} | {"missing": str(root / "missing")}
    names |= {"encoder": str(encoder_folder), "classifier": str(classifier_folder)}
    for seed, name in enumerate(("source", "target"), 1):
        names[name] = str(write_domain(root / f"{name}.jsonl", 80, seed, f"{name} "))
    return names | {"words": str(root / "words.txt"), "below_file": str(root / "words.txt" / "run")}


CASES = Path(__file__).with_name("wrong_requests.txt").read_text("utf-8").splitlines()
IMPOSSIBLE = CASES.index("# What is asked for rightly and cannot be done.")
TABLE = [(1 if i > IMPOSSIBLE else 2, *case.split(" | ")) for i, case in enumerate(CASES) if " | " in case]
FIX = (
    "add|call|check|choose|clear|convert|correct|did you mean|fetch|free|give|install|known:|label|lower|make|move|"
    "name|point|quote|remove|rename|run|save|see|set|shorten|train|try|use|wait|write"
)
"""What a sentence tells the user to do."""


@pytest.mark.parametrize(("code", "line", "word"), TABLE)
def test_a_wrong_request_is_one_clear_sentence(code, line, word, planted, run, tmp_path, monkeypatch):
    names = planted | {"out": str(tmp_path / "out")}
    here = shutil.copytree(names["here"], tmp_path / "here")
    monkeypatch.chdir(here)
    written = re.sub(r"\b[A-Z]{4,}\b(?!=)", lambda found: COMMANDS[found[0]], line)
    asked = [re.sub(r"{([^}]+)}", lambda found: names[found[1]], one) for one in shlex.split(written)]
    while "=" in asked[0]:
        name, _, value = asked.pop(0).partition("=")
        monkeypatch.setenv(name, value)
    if os.environ.get("DISK") == "full":
        monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    found, shown, errors = run(*asked)
    said = errors + shown
    assert found == code, said
    assert word.lower() in said.lower() and "Traceback" not in said, said
    assert {path.name for path in tmp_path.rglob("*") if not path.is_relative_to(here)} <= {"here", "runs"}
    last = (errors.strip() or shown.strip()).splitlines()[-1]
    assert len(last) < 700 and " came;" not in last and "needed" not in last, last
    assert re.search(rf"(?i)\b({FIX})\b", said), said
    assert errors.count("error: ") <= 1, errors
