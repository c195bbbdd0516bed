import copy

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedTokenizerFast,
)

from l2a.config import StudentConfig
from l2a.data.encoding import encode
from l2a.generator.tokens import vocabulary
from l2a.kd.trainer import run_student
from l2a.student import student as presets
from l2a.student.student import build_student, choose_tokens, count_tokens, keep_tokens, needed_tokens
from l2a.teacher import model
from l2a.teacher.model import load_encoder, load_fine_tuned
from tests.conftest import LABELS, tiny_bert_config
from tests.student.conftest import CHARACTERS, SPECIALS, WORDS, make_student


@pytest.fixture(scope="session")
def full(large_folder):
    return AutoTokenizer.from_pretrained(large_folder)


@pytest.fixture(scope="session")
def kept(full, domain_texts):
    """The ids of a vocabulary too small for every character."""
    return choose_tokens(full, count_tokens(full, domain_texts), 200)


@pytest.fixture(scope="session")
def pruned(full, kept):
    return keep_tokens(full, kept)


def unknown(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"].count(tokenizer.unk_token_id)


def test_every_token_keeps_its_text_under_its_new_number(full, kept, pruned):
    assert len(pruned) == len(kept) == 200
    assert vocabulary(pruned) == tuple(full.convert_ids_to_tokens(kept.tolist()))
    assert sorted(pruned.get_vocab().values()) == list(range(200))
    assert pruned.is_fast


KNOWN = [character for character in CHARACTERS if character.isascii() or character == "ж"]


@given(st.text(alphabet=[*KNOWN, " "], max_size=60))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_text_of_known_characters_still_splits_into_pieces(full, pruned, text):
    assert unknown(pruned, text) == unknown(full, text)
    pieces = ["".join(one.tokenize(text)).replace("##", "") for one in (full, pruned)]
    assert pieces[0] == pieces[1]


def test_words_of_the_texts_stay_whole_and_others_split(full, pruned, domain_texts):
    used = {word for (text,) in domain_texts for word in text.split()}
    assert all(len(pruned.tokenize(word)) == 1 for word in used)
    foreign = next(word for word in WORDS if word not in pruned.get_vocab())
    assert len(full.tokenize(foreign)) == 1 < len(pruned.tokenize(foreign))


def test_the_most_frequent_tokens_stay(full, domain_texts):
    counts = count_tokens(full, domain_texts)
    needed = needed_tokens(full, counts)
    room = 10
    kept = choose_tokens(full, counts, int(needed.sum()) + room)
    chosen = np.setdiff1d(kept, np.flatnonzero(needed))
    assert len(chosen) == room
    assert counts[chosen].min() >= np.delete(counts, kept).max() > 0


@pytest.mark.parametrize(("size", "stays"), [(200, False), (600, True)])
def test_characters_that_no_text_shows_stay_where_there_is_room(full, domain_texts, size, stays):
    tokens = set(full.convert_ids_to_tokens(choose_tokens(full, count_tokens(full, domain_texts), size).tolist()))
    assert {"ж", "##ж", "a", "##a", "7", "##7"} <= tokens
    assert ({"中", "##中", "語", "##語"} <= tokens) == stays
    assert not any(token.startswith("[unused") for token in tokens)


@pytest.mark.parametrize("kind", ["of its architecture", "of any architecture"])
def test_special_tokens_frame_single_texts_and_pairs(kind, full, kept):
    if kind == "of any architecture":
        names = {
            name: getattr(full, name) for name in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
        }
        full = PreTrainedTokenizerFast(tokenizer_object=full.backend_tokenizer, **names)
    pruned = keep_tokens(full, kept)
    assert set(full.all_special_tokens) == set(pruned.all_special_tokens)
    encoded = pruned("kada", "kada !", return_token_type_ids=True)
    assert pruned.convert_ids_to_tokens(encoded["input_ids"]) == ["[CLS]", "kada", "[SEP]", "kada", "!", "[SEP]"]
    assert encoded["token_type_ids"] == [0, 0, 0, 1, 1, 1]
    assert (pruned.cls_token_id, pruned.sep_token_id) == (encoded["input_ids"][0], encoded["input_ids"][-1])
    assert pruned.decode(encoded["input_ids"], skip_special_tokens=True).replace(" !", "!") == "kada kada!"


def test_tokens_that_were_added_to_the_vocabulary_stay(full, domain_texts):
    full = copy.deepcopy(full)
    full.add_tokens(["<user>"])
    counts = count_tokens(full, [*domain_texts, ("kada <user> !",)])
    pruned = keep_tokens(full, choose_tokens(full, counts, 200))
    assert pruned.tokenize("kada <user> !") == ["kada", "<user>", "!"]
    assert sorted(pruned.get_vocab().values()) == list(range(200))
    assert pruned.convert_tokens_to_ids("<user>") == 199


def test_texts_count_both_sides_of_pairs(full):
    counts = count_tokens(full, [("kada baba", "kada"), ("zuba zuba !", "ж")])
    found = {full.convert_ids_to_tokens(int(index)): int(counts[index]) for index in np.flatnonzero(counts)}
    assert found["kada"] == 2
    assert sum(found.values()) == sum(len(full.tokenize(side)) for side in ("kada baba", "kada", "zuba zuba !", "ж"))


def kept_ids(student, teacher):
    return teacher.tokenizer.convert_tokens_to_ids(list(vocabulary(student.tokenizer)))


def test_kept_tokens_and_layers_are_the_teachers(large_teacher, domain_texts):
    student = make_student("pruned", large_teacher, domain_texts)
    ids = kept_ids(student, large_teacher)
    assert SPECIALS[0] in student.tokenizer.get_vocab()
    assert 0 < len(ids) < len(large_teacher.tokenizer)
    assert torch.equal(student.word_embeddings(), large_teacher.word_embeddings()[ids])
    ours, theirs = (body.encoder.layer[0] for body in (student.model.bert, large_teacher.encoder))
    assert torch.equal(ours.output.dense.weight, theirs.output.dense.weight)
    assert torch.equal(ours.attention.self.value.weight, theirs.attention.self.value.weight)


def test_the_first_token_of_a_cut_teacher_sees_every_word(large_teacher, domain_texts):
    with torch.no_grad():  # real encoders' states are small, and far from 0 in some entries
        large_teacher.encoder.encoder.layer[0].output.LayerNorm.weight.mul_(0.05)
        large_teacher.encoder.encoder.layer[0].output.LayerNorm.bias[3] = 8.0
    student = make_student("pruned", large_teacher, domain_texts)
    features = run_student(student, encode(student.tokenizer, domain_texts[:100], 32))[1]
    assert np.abs(features.mean(axis=0)).mean() < 0.05 < features.std(axis=0).mean()
    (text,) = domain_texts[0]
    turned = (" ".join(reversed(text.split())),)
    changed = run_student(student, encode(student.tokenizer, [(text,), turned, domain_texts[1]], 32))[1]
    assert np.linalg.norm(changed[0] - changed[1]) < 0.5 * np.linalg.norm(changed[0] - changed[2])


@pytest.mark.parametrize("kind", ["distilbert", "fine-tuned"])
def test_other_teachers_of_the_family_are_cut_too(kind, full, domain_texts, tmp_path):
    full.save_pretrained(tmp_path)
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    if kind == "distilbert":
        config = DistilBertConfig(vocab_size=len(full), dim=64, hidden_dim=128, n_layers=4, n_heads=2)
        DistilBertModel(config).save_pretrained(tmp_path)
        teacher = load_encoder(str(tmp_path), LABELS, seed=0)
    else:
        BertForSequenceClassification(tiny_bert_config(full, num_hidden_layers=4, **names)).save_pretrained(tmp_path)
        teacher = load_fine_tuned(str(tmp_path), LABELS)
    student = build_student(StudentConfig("pruned", max_share=0.5), teacher, LABELS, domain_texts, seed=0)
    assert student.model.config.num_hidden_layers < 4
    ids = kept_ids(student, teacher)
    expected = teacher.encoder.get_input_embeddings().weight[ids]
    assert torch.equal(student.word_embeddings(), expected)
    assert run_student(student, encode(student.tokenizer, domain_texts[:4], 32))[1].std(axis=0).mean() > 0


@pytest.fixture
def packaged(monkeypatch, encoder_folder):
    """Lets the packaged encoders be a tiny one."""
    locate = model.locate
    monkeypatch.setattr(
        model, "locate", lambda name, *more: str(encoder_folder) if name in model.PACKAGED else locate(name, *more)
    )


def test_a_packaged_encoder_is_kept_whole_over_the_tokens_that_fit(
    packaged, large_teacher, domain_texts, encoder_folder
):
    config = StudentConfig("bert-tiny", max_share=0.9)
    student = build_student(config, large_teacher, LABELS, domain_texts, seed=0)
    original = load_encoder(str(encoder_folder), LABELS, 0)
    for name, value in original.encoder.encoder.state_dict().items():
        assert torch.equal(student.model.base_model.encoder.state_dict()[name], value)
    token = student.tokenizer.convert_ids_to_tokens(9)
    theirs = original.word_embeddings()[original.tokenizer.convert_tokens_to_ids(token)]
    assert torch.equal(student.word_embeddings()[9], theirs)


@pytest.mark.parametrize(("room", "preset"), [(1, "minilm-l6"), (10**9, "narrow")])
def test_auto_is_minilm_where_its_layers_fit_and_narrow_elsewhere(room, preset, large_teacher, monkeypatch):
    monkeypatch.setattr(presets, "ROOM_FOR_MINILM", room)
    assert presets.resolve_preset(StudentConfig(), large_teacher).preset == preset
    for width in (128, 384):
        small = presets.wants_small_rate(StudentConfig(), large_teacher, width)
        assert small == (preset == "minilm-l6" and width == 384)
    assert presets.wants_small_rate(StudentConfig(model="a checkpoint of the user"), large_teacher, 384)
