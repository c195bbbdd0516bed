"""A teacher with a vocabulary that is worth pruning, and texts of two domains."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertModel, BertTokenizerFast

from l2a.config import StudentConfig
from l2a.data.examples import TextInput
from l2a.student.student import Student, build_student
from l2a.teacher import model
from l2a.teacher.model import Teacher, load_encoder
from tests.conftest import LABELS, tiny_bert_config

SPECIALS = ["[PAD]", *(f"[unused{i}]" for i in range(9)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CHARACTERS = [*"abcdefghijklmnopqrstuvwxyz0123456789.,!'#", *"ßж中語カأ", *map(chr, range(0x3B1, 0x3B1 + 24))]
SYLLABLES = [first + second for first in "bdfgklmnprstvz" for second in "aeiou"]
WORDS = [one + two for one in SYLLABLES for two in SYLLABLES[:14]]
ENDINGS = [f"##{syllable}" for syllable in SYLLABLES]
SHARES = {"narrow": 0.133, "bert-tiny": 0.95}
"""A share that holds each preset beside this small teacher, which is also the packaged encoder."""
PRESETS = tuple(SHARES)


@pytest.fixture(scope="session")
def large_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of six layers over some 1,200 tokens."""
    folder = tmp_path_factory.mktemp("large")
    tokens = [*SPECIALS, *CHARACTERS, *WORDS, *ENDINGS, *(f"##{character}" for character in CHARACTERS)]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), do_lower_case=True)
    torch.manual_seed(3)
    encoder = BertModel(tiny_bert_config(tokenizer, hidden_size=128, num_hidden_layers=6, intermediate_size=512))
    # A trained encoder's attention is sharp and large beside the residual stream; a random one's is neither.
    for attention in (layer.attention for layer in encoder.encoder.layer):
        for part in (attention.self.query, attention.self.key, attention.self.value, attention.output.dense):
            torch.nn.init.normal_(part.weight, std=0.15)
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def packaged(monkeypatch: pytest.MonkeyPatch, large_folder: Path) -> None:
    """Lets the packaged encoders be the large one."""
    large, locate = str(large_folder), model.locate
    monkeypatch.setattr(model, "locate", lambda name, *rest: large if name in model.PACKAGED else locate(name, *rest))


@pytest.fixture(scope="session")
def large_teacher(large_folder: Path) -> Teacher:
    return load_encoder(str(large_folder), LABELS, seed=0)


@pytest.fixture(scope="session")
def domain_texts() -> tuple[TextInput, ...]:
    """Texts of few words, one letter that is not ASCII among them."""
    rng = np.random.default_rng(7)
    words = ["ж", "kada", *rng.choice(WORDS, 60, replace=False)]
    return tuple((" ".join(rng.choice(words, 8)) + " !",) for _ in range(400))


def make_student(preset: str, teacher: Teacher, texts: tuple[TextInput, ...], seed: int = 0) -> Student:
    return build_student(StudentConfig(preset=preset, max_share=SHARES[preset]), teacher, LABELS, texts, seed)
