import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from l2a.pretrain import trainer
from l2a.pretrain.corpus import PretrainConfig, read_corpus
from l2a.pretrain.student import TeacherTargets, label_texts
from l2a.pretrain.trainer import batch_stream, epoch_batches, pretrain, start_student
from l2a.teacher.load import load_encoder
from l2a.teacher.model import mean_pool
from l2a.util.errors import RunError, UsageError

MakeConfig = Callable[..., PretrainConfig]
CPU = torch.device("cpu")


def label(config: PretrainConfig) -> TeacherTargets:
    teacher = load_encoder(config.teacher, ("0", "1"), seed=0)
    return label_texts(teacher, read_corpus(config), config, CPU)


def mean_loss(config: PretrainConfig, targets: TeacherTargets, model: trainer.GeneralStudent) -> float:
    batch = np.arange(len(targets.encoded))
    inputs = targets.encoded.padded(batch)
    with torch.no_grad():
        losses = trainer.step_losses(model, inputs, targets.padded_hidden(batch, inputs["input_ids"].shape[1]))
    return losses.total.item()


def test_the_student_is_an_ordinary_classifier_folder(make_config: MakeConfig) -> None:
    folder = pretrain(make_config())
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    inputs = AutoTokenizer.from_pretrained(folder)("a good film", return_tensors="pt")
    assert model(**inputs).logits.shape == (1, 3)
    assert model.dtype == torch.float32
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.float16}
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    assert (tokenizer["truncation"], tokenizer["padding"]) == (None, None)
    assert AutoTokenizer.from_pretrained(folder).model_max_length == model.config.max_position_embeddings
    assert "l2a pretrain" in (folder / "README.md").read_text()
    assert not (folder / "checkpoint").exists()


