import copy

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from l2a.config import StudentConfig
from l2a.data.encoding import encode
from l2a.generator.tokens import vocabulary
from l2a.kd.trainer import run_student
from l2a.student import student as presets
from l2a.student.student import choose_tokens, count_tokens, keep_tokens, needed_tokens
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


def test_a_packaged_encoder_is_kept_whole_over_the_tokens_that_fit(large_teacher, domain_texts):
    student = make_student("bert-tiny", large_teacher, domain_texts)  # the packaged encoder is the teacher's
    ids = large_teacher.tokenizer.convert_tokens_to_ids(list(vocabulary(student.tokenizer)))
    assert SPECIALS[0] in student.tokenizer.get_vocab()
    assert 0 < len(ids) < len(large_teacher.tokenizer)
    assert torch.equal(student.word_embeddings(), large_teacher.word_embeddings()[ids])
    for name, value in large_teacher.encoder.encoder.state_dict().items():
        assert torch.equal(student.model.bert.encoder.state_dict()[name], value)


def test_the_features_of_a_packaged_encoder_start_centred(large_teacher, domain_texts):
    student = make_student("bert-tiny", large_teacher, domain_texts)
    features = run_student(student, encode(student.tokenizer, domain_texts[:100], 32))[1]
    assert np.abs(features.mean(axis=0)).mean() < 0.05 < features.std(axis=0).mean()


@pytest.mark.parametrize(("room", "preset"), [(1, "minilm-l6"), (10**9, "narrow")])
def test_auto_is_minilm_where_its_layers_fit_and_narrow_elsewhere(room, preset, large_teacher, monkeypatch):
    monkeypatch.setattr(presets, "ROOM_FOR_MINILM", room)
    assert presets.resolve_preset(StudentConfig(), large_teacher).preset == preset
    for width in (128, 384):
        small = presets.wants_small_rate(StudentConfig(), large_teacher, width)
        assert small == (preset == "minilm-l6" and width == 384)
    assert presets.wants_small_rate(StudentConfig(model="a checkpoint of the user"), large_teacher, 384)
