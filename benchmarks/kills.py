"""Kills commands at random moments, runs them again until they finish, and compares bytes with an uninterrupted run.

    python -m benchmarks.kills --kills 200

Every command is the real one on tiny models and files. It runs in a fork of this process, which has the imports behind
it, and saves its state after every step, since a run of seconds would never be due. The counts go to
benchmarks/results/trust.json after every finished run; another call goes on with them while the package is the same.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import BertForSequenceClassification, BertModel, BertTokenizerFast

from benchmarks import trust
from l2a.cli import app
from l2a.data import readers
from l2a.experiments import runner
from l2a.pipeline import augment, distill, policies, run
from l2a.pretrain import trainer
from l2a.report.run_folder import export_student
from l2a.serving import classifier
from l2a.student.student import class_names
from l2a.util import files
from tests.conftest import NEGATIVE, NEUTRAL, POSITIVE, tiny_bert_config, write_domain

RUN: dict[str, Any] = {
    "source": "source.jsonl", "target": "target.jsonl", "shots": 8, "dev_shots": 4, "max_length": 24, "report": False,
    "teacher": {
        "model": "encoder", "learning_rate": 1e-3, "frozen_layers": 1, "source_epochs": 2, "target_epochs": 2,
        "target_only_epochs": 2,
    },
    "student": {"max_share": 0.9},
    "generator": {"chains": 8, "burn_in": 1},
    "kd": {
        "warmup_steps": 6, "rounds": 2, "round_steps": 10, "pool_size": 32, "learning_rate": 2e-3, "batch_size": 8,
        "evaluate_every": 4, "divergence_size": 8,
    },
    "selector": {
        "agent": "quick", "training_steps": 64, "real_evaluations": 1, "snapshots": 1, "batch": 8, "episode_steps": 4,
    },
}  # fmt: skip
CARD: dict[str, Any] = {
    "description": "A grid to kill.", "preset": "tiny", "shots": [8], "seeds": [0],
    "pairs": [{"name": "pair", "source": "source.jsonl", "target": "target.jsonl"}],
    "variants": {"random": {"method": "l2a_student", "overrides": {"selector.agent": "random"}}},
}  # fmt: skip
AGENT: dict[str, Any] = {
    "description": "An agent to kill.", "algorithm": "stable_baselines3.PPO", "environments": 4,
    "hidden": [8], "hyperparameters": {"n_steps": 8, "batch_size": 16, "n_epochs": 1},
}  # fmt: skip
COMMANDS = {
    "distill": "distill --config run.yaml --output-dir out --quiet",
    "augment": "augment texts.txt out.jsonl --operator augpro_mix --teacher encoder --copies 40 --batch-size 8 --quiet",
    "pretrain": "pretrain --text texts.txt --teacher encoder --output-dir out --steps 24 --max-length 24 "
    "--embedding-size 8 --hidden-size 16 --layers 1",
    "experiment run": "experiment run grid --data-root . --results out --workers 1",
    "larger pretrain": "pretrain --text source.jsonl --teacher encoder --output-dir out --steps 6 --max-length 24 "
    "--embedding-size 48",
    "two workers": "experiment run two --data-root . --results out --workers 2",
    "one worker": "experiment run two --data-root . --results out --workers 1",
    "predict": "predict student lines.csv --output out.jsonl --threshold 0.4 --quiet",
    "selector train": "selector train --config run.yaml --output-dir out --agent quick --steps 64",
}
SHARES = {"distill": 3, "augment": 1, "predict": 2, "pretrain": 1, "experiment run": 1, "selector train": 1}
"""How often each command is drawn."""
MAY_DIFFER = ("seconds", "second", "latency_ms", "seconds_by_stage", "peak_memory_mb", "command", "checksum")


def make_inputs(folder: Path) -> None:
    """Write a tiny encoder and student, two domains, files of texts, a configuration and cards."""
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *POSITIVE, *NEGATIVE, *NEUTRAL]
    pieces = [*"abcdefghijklmnopqrstuvwxyz.,!", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys([*words, *pieces])) + "\n")
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), do_lower_case=True)
    torch.manual_seed(0)
    BertModel(tiny_bert_config(tokenizer)).save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    for name, count, seed in (("source", 120, 1), ("target", 90, 2)):
        write_domain(folder / f"{name}.jsonl", count, seed, prefix=f"{name[0]} ")
    texts = [json.loads(line)["text"] for line in (folder / "source.jsonl").read_text().splitlines()]
    (folder / "texts.txt").write_text("\n".join(texts[:40]) + "\n")
    lines = (f"{number},{texts[number % 120]}" for number in range(4000))
    (folder / "lines.csv").write_text("\n".join(["number,text", *lines]) + "\n")
    names = class_names(("positive", "negative", "mixed"))
    student = BertForSequenceClassification(tiny_bert_config(tokenizer, initializer_range=0.3, **names))
    export_student(student.eval(), tokenizer, folder / "student", "a card", 24)
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    cards = {"configs/tiny.yaml": RUN, "configs/experiments/grid.yaml": CARD, "agents/quick.yaml": AGENT}
    cards["configs/experiments/two.yaml"] = CARD | {"seeds": [0, 1]}
    for path, content in cards.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(yaml.safe_dump(content))


def start(command: str, folder: Path, threads: int = 1) -> int:
    """Run a command in a fork, in a folder with a cache of its own; return the process id."""
    if process := os.fork():
        return process
    code = 1
    try:
        os.chdir(folder)
        os.environ["L2A_CACHE"] = str(folder / "cache")
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(threads)
        files.SAVE_SECONDS, files.SAVE_COST = 0.0, float("inf")
        readers.WINDOW = 40
        trainer.BATCH_SIZE = 128 if command == "larger pretrain" else 8
        times = dict.fromkeys(("batch_1", "batch_1_spread", "batch_32", "batch_32_spread"), 0.0)
        run.measure_latency = lambda *_: times  # it takes seconds, and times are not compared
        sys.argv = ["l2a", *COMMANDS[command].split()]
        app.main()
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(code)


def digest(folder: Path) -> dict[str, str]:
    """Hash what a command wrote: bytes of models and texts, and values of JSON but for times."""
    found = {}
    for path in [folder / "out.jsonl", *(folder / "out").rglob("*")]:
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or "/." in name or path.name in ("README.md", "l2a.json", "config.yaml"):
            continue
        content = path.read_bytes()
        if path.name == "log.jsonl":  # of the course of a run, the scores: a resumed stage tells them again
            events = [json.loads(line) for line in content.splitlines()]
            content = repr([without_times(one) for one in events if one["event"] == "validation"]).encode()
        elif path.name in ("metrics.json", "policy.json", "selection.json", "cells.jsonl"):
            lines = [content] if path.suffix == ".json" else content.splitlines()
            content = repr([without_times(json.loads(line)) for line in lines]).encode()
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def without_times(value: Any) -> Any:
    """Leave out what differs between any two runs."""
    if isinstance(value, list):
        return [without_times(item) for item in value]
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if not key.endswith(MAY_DIFFER)}
    return value


def run_until_done(command: str, folder: Path, moments: Sequence[float]) -> tuple[int, int, str]:
    """Run a command again and again, killed after so many seconds each, and once more to its end.

    Returns:
        Kills that hit it, exit code of the last run, and what it said.
    """
    for hit in range(len(moments) + 1):
        process = start(command, folder)
        if hit < len(moments):
            until = time.monotonic() + moments[hit]
            while time.monotonic() < until and not os.waitid(os.P_PID, process, ENDED):
                time.sleep(0.005)
            if not os.waitid(os.P_PID, process, ENDED):
                os.kill(process, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if code != -signal.SIGKILL:
            break
    return hit, code, (folder / "log.txt").read_text()


def compare_runs(place: Path) -> dict[str, bool]:
    """Say whether the number of workers, and of threads in torch, leaves all bytes as they are."""
    make_inputs(place / "inputs")
    found = {}
    for name, command, threads in (
        ("a", "one worker", 0), ("b", "two workers", 0), ("c", "larger pretrain", 1), ("d", "larger pretrain", 2),
    ):  # fmt: skip
        shutil.copytree(place / "inputs", place / name)
        if threads:
            code = os.waitpid(start(command, place / name, threads), 0)[1]
        else:  # in a process of its own, which may start others
            root = str(Path(__file__).parents[1])
            cached = {**os.environ, "L2A_CACHE": str(place / name / "cache"), "PYTHONPATH": root}
            words = [sys.executable, "-m", "l2a", *COMMANDS[command].split()]
            code = subprocess.run(words, cwd=place / name, env=cached, check=False).returncode
        if code:
            raise SystemExit(f"{command} fails with {code}")
        found[name] = digest(place / name)
    return {"same_with_two_workers": found["a"] == found["b"], "same_with_two_threads": found["c"] == found["d"]}


ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT


def main() -> None:
    """Kill until there are so many kills."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="kills in all, those of earlier calls included")
    parser.add_argument("--commands", nargs="*", default=list(SHARES), choices=list(SHARES))
    parser.add_argument("--compare", action="store_true", help="only compare one with two workers, and threads")
    wanted = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    assert augment and classifier and distill and policies and runner  # imported for the forks
    if wanted.compare:
        with tempfile.TemporaryDirectory() as place:
            trust.record(**compare_runs(Path(place)))
        return
    known = json.loads(trust.RESULT.read_text()) if trust.RESULT.exists() else {}
    counts = Counter(known.get("kills_by_command", {}) if known.get("kills_code") == files.code_fingerprint() else {})
    lost, identical = (known.get(name, 0) if counts else 0 for name in ("lost", "resumed_identical_kills"))
    with tempfile.TemporaryDirectory() as place:
        inputs, whole, seconds = Path(place) / "inputs", {}, {}
        make_inputs(inputs)
        for attempt in itertools.count(sum(counts.values())):
            if sum(counts.values()) >= wanted.kills:
                break
            rng = random.Random(attempt)
            command = rng.choices(wanted.commands, [SHARES[name] for name in wanted.commands])[0]
            if command not in whole:
                folder, began = Path(place) / "whole" / command, time.monotonic()
                shutil.copytree(inputs, folder)
                _, code, said = run_until_done(command, folder, [])
                if code:
                    raise SystemExit(f"{command} fails without a kill: {said}")
                whole[command], seconds[command] = digest(folder), time.monotonic() - began
                print(f"{command}: {seconds[command]:.1f} s, {len(whole[command])} files", flush=True)
            folder = Path(place) / "killed"
            shutil.copytree(inputs, folder)
            moments = [rng.uniform(0, seconds[command]) for _ in range(rng.randint(1, 3))]
            hit, code, said = run_until_done(command, folder, moments)
            found = digest(folder)
            left = [path for path in folder.rglob("*") if files.CHECKPOINT in path.name]
            counts[command] += hit
            # A kill after the last rename leaves a finished result, which the same command does not replace.
            refused = code == 2 and hit and ("it holds a finished" in said or "out.jsonl exists" in said)
            if (code and not refused) or found != whole[command] or left:
                lost += hit
                wrong = sorted(n for n in found.keys() | whole[command].keys() if found.get(n) != whole[command].get(n))
                print(f"LOST: {command}, exit code {code}, other files {wrong}, left {left}: {said[-600:]}", flush=True)
            else:
                identical += hit
            shutil.rmtree(folder)
            total = sum(counts.values())
            if total:
                trust.record(
                    kills=total, lost=lost, resumed_identical=identical / total, resumed_identical_kills=identical,
                    kills_by_command=dict(sorted(counts.items())), kills_code=files.code_fingerprint(),
                )  # fmt: skip
            print(f"{total} kills, {lost} lost: {command}, {hit} kills", flush=True)


if __name__ == "__main__":
    main()
