"""Tiny models and tokenizers, built on the spot: no test needs the network."""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import settings
from threadpoolctl import threadpool_limits

from l2a.data.examples import Examples
from l2a.util import files
from l2a.util.progress import Progress

if TYPE_CHECKING:  # the process that only deals tests to workers loads no torch
    import pandas as pd
    from transformers import BertConfig, BertTokenizerFast, PreTrainedTokenizerFast

    from l2a.student.student import Student
    from l2a.teacher.model import Teacher

POSITIVE = ("good", "great", "fine", "lovely")
NEGATIVE = ("bad", "awful", "poor", "nasty")
NEUTRAL = ("the", "film", "was", "a", "phone", "it", "is", "and", "very", "story", "battery", "this")
LABELS = ("negative", "positive")

# A busy machine is no reason to fail. `pytest --hypothesis-profile nightly` tries many more cases.
settings.register_profile("quick", deadline=None, max_examples=25)
settings.register_profile("nightly", deadline=None, max_examples=1000)
settings.load_profile("quick")


@pytest.fixture(autouse=True, scope="session")
def _one_blas_thread() -> Iterator[None]:
    """Small matrices gain nothing from more threads, and lose much where other work runs."""
    with threadpool_limits(1):
        yield


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give every test an empty cache and one thread, whatever the one before has set."""
    import torch

    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("L2A_CACHE", str(folder))
    torch.set_num_threads(1)
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> BertTokenizerFast:
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *POSITIVE, *NEGATIVE, *NEUTRAL]
    pieces = [*"abcdefghijklmnopqrstuvwxyz.,!", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*words, *pieces]))}
    return BertTokenizerFast(vocab=vocabulary, do_lower_case=True)


def tiny_bert_config(tokenizer: BertTokenizerFast, **changes: object) -> BertConfig:
    from transformers import BertConfig

    return BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **{**SMALL, **changes})


SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
FRAME = {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
ARCHITECTURES: dict[str, dict[str, object]] = {
    "bert": {}, "mpnet": {}, "roberta": {"type_vocab_size": 1}, "distilbert": {"hidden_dim": 128},
    "electra": {"embedding_size": 16}, "albert": {"embedding_size": 16}, "modernbert": FRAME,
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
}  # fmt: skip
"""Encoders of transformers, with what their tiny checkpoints change."""


def plain_tokenizer(tokenizer: BertTokenizerFast, **changes: object) -> PreTrainedTokenizerFast:
    """The same tokens in a tokenizer of no architecture, whose own call gives no token types and cuts nothing."""
    from transformers import PreTrainedTokenizerFast

    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **{**names, **changes})


def save_tiny(kind: str, folder: Path, tokenizer: PreTrainedTokenizerFast, classify: bool = False, **changes: object):
    """Save a random checkpoint of an architecture; changes are settings of its config."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    torch.manual_seed(int(classify))
    sizes = {**SMALL, "pad_token_id": 0, "max_position_embeddings": 66, **ARCHITECTURES.get(kind, {}), **changes}
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **sizes)
    (AutoModelForSequenceClassification if classify else AutoModel).from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder_folder(tokenizer: BertTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained encoder as a folder."""
    return save_tiny("bert", tmp_path_factory.mktemp("encoder"), tokenizer, max_position_embeddings=64)


@pytest.fixture(scope="session")
def classifier_folder(tokenizer: BertTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier as a folder, its labels in the other order."""
    names = {"id2label": {0: "positive", 1: "negative"}, "label2id": {"positive": 0, "negative": 1}}
    folder = tmp_path_factory.mktemp("classifier")
    return save_tiny("bert", folder, tokenizer, classify=True, max_position_embeddings=64, **names)


@pytest.fixture
def saved_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the state of every step, which a run of seconds would not reach to do."""
    monkeypatch.setattr(files, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(files, "SAVE_COST", float("inf"))


@pytest.fixture(scope="session")
def loaded_teacher(encoder_folder: Path) -> Teacher:
    from l2a.teacher.model import load_encoder

    return load_encoder(str(encoder_folder), LABELS, seed=0)


@pytest.fixture
def teacher(loaded_teacher: Teacher) -> Teacher:
    return copy.deepcopy(loaded_teacher)


def make_examples(count: int, seed: int = 0, pairs: bool = False) -> Examples:
    """Sentences whose one loaded word decides the label."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    inputs = []
    for label in labels:
        words = list(rng.choice(NEUTRAL, int(rng.integers(2, 8))))
        words.insert(int(rng.integers(len(words) + 1)), str(rng.choice(POSITIVE if label else NEGATIVE)))
        inputs.append((" ".join(words), "it was")[: 1 + pairs])
    return Examples(tuple(inputs), labels.astype(np.int64), LABELS)


@pytest.fixture
def examples() -> Examples:
    return make_examples(96)


def save_frame(frame: pd.DataFrame, path: Path) -> Path:
    """Write a frame in the format and packing that the name says, without a header as .txt."""
    if ".parquet" in path.suffixes:
        frame.to_parquet(path)
    elif ".feather" in path.suffixes:
        frame.to_feather(path)
    elif {".json", ".jsonl"} & set(path.suffixes):
        frame.to_json(path, orient="records", lines=".jsonl" in path.suffixes)
    else:
        separator = "\t" if ".tsv" in path.suffixes else ","
        frame.to_csv(path, index=False, header=".txt" not in path.suffixes, sep=separator)
    return path


def labelled(count: int, seed: int, prefix: str = "") -> list[tuple[str, str]]:
    """Distinct sentences with the names of their labels."""
    examples, letters = make_examples(count, seed), str.maketrans("0123456789", "abcdefghij")
    found = enumerate(zip(examples.inputs, examples.labels, strict=True))
    return [(f"{prefix}{text} {str(i).translate(letters)}", LABELS[label]) for i, ((text,), label) in found]


def write_domain(path: Path, count: int, seed: int, prefix: str = "") -> Path:
    """Write a domain of distinct sentences as JSON lines with splits."""
    made = zip(labelled(count, seed, prefix), ["train", "train", "train", "dev", "test"] * count, strict=False)
    rows = [{"text": text, "label": label, "split": split} for (text, label), split in made]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


class Killing(Progress):
    """Kills a worker process that is at work, once, when lines are written."""

    def __init__(self, client):
        super().__init__(verbosity=-1)
        self.client, self.killed, self.pids = client, None, client.run(os.getpid)

    @contextmanager
    def stage(self, name, total=None):
        yield self.kill

    def kill(self, _):
        busy = [worker for worker, pieces in self.client.processing().items() if pieces]
        if self.killed is None and busy:
            self.killed = self.pids[busy[0]]
            os.kill(self.killed, signal.SIGKILL)


@pytest.fixture(scope="session")
def built_student(loaded_teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> Student:
    from l2a.config import StudentConfig
    from l2a.student.student import build_student

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("L2A_CACHE", str(tmp_path_factory.mktemp("cache")))
        return build_student(StudentConfig(max_share=0.9), loaded_teacher, LABELS, (), seed=0)


@pytest.fixture
def student(built_student: Student) -> Student:
    return copy.deepcopy(built_student)
