import dataclasses
import json
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from l2a.cli.app import app
from l2a.pretrain import trainer
from l2a.pretrain.trainer import PretrainConfig, cosine_distance, pretrain, similarity_loss
from l2a.teacher.model import load_encoder
from l2a.util import files
from l2a.util.errors import RunError, UsageError
from tests.conftest import write_domain

WORDS = ("good", "bad", "film", "story", "phone", "battery", "great", "awful", "the", "was", "very", "a")


@pytest.fixture
def text_file(tmp_path):
    lines = [f"the {WORDS[i % 12]} {WORDS[i % 11]} {WORDS[i % 7]} was {WORDS[(5 * i) % 12]} {i}" for i in range(40)]
    (tmp_path / "text.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "text.txt"


@pytest.fixture
def make_config(text_file, encoder_folder, tmp_path, monkeypatch):
    """Settings that train in a second: six steps of 16 texts, three epochs and a half."""
    monkeypatch.setattr(trainer, "BATCH_SIZE", 16)
    config = PretrainConfig(
        tmp_path / "student", (str(text_file),), teacher=str(encoder_folder), steps=6, max_length=32, embedding_size=8,
        hidden_size=16, layers=1,
    )  # fmt: skip
    return lambda **changes: dataclasses.replace(config, **changes)


def test_the_student_is_an_ordinary_classifier_folder(make_config, saved_after_every_step):
    folder = pretrain(make_config())
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    inputs = AutoTokenizer.from_pretrained(folder)("a good film", return_tensors="pt")
    assert model(**inputs).logits.shape == (1, 3) and model.dtype == torch.float32
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644, "readable by everybody"
    weights = load_file(folder / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    assert not any("out_proj" in name for name in weights)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    assert (tokenizer["truncation"], tokenizer["padding"]) == (None, None)
    assert AutoTokenizer.from_pretrained(folder).model_max_length == model.config.max_position_embeddings == 256
    assert not (folder / files.CHECKPOINT).exists()


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.usefixtures("saved_after_every_step")
def test_a_killed_run_resumes_to_the_same_student_and_another_seed_gives_another(make_config, tmp_path, monkeypatch):
    whole = weights(pretrain(make_config(output_dir=tmp_path / "whole")))
    assert weights(pretrain(make_config(output_dir=tmp_path / "other", seed=1))) != whole
    losses, done = trainer.distillation_losses, []
    calls = iter([losses] * 4 + [Mock(side_effect=KeyboardInterrupt)])
    with monkeypatch.context() as dying, pytest.raises(KeyboardInterrupt):
        dying.setattr(trainer, "distillation_losses", lambda *arguments: next(calls)(*arguments))
        pretrain(make_config())
    monkeypatch.setattr(trainer, "distillation_losses", lambda *arguments: done.append(1) or losses(*arguments))
    with pytest.raises(UsageError, match=r"\"seed\": 0 there, \"seed\": 1 here"):
        pretrain(make_config(seed=1))
    assert weights(pretrain(make_config(overwrite=True))) == whole and len(done) == 2


def test_a_run_killed_at_its_end_trains_no_more(make_config, monkeypatch, saved_after_every_step):
    with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):
        broken.setattr(trainer, "_card", lambda *_: 1 / 0)
        pretrain(make_config())
    folder = make_config().output_dir / files.CHECKPOINT
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors"], "nothing is pickled"
    (folder / f".x{files.NEW}moved").write_bytes(b"half")
    monkeypatch.setattr(trainer, "distillation_losses", lambda *_: pytest.fail("trained again"))
    pretrain(make_config())
    assert not folder.exists()


def test_a_finished_student_is_replaced_only_when_asked(make_config):
    pretrain(make_config(steps=1))
    with pytest.raises(UsageError, match="--overwrite"):
        pretrain(make_config(steps=2))
    assert "--steps 2" in (pretrain(make_config(steps=2, overwrite=True)) / "README.md").read_text()


def untrained(config):
    teacher = load_encoder(config.teacher, ("0", "1"), seed=0)
    return teacher, trainer.GeneralStudent(trainer.make_classifier(teacher, config), teacher.hidden_size)


def test_training_brings_the_student_nearer_to_the_teacher(make_config):
    config = make_config(steps=40, learning_rate=3e-3)
    teacher, model = untrained(config)
    encoded = trainer.encode_texts(trainer.read_texts(config), teacher.tokenizer, config)

    def mean_loss():
        with torch.no_grad():
            batch = encoded.padded(np.arange(len(encoded)))
            return trainer.distillation_losses(model, teacher, batch)["total"].item()

    before = mean_loss()
    trainer.train(model, teacher, encoded, config)
    assert mean_loss() < 0.7 * before


def test_a_diverged_loss_ends_the_run(make_config, monkeypatch):
    diverged = {name: torch.tensor(float("nan")) for name in ("token", "total")}
    monkeypatch.setattr(trainer, "distillation_losses", lambda *_: diverged)
    said = r"step 1 is not finite \(token nan, total nan\), in the .* with '.+', '.+'; lower --learning-rate"
    with pytest.raises(RunError, match=said):
        pretrain(make_config())


def test_the_student_reads_texts_and_texts_with_the_next(make_config, encoder_folder):
    tokenizer, bank = AutoTokenizer.from_pretrained(encoder_folder), [("good film",), ("bad story",), ("a phone",)]
    encoded = trainer.encode_texts(bank, tokenizer, make_config())
    texts = {tokenizer.decode(encoded.ids[slice(*encoded.offsets[i : i + 2])]) for i in range(len(encoded))}
    frames = [f"[CLS] {text[0]} [SEP]" for text in bank]
    assert len(texts) == 4 and texts > {*frames}
    assert texts < {*frames, *(f"{frames[i]} {bank[(i + 1) % 3][0]} [SEP]" for i in range(3))}
    assert len(trainer.encode_texts([("film",)] * 100, tokenizer, make_config(steps=1))) == 16 + 4, "no more than read"


def test_no_text_of_a_protected_domain_is_read(make_config, tmp_path):
    own = write_domain(tmp_path / "own.jsonl", 40, seed=0, prefix="source ")
    protected = write_domain(tmp_path / "protected.jsonl", 40, seed=1, prefix="target ")
    leaked = tmp_path / "leaked.txt"
    leaked.write_text("".join(f"{json.loads(line)['text'].upper()}!\n" for line in protected.read_text().splitlines()))
    config = make_config(text=(str(own), str(leaked)))
    read, kept = trainer.read_texts(config), trainer.read_texts(dataclasses.replace(config, protect=(str(protected),)))
    assert len(kept) < len(read) and any("TARGET" in text for (text,) in read)
    assert list(kept) == [text for text in read if "TARGET" not in text[0]]
    with pytest.raises(UsageError, match="no text can be used"):
        trainer.read_texts(make_config(text=(str(leaked),), protect=(str(protected),)))


def test_an_embedding_that_is_wider_than_the_teachers_is_refused(make_config):
    with pytest.raises(UsageError, match="embedding_size"):
        pretrain(make_config(embedding_size=500))


def test_the_command_writes_a_student(text_file, encoder_folder, tmp_path):
    flags = ["--text", str(text_file), "--teacher", str(encoder_folder), "--output-dir", str(tmp_path / "made")]
    flags += ["--steps=2", "--max-length=32", "--embedding-size=8", "--hidden-size=16", "--layers=1"]
    result = CliRunner().invoke(app, ["pretrain", *flags])
    assert result.exit_code == 0, result.exception
    assert "l2a distill --student" in result.stdout and "40 texts of 1 file" in result.stderr
    assert "l2a pretrain --output-dir made --text" in (tmp_path / "made" / "README.md").read_text()


def draw(count, width, seed):
    return torch.randn(2, count, width, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 6), st.integers(2, 5), st.integers(0, 10_000))
