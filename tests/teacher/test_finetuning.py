"""The two stages of fine-tuning, and the frozen layers that are run once for a text."""

import dataclasses
import errno
from pathlib import Path

import numpy as np
import pytest
import torch

from l2a.config import TeacherConfig
from l2a.teacher import finetune as states
from l2a.teacher.finetune import fine_tune, fine_tuned, frozen_layers, lower_states, upper_layers
from l2a.teacher.labelling import TeacherOutputs, cached_labeller, predict, refuse_useless_teacher, run_teacher
from l2a.teacher.model import PACKAGED, Teacher, check_teacher, load_encoder, load_fine_tuned
from l2a.util import SILENT, Checkpoint, RunError, UsageError
from tests.conftest import ARCHITECTURES, LABELS, make_examples, plain_tokenizer, save_tiny

CONFIG = TeacherConfig(learning_rate=2e-3, head_learning_rate=5e-3, batch_size=16, frozen_layers=0)


def test_a_teacher_learns_the_task(teacher, examples):
    fine_tune(teacher, examples, CONFIG, 8, 24, 0, "train")
    fresh = make_examples(60, seed=9)
    assert (predict(teacher, fresh.inputs, 24).logits.argmax(1) == fresh.labels).mean() > 0.8


def test_a_killed_fine_tuning_goes_on_to_the_same_teacher(
    encoder_folder, examples, tmp_path, monkeypatch, saved_after_every_step
):
    config, real, steps = TeacherConfig(frozen_layers=1), torch.optim.AdamW.step, []

    def step(optimizer):
        steps.append(1)
        if len(steps) == 16 + 7:  # the whole training takes the first 16
            raise KeyboardInterrupt
        return real(optimizer)

    def run(name):
        monkeypatch.setenv("L2A_CACHE", str(tmp_path / f"cache of {name}"))
        base = load_encoder(str(encoder_folder), LABELS, seed=0)
        progress = SILENT.keeping(Checkpoint(tmp_path / name, {}))
        return fine_tuned(base, examples.take(range(48)), config, 4, 24, 0, "teacher", progress).state_dict()

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("killed")
    again = run("killed")
    assert len(steps) == 16 + 1 + 16 and all(torch.equal(again[name], value) for name, value in whole.items())


@pytest.mark.parametrize("count", [1, 17])
def test_fewer_examples_than_a_batch_train(teacher, examples, count):
    before = teacher.head.weight.clone()
    fine_tune(teacher, examples.take(range(count)), CONFIG, 1, 24, 0, "train")
    assert not torch.equal(before, teacher.head.weight) and not teacher.training


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
    models = (load_fine_tuned(str(classifier_folder), names) for names in (LABELS, LABELS[::-1]))
    ours, as_saved = (predict(model, make_examples(5).inputs, 24).logits for model in models)
    assert np.allclose(ours, as_saved[:, ::-1], atol=1e-5)


def test_a_teacher_below_chance_is_refused_and_one_that_no_label_judges_is_warned_of(examples, caplog):
    def wrong(inputs):
        logits = np.eye(2, dtype=np.float32)[1 - examples.labels]
        return TeacherOutputs(logits, np.zeros((len(inputs), 2), np.float32))

    with pytest.raises(RunError, match="right on 0% of 96"):
        refuse_useless_teacher(wrong, examples)
    assert not caplog.messages and refuse_useless_teacher(wrong, examples.take([])) is None
    assert "no label is held out" in caplog.text


def test_pairs_use_both_sides(teacher):
    one, other = predict(teacher, [("good film", "it was bad"), ("good film", "it was lovely")], 24).logits
    assert not np.allclose(one, other)


EXAMPLES = make_examples(12)
PAIRS = make_examples(8, pairs=True)


@pytest.fixture
def runs(monkeypatch):
    """Counts how often frozen layers are run over texts."""
    counted, run = [], states._run_frozen
    monkeypatch.setattr(states, "_run_frozen", lambda *arguments: counted.append(1) or run(*arguments))
    return counted


