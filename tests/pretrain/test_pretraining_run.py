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
from l2a.pretrain.trainer import PretrainConfig, TeacherTargets, pretrain
from l2a.teacher.model import load_encoder, mean_pool
from l2a.util.errors import RunError, UsageError
from l2a.util.files import NEW

MakeConfig = Callable[..., PretrainConfig]
CPU = torch.device("cpu")


def label(config: PretrainConfig) -> TeacherTargets:
    teacher = load_encoder(config.teacher, ("0", "1"), seed=0)
    return trainer.label_texts(teacher, trainer.read_corpus(config), config.max_length, CPU)


def mean_loss(config: PretrainConfig, targets: TeacherTargets, model: trainer.GeneralStudent) -> float:
    with torch.no_grad():
        return trainer.step_losses(model, targets, np.arange(len(targets.encoded)))["total"].item()


def test_the_student_is_an_ordinary_classifier_folder(make_config: MakeConfig, private_cache: Path) -> None:
    folder = pretrain(make_config(checkpoint_every=2))
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    inputs = AutoTokenizer.from_pretrained(folder)("a good film", return_tensors="pt")
    assert model(**inputs).logits.shape == (1, 3)
    assert model.dtype == torch.float32
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.float16}
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    assert (tokenizer["truncation"], tokenizer["padding"]) == (None, None)
    assert AutoTokenizer.from_pretrained(folder).model_max_length == model.config.max_position_embeddings
    assert "l2a pretrain" in (folder / "README.md").read_text()
    assert not list((private_cache / "checkpoints").iterdir())


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


def trained(config: PretrainConfig) -> Path:
    """Train as far as the last checkpoint, without writing the student."""
    targets, teacher = label(config), load_encoder(config.teacher, ("0", "1"), seed=0)
    checkpoint = trainer.checkpoint_folder(config, targets)
    trainer.train(trainer.start_student(teacher, targets, config), targets, config, checkpoint)
    return checkpoint


def test_a_run_killed_while_it_saved_goes_on(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(checkpoint_every=2)
    checkpoint = trained(config)
    (checkpoint / f".{trainer.CHECKPOINT}{NEW}moved").write_bytes(b"half")
    monkeypatch.setattr(trainer, "_step", lambda *arguments: pytest.fail("trained again"))
    pretrain(config)
    assert not list(checkpoint.parent.iterdir())


def test_other_settings_start_anew(make_config: MakeConfig) -> None:
    config = make_config(checkpoint_every=2)
    checkpoint, targets = trained(config), label(config)
    same = dataclasses.replace(config, checkpoint_every=50, overwrite=True)
    assert trainer.checkpoint_folder(same, targets) == checkpoint
    for change in ({"learning_rate": 1e-4}, {"seed": 1}, {"output_dir": Path("elsewhere")}):
        assert trainer.checkpoint_folder(dataclasses.replace(config, **change), targets) != checkpoint


def test_a_checkpoint_is_one_file_without_pickle(make_config: MakeConfig) -> None:
    (path,) = trained(make_config(checkpoint_every=6)).iterdir()
    assert path.suffix == ".safetensors" and load_file(path)["steps_done"] == 6


def test_an_output_folder_with_other_files_is_left_alone(make_config: MakeConfig) -> None:
    config = make_config()
    config.output_dir.mkdir()
    for name in ("thesis.tex", ".checkpoint.mine"):
        (config.output_dir / name).write_text("precious")
    with pytest.raises(UsageError, match="holds other files"):
        pretrain(config)
    assert {path.read_text() for path in config.output_dir.iterdir() if path.name[1:4] != "l2a"} == {"precious"}
    assert (config.output_dir / ".checkpoint.mine").exists()


def test_a_finished_student_is_replaced_only_when_asked(make_config: MakeConfig) -> None:
    pretrain(make_config(steps=1))
    with pytest.raises(UsageError, match="--overwrite"):
        pretrain(make_config(steps=2))
    assert "--steps 2" in (pretrain(make_config(steps=2, overwrite=True)) / "README.md").read_text()


def test_training_brings_the_student_nearer_to_the_teacher(make_config: MakeConfig) -> None:
    config = make_config(steps=60, learning_rate=3e-3)
    targets, teacher = label(config), load_encoder(config.teacher, ("0", "1"), seed=0)
    fitted = trainer.start_student(teacher, targets, config)
    model = trainer.GeneralStudent(fitted.classifier, teacher.hidden_size, seed=0)
    before = mean_loss(config, targets, model)
    trainer.train(model, targets, config, config.output_dir / "checkpoint")
    assert mean_loss(config, targets, model) < 0.6 * before


def test_fitted_projections_start_nearer_than_random_ones(make_config: MakeConfig) -> None:
    config = make_config()
    targets, teacher = label(config), load_encoder(config.teacher, ("0", "1"), seed=0)
    model = trainer.start_student(teacher, targets, config)
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
    first = label(make_config())

    class LabelledAgainError(Exception):
        pass

    def refuse(*_: object) -> None:
        raise LabelledAgainError

    monkeypatch.setattr(trainer, "_write_batch", refuse)
    assert np.array_equal(label(make_config()).states(7), first.states(7))
    other = not trainer.has_fast_bfloat16(torch.device("cpu"))
    for change in ("RECIPE", "has_fast_bfloat16"):  # another version of the code, another arithmetic
        with monkeypatch.context() as changed, pytest.raises(LabelledAgainError):
            changed.setattr(trainer, change, 99 if change == "RECIPE" else lambda device: other)
            label(make_config())


def test_a_diverged_loss_ends_the_run() -> None:
    with pytest.raises(RunError, match=r"step 3 is not finite \(token nan, total nan\)"):
        trainer._check_and_log({name: torch.tensor(float("nan")) for name in ("token", "total")}, 3, trainer.SILENT)


def test_batches_hold_every_text_once_within_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(3, 60, 500)
    batches = trainer.epoch_batches(lengths, 256, np.random.default_rng(1))
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    assert max(len(batch) * lengths[batch].max() for batch in batches) <= 256


@pytest.mark.parametrize("first", [0, 3, 17, 40])
def test_the_batches_of_a_resumed_run_are_those_of_a_whole_one(first: int) -> None:
    lengths = np.random.default_rng(0).integers(3, 30, 60)
    whole = list(trainer.batch_stream(lengths, 128, seed=0, first_step=0, last_step=45))
    rest = list(trainer.batch_stream(lengths, 128, seed=0, first_step=first, last_step=45))
    assert len(whole) == 45
    assert all(np.array_equal(a, b) for a, b in zip(whole[first:], rest, strict=True))


def test_the_rate_warms_up_and_falls_to_nearly_zero(make_config: MakeConfig) -> None:
    config = make_config(steps=100)
    rates = [trainer.learning_rate(step, config) for step in range(100)]
    assert max(rates) == rates[4] == config.learning_rate
    assert rates == [*sorted(rates[:5]), *sorted(rates[5:], reverse=True)]
    assert 0 < rates[-1] < 0.02 * config.learning_rate


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"text": ()}, {"max_length": 500}, {"learning_rate": float("nan")}, {"variants": -1}, {"heads": 3}],
)
def test_wrong_settings_are_refused(make_config: MakeConfig, wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        make_config(**wrong)