def test_losses_are_zero_only_for_the_teachers_directions(count, width, seed):
    predicted, target = draw(count, width, seed)
    for loss in (cosine_distance, similarity_loss):
        assert loss(3.0 * target, target).item() < 1e-5
        assert loss(predicted, target).item() >= -1e-6
    assert cosine_distance(predicted, target).item() > 1e-4


def test_similarity_loss_ignores_rotation_and_penalises_other_neighbours():
    (predicted, target), (square, _) = draw(6, 4, 1), draw(4, 4, 2)
    assert similarity_loss(target @ torch.linalg.qr(square)[0], target).item() < 1e-4
    assert similarity_loss(predicted, target).item() > 0.1


def test_similarity_loss_of_one_text_is_zero_with_a_gradient_path():
    predicted = torch.ones(1, 3, requires_grad=True)
    loss = similarity_loss(predicted, torch.ones(1, 3))
    loss.backward()
    assert loss.item() == 0.0 and predicted.grad is not None


def test_padding_does_not_change_the_losses(make_config):
    config = make_config()
    teacher, model = untrained(config)
    batch = trainer.encode_texts([("good film",), ("a bad bad story",)], teacher.tokenizer, config).padded(np.arange(2))
    wider = {name: torch.nn.functional.pad(value, (0, 5)) for name, value in batch.items()}
    first, second = (trainer.distillation_losses(model, teacher, one)["total"].item() for one in (batch, wider))
    assert first == pytest.approx(second, abs=1e-5)