@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if kind != "albert"])  # whose layers are one
def test_the_upper_layers_over_kept_states_are_the_whole_model_and_alone_are_trained(kind, tokenizer, tmp_path):
    """All that the kept states depend on stays, also what all layers share, such as MPNet's relative positions."""
    teacher = load_encoder(str(save_tiny(kind, tmp_path / kind, plain_tokenizer(tokenizer))), LABELS, seed=0)
    kept = lower_states(teacher, 1, PAIRS.inputs, 32)
    parts, whole = run_teacher(upper_layers(teacher, 1), kept), predict(teacher, PAIRS.inputs, 32)
    assert np.allclose(parts.logits, whole.logits, atol=2e-2)
    assert np.allclose(parts.embeddings, whole.embeddings, atol=2e-2)
    lower, before = states.frozen_fingerprint(teacher, 1), teacher.fingerprint()
    fine_tune(teacher, PAIRS, TeacherConfig(frozen_layers=1), 1, 32, 0, "train")
    assert states.frozen_fingerprint(teacher, 1) == lower and teacher.fingerprint() != before


def test_states_are_computed_once_and_serve_repeated_and_reordered_texts(teacher: Teacher, runs):
    few = EXAMPLES.inputs[:5]
    first, again = lower_states(teacher, 1, few, 32), lower_states(teacher, 1, (*few, few[2]), 32)
    assert len(runs) == 1
    batch, copy = first.padded(np.array([2])), again.padded(np.array([5]))
    assert all(torch.equal(batch[name], copy[name]) for name in ("inputs_embeds", "attention_mask"))
    lower_states(teacher, 1, few[::-1], 32)
    lower_states(teacher, 1, few, 16)
    assert len(runs) == 3


def test_the_states_stay_valid_while_the_upper_layers_are_trained(teacher: Teacher, runs):
    fine_tune(teacher, EXAMPLES, TeacherConfig(frozen_layers=1), 1, 32, 0, "train")
    whole = predict(teacher, EXAMPLES.inputs, 32)
    labelled = cached_labeller(teacher, 32, frozen=1)(EXAMPLES.inputs)
    assert np.allclose(labelled.logits, whole.logits, atol=2e-2)
    assert len(runs) == 1


def test_a_model_that_computes_something_else_from_its_states_is_run_whole(teacher: Teacher, monkeypatch):
    monkeypatch.setattr(states, "TOLERANCE", -1.0)
    assert lower_states(teacher, 1, EXAMPLES.inputs, 32) is None
    fine_tune(teacher, EXAMPLES, TeacherConfig(frozen_layers=1), 1, 32, 0, "train")


@pytest.mark.parametrize(("frozen", "only_kept"), [(1, True), (0, False), (2, False)])
def test_nothing_is_run_for_kept_states_alone_or_with_layers_on_one_side(frozen, only_kept, teacher: Teacher, runs):
    assert lower_states(teacher, frozen, EXAMPLES.inputs, 32, only_kept=only_kept) is None
    assert not runs


@pytest.mark.parametrize(
    ("depth", "wanted", "frozen"),
    [(12, "auto", 8), (6, "auto", 2), (2, "auto", 0), (2, 5, 1), (2, 0, 0), (2, None, None)],
)
def test_two_thirds_of_a_deep_model_and_a_third_of_another_are_frozen(depth, wanted, frozen, tokenizer, tmp_path):
    folder = save_tiny("bert", tmp_path, plain_tokenizer(tokenizer), num_hidden_layers=depth)
    assert frozen_layers(check_teacher(TeacherConfig(str(folder)), LABELS, 16), wanted) == frozen


def test_a_full_disk_is_named_and_leaves_nothing(teacher: Teacher, private_cache: Path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np.lib.format, "open_memmap", full)
    with pytest.raises(RunError, match="the disk is full"):
        lower_states(teacher, 1, EXAMPLES.inputs, 32)
    assert not list(private_cache.rglob("*.npy"))


def test_packaged_models_are_pinned_and_offered_where_a_name_is_mistyped():
    assert set(PACKAGED) == {"minilm-l6", "mpnet-base", "bert-tiny"}
    assert len(PACKAGED["mpnet-base"].parts) == 5
    assert all(member.startswith(packaged.folder) for packaged in PACKAGED.values() for member in packaged.members)
    with pytest.raises(UsageError, match="did you mean 'mpnet-base'"):
        check_teacher(TeacherConfig("mpnetbase"), LABELS, 16)
