"""The frozen layers of a teacher are run once for a text; everything after reads their states and gives the same."""

import errno
from pathlib import Path

import numpy as np
import pytest
import torch

from l2a.config import TeacherConfig
from l2a.teacher import finetune as states
from l2a.teacher.finetune import fine_tune, frozen_layers, lower_states, upper_layers
from l2a.teacher.labelling import cached_labeller, predict, run_teacher
from l2a.teacher.model import PACKAGED, Teacher, check_teacher, load_encoder
from l2a.util.errors import RunError, UsageError
from tests.conftest import ARCHITECTURES, LABELS, make_examples, plain_tokenizer, save_tiny

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
    parts = run_teacher(upper_layers(teacher, 1), kept)
    whole = predict(teacher, PAIRS.inputs, 32)
    assert np.allclose(parts.logits, whole.logits, atol=2e-2)
    assert np.allclose(parts.embeddings, whole.embeddings, atol=2e-2)
    lower, before = states.frozen_fingerprint(teacher, 1), teacher.fingerprint()
    fine_tune(teacher, PAIRS, TeacherConfig(frozen_layers=1), 1, 32, 0, "train")
    assert states.frozen_fingerprint(teacher, 1) == lower and teacher.fingerprint() != before


def test_states_are_computed_once_and_serve_repeated_and_reordered_texts(teacher: Teacher, runs):
    few = EXAMPLES.inputs[:5]
    first = lower_states(teacher, 1, few, 32)
    again = lower_states(teacher, 1, (*few, few[2]), 32)
    assert len(runs) == 1
    batch, copy = first.padded(np.array([2])), again.padded(np.array([5]))
    assert torch.equal(batch["inputs_embeds"], copy["inputs_embeds"])
    assert torch.equal(batch["attention_mask"], copy["attention_mask"])
    lower_states(teacher, 1, few[::-1], 32)
    lower_states(teacher, 1, few, 16)
    assert len(runs) == 3


def test_nothing_is_run_where_only_kept_states_are_wanted(teacher: Teacher, runs):
    assert lower_states(teacher, 1, EXAMPLES.inputs, 32, only_kept=True) is None
    assert not runs


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


@pytest.mark.parametrize("frozen", [0, 2])
def test_without_a_layer_below_or_above_no_states_are_kept(frozen, teacher: Teacher, runs):
    assert lower_states(teacher, frozen, EXAMPLES.inputs, 32) is None
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
    assert not [path for path in private_cache.rglob("*.npy")]


def test_packaged_models_are_pinned_and_offered_where_a_name_is_mistyped():
    assert set(PACKAGED) == {"minilm-l6", "mpnet-base", "bert-tiny"}
    assert len(PACKAGED["mpnet-base"].parts) == 5
    assert all(member.startswith(packaged.folder) for packaged in PACKAGED.values() for member in packaged.members)
    with pytest.raises(UsageError, match="did you mean 'mpnet-base'"):
        check_teacher(TeacherConfig("mpnetbase"), LABELS, 16)