def test_equal_settings_give_equal_students_and_another_seed_another(make_config: MakeConfig, tmp_path: Path) -> None:
    folders = [
        pretrain(make_config(output_dir=tmp_path / name, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    first, again, other = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("kill_after", [2, 5])
def test_a_killed_run_resumes_to_the_same_student(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_after: int
) -> None:
    whole = pretrain(make_config(output_dir=tmp_path / "whole"))
    config = make_config(output_dir=tmp_path / "killed", checkpoint_every=2)
    step, done = trainer._step, []

    def dying(*arguments: object) -> object:
        if len(done) == kill_after:
            raise KeyboardInterrupt
        done.append(1)
        return step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer, "_step", dying)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config)
    monkeypatch.setattr(trainer, "_step", step)
    resumed = load_file(pretrain(config) / "model.safetensors")
    expected = load_file(whole / "model.safetensors")
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


@pytest.mark.parametrize("left", [".checkpoint.half", ".checkpoint.old.moved"])
def test_a_run_killed_while_it_saved_goes_on(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    config = make_config(checkpoint_every=2)
    targets, teacher = label(config), load_encoder(config.teacher, ("0", "1"), seed=0)
    checkpoint = config.output_dir / "checkpoint"
    trainer.train(start_student(teacher, targets, config), targets, config, checkpoint)
    if "old" in left:  # between the two moves that exchange a folder
        checkpoint.rename(config.output_dir / left)
    else:
        (config.output_dir / left).mkdir()
        (config.output_dir / left / "states.safetensors").write_bytes(b"half")
    monkeypatch.setattr(trainer, "_step", lambda *arguments: pytest.fail("trained again"))
    folder = pretrain(config)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_checkpoint_of_other_settings_is_refused(make_config: MakeConfig) -> None:
    config = make_config(checkpoint_every=2)
    targets, teacher = label(config), load_encoder(config.teacher, ("0", "1"), seed=0)
    trainer.train(start_student(teacher, targets, config), targets, config, config.output_dir / "checkpoint")
    other = dataclasses.replace(config, learning_rate=1e-4)
    with pytest.raises(UsageError, match="other text, seed or settings"):
        pretrain(other)


def test_a_checkpoint_holds_no_pickle(make_config: MakeConfig) -> None:
    config = make_config(checkpoint_every=6)
    targets, teacher = label(config), load_encoder(config.teacher, ("0", "1"), seed=0)
    trainer.train(start_student(teacher, targets, config), targets, config, config.output_dir / "checkpoint")
    names = sorted(path.name for path in (config.output_dir / "checkpoint").iterdir())
    assert names == ["states.safetensors", "step.json"]
    assert json.loads((config.output_dir / "checkpoint" / "step.json").read_text())["step"] == 6


def test_an_output_folder_with_other_files_is_left_alone(make_config: MakeConfig) -> None:
    config = make_config()
    config.output_dir.mkdir()
    (config.output_dir / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="already holds thesis"):
        pretrain(config)
    assert (config.output_dir / "thesis.tex").read_text() == "precious"


def test_training_brings_the_student_nearer_to_the_teacher(make_config: MakeConfig) -> None:
    config = make_config(steps=60, learning_rate=3e-3)
    targets, teacher = label(config), load_encoder(config.teacher, ("0", "1"), seed=0)
    fitted = start_student(teacher, targets, config)
    model = trainer.GeneralStudent(fitted.classifier, teacher.hidden_size, seed=0)
    before = mean_loss(config, targets, model)
    trainer.train(model, targets, config, config.output_dir / "checkpoint")
    assert mean_loss(config, targets, model) < 0.6 * before


def test_fitted_projections_start_nearer_than_random_ones(make_config: MakeConfig) -> None:
    config = make_config()
    targets, teacher = label(config), load_encoder(config.teacher, ("0", "1"), seed=0)
    model = start_student(teacher, targets, config)
    fitted = mean_loss(config, targets, model)
    random = trainer.GeneralStudent(model.classifier, teacher.hidden_size, seed=0)
    assert fitted < 0.5 * mean_loss(config, targets, random)


def test_cached_states_are_the_teachers(make_config: MakeConfig) -> None:
    config = make_config()
    targets, teacher = label(config), load_encoder(config.teacher, ("0", "1"), seed=0)
    batch = np.array([0, 3, len(targets.encoded) - 1])
    inputs = targets.encoded.padded(batch)
    with torch.no_grad():
        expected = teacher.encoder(**inputs).last_hidden_state
    mask = inputs["attention_mask"]
    read = targets.padded_hidden(batch, mask.shape[1]).float()
    cosines = torch.cosine_similarity(mean_pool(read, mask), mean_pool(expected, mask))
    assert cosines.min() > 0.99
    assert not read[mask == 0].any()


def test_the_teacher_reads_a_corpus_once(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from l2a.pretrain import student as module

    first = label(make_config())
    monkeypatch.setattr(module, "_write_batch", lambda *_: pytest.fail("labelled again"))
    assert np.array_equal(label(make_config()).states(7), first.states(7))


def test_a_diverged_loss_ends_the_run(make_config: MakeConfig) -> None:
    with pytest.raises(RunError, match="not finite"):
        trainer._check_and_log(trainer.StepLosses(*(torch.tensor(float("nan")) for _ in range(3))), 0, trainer.SILENT)


def test_batches_hold_every_text_once_within_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(3, 60, 500)
    batches = epoch_batches(lengths, 256, np.random.default_rng(1))
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    assert max(len(batch) * lengths[batch].max() for batch in batches) <= 256


@pytest.mark.parametrize("first", [0, 3, 17, 40])
def test_the_batches_of_a_resumed_run_are_those_of_a_whole_one(first: int) -> None:
    lengths = np.random.default_rng(0).integers(3, 30, 60)
    whole = list(batch_stream(lengths, 128, seed=0, first_step=0, last_step=45))
    rest = list(batch_stream(lengths, 128, seed=0, first_step=first, last_step=45))
    assert len(whole) == 45
    assert all(np.array_equal(a, b) for a, b in zip(whole[first:], rest, strict=True))


def test_the_rate_warms_up_and_falls_to_nearly_zero(make_config: MakeConfig) -> None:
    config = make_config(steps=100)
    rates = [trainer.learning_rate(step, config) for step in range(100)]
    assert max(rates) == rates[4] == config.learning_rate
    assert rates == [*sorted(rates[:5]), *sorted(rates[5:], reverse=True)]
    assert 0 < rates[-1] < 0.02 * config.learning_rate


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"text": ()}, {"max_length": 500}, {"learning_rate": 0.0}, {"variants": -1}]
)
def test_wrong_settings_are_refused(make_config: MakeConfig, wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        make_config(**wrong)
