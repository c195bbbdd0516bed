import dataclasses

import numpy as np
import pytest
import torch

from l2a.config import TeacherConfig
from l2a.teacher.finetune import fine_tune, fine_tuned
from l2a.teacher.labelling import TeacherOutputs, predict, refuse_useless_teacher
from l2a.teacher.model import load_encoder, load_fine_tuned, locate
from l2a.util.errors import RunError, UsageError
from l2a.util.files import Checkpoint
from l2a.util.progress import SILENT
from tests.conftest import LABELS, make_examples

CONFIG = TeacherConfig(learning_rate=2e-3, head_learning_rate=5e-3, batch_size=16, frozen_layers=0)


def test_a_teacher_learns_the_task(teacher, examples):
    fine_tune(teacher, examples, CONFIG, 8, 24, 0, "train")
    fresh = make_examples(60, seed=9)
    assert (predict(teacher, fresh.inputs, 24).logits.argmax(1) == fresh.labels).mean() > 0.8


def test_a_killed_fine_tuning_goes_on_to_the_same_teacher(
    encoder_folder, examples, tmp_path, monkeypatch, saved_after_every_step
):
    config, real, steps = TeacherConfig(frozen_layers=1), torch.optim.AdamW.step, []

    def run(name, killed_at=None):
        def step(optimizer):
            steps.append(1)
            if len(steps) == killed_at:
                raise KeyboardInterrupt
            return real(optimizer)

        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        monkeypatch.setenv("L2A_CACHE", str(tmp_path / f"cache of {name}"))
        base = load_encoder(str(encoder_folder), LABELS, seed=0)
        progress = SILENT.keeping(Checkpoint(tmp_path / name, {}))
        return fine_tuned(base, examples.take(range(48)), config, 4, 24, 0, "teacher", progress).state_dict()

    whole = run("whole")
    total, steps[:] = len(steps), []
    with pytest.raises(KeyboardInterrupt):
        run("killed", killed_at=7)
    steps.pop()
    again = run("killed")
    assert len(steps) == total and all(torch.equal(again[name], value) for name, value in whole.items())


@pytest.mark.parametrize("count", [1, 17])
def test_fewer_examples_than_a_batch_train(teacher, examples, count):
    before = teacher.head.weight.clone()
    fine_tune(teacher, examples.take(range(count)), CONFIG, 1, 24, 0, "train")
    assert not torch.equal(before, teacher.head.weight)
    assert not teacher.training


@pytest.mark.parametrize("frozen", [1, None])
def test_frozen_parts_keep_their_weights_and_all_others_are_trained(teacher, examples, frozen):
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    fine_tune(teacher, examples.take(range(32)), dataclasses.replace(CONFIG, frozen_layers=frozen), 1, 24, 0, "train")
    changed = {name for name, value in teacher.state_dict().items() if not torch.equal(value, before[name])}
    lower = {name for name in before if frozen and ("embeddings" in name or "layer.0." in name)}
    assert not changed & lower and {name for name, _ in teacher.named_parameters()} - lower <= changed


def test_a_diverged_loss_names_its_batch(teacher, examples):
    teacher.head.weight.data[:] = float("nan")
    with pytest.raises(RunError, match=r"loss is nan at step 0, in the batch that begins with '.+', '.+', '.+'; lower"):
        fine_tune(teacher, examples, CONFIG, 1, 24, 0, "train")


def test_the_same_training_is_read_from_the_cache_and_other_settings_train_again(encoder_folder, monkeypatch):
    def train(config):
        base = load_encoder(str(encoder_folder), LABELS, 0)
        return fine_tuned(base, make_examples(32), config, 1, 24, 0, "train").fingerprint()

    first = train(CONFIG)
    others = [train(dataclasses.replace(CONFIG, **change)) for change in ({"learning_rate": 1e-3}, {"batch_size": 8})]
    assert len({first, *others}) == 3
    monkeypatch.setattr("l2a.teacher.finetune.fine_tune", lambda *rest: pytest.fail("trained again"))
    assert train(CONFIG) == first


def test_a_fine_tuned_model_is_brought_into_our_label_order(classifier_folder):
    ours = load_fine_tuned(str(classifier_folder), LABELS)
    as_saved = load_fine_tuned(str(classifier_folder), LABELS[::-1])
    texts = make_examples(5).inputs
    assert np.allclose(predict(ours, texts, 24).logits, predict(as_saved, texts, 24).logits[:, ::-1], atol=1e-5)


def test_a_missing_folder_is_named():
    with pytest.raises(UsageError, match="no such folder"):
        locate("./nowhere")


def test_a_teacher_below_chance_is_refused_and_one_that_no_label_judges_is_warned_of(examples, caplog):
    def wrong(inputs):
        logits = np.eye(2, dtype=np.float32)[1 - examples.labels]
        return TeacherOutputs(logits, np.zeros((len(inputs), 2), np.float32))

    with pytest.raises(RunError, match="right on 0% of 96"):
        refuse_useless_teacher(wrong, examples)
    assert not caplog.messages and np.isnan(refuse_useless_teacher(wrong, examples.take([])))
    assert "no label is held out" in caplog.text


def test_pairs_use_both_sides(teacher):
    one = predict(teacher, [("good film", "it was bad")], 24).logits
    other = predict(teacher, [("good film", "it was lovely")], 24).logits
    assert not np.allclose(one, other)
