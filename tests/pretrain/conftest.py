"""A small corpus and a config that trains in a second."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from l2a.pretrain.trainer import PretrainConfig

SHAPE = {"embedding_size": 8, "hidden_size": 16, "layers": 1, "intermediate_size": 16, "heads": 2, "positions": 32}


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    words = ("good", "bad", "film", "story", "phone", "battery", "great", "awful", "the", "was", "very", "a")
    lines = [f"the {words[i % 12]} {words[i % 11]} {words[i % 7]} was {words[(5 * i) % 12]} {i}" for i in range(40)]
    path = tmp_path / "text.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def make_config(text_file: Path, encoder_folder: Path, tmp_path: Path) -> Callable[..., PretrainConfig]:
    def make(**changes: object) -> PretrainConfig:
        config = PretrainConfig(
            output_dir=tmp_path / "student",
            text=(str(text_file),),
            teacher=str(encoder_folder),
            steps=6,
            max_length=32,
            variants=20,
            tokens_per_batch=256,
            checkpoint_every=100,
            **SHAPE,
        )
        return dataclasses.replace(config, **changes)

    return make
