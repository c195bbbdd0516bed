"""Students: presets, what they start from, and vocabularies that lose tokens."""

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from sklearn.linear_model import Ridge
from torch import nn
from transformers import AutoTokenizer

from l2a.config import StudentConfig
from l2a.data.encoding import encode
from l2a.generator.tokens import vocabulary
from l2a.kd.trainer import embedding_gradients, run_student
from l2a.report.run_folder import export_student
from l2a.student import student as presets
from l2a.student.student import build_student, choose_tokens, count_tokens, keep_tokens
from l2a.teacher.labelling import predict
from l2a.util import UsageError
from tests.conftest import LABELS, make_examples, plain_tokenizer
from tests.student.conftest import CHARACTERS, PRESETS, SPECIALS, WORDS, make_student

LOADING = """
import json, sys, torch
sys.modules["l2a"] = None
from transformers import AutoModelForSequenceClassification, AutoTokenizer
found = []
for folder in sys.argv[2:]:
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = [tokenizer(*sides, padding=True, return_tensors="pt") for sides in json.loads(sys.argv[1])]
    with torch.inference_mode():
        found.append([model.eval()(**batch).logits.tolist() for batch in inputs])
print(json.dumps(found))
"""


@pytest.mark.parametrize(("preset", "share"), [("narrow", 0.133), ("narrow", 0.6), ("bert-tiny", 0.95)])
def test_every_preset_fills_its_share_without_exceeding_it(preset, share, large_teacher, domain_texts):
    student = build_student(StudentConfig(preset, max_share=share), large_teacher, LABELS, domain_texts, seed=0)
    actual = student.parameters_count / large_teacher.parameters_count
    assert 0.7 * min(share, 0.3) < actual <= share
    assert student.model.config.id2label == dict(enumerate(LABELS))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_share_too_small_is_refused_with_one_that_holds(preset, large_teacher, domain_texts):
    config = StudentConfig(preset, max_share=0.004)
    with pytest.raises(UsageError, match=rf"student\.max_share: 0\.004 .* '{preset}' needs at least") as caught:
        build_student(config, large_teacher, LABELS, domain_texts, seed=0)
    share = float(re.search(r"raise student\.max_share to ([\d.]+),", str(caught.value))[1])
    build_student(dataclasses.replace(config, max_share=share), large_teacher, LABELS, domain_texts, seed=0)


@pytest.mark.slow
def test_every_preset_gives_the_same_logits_in_a_process_without_this_package(large_teacher, domain_texts, tmp_path):
    first, second = [text for (text,) in domain_texts[:5]], [text for (text,) in domain_texts[5:10]]
    students = [make_student(preset, large_teacher, domain_texts) for preset in PRESETS]
    for preset, student in zip(PRESETS, students, strict=True):
        export_student(student.model, student.tokenizer, tmp_path / preset, "# card", 64)
    done = subprocess.run(
        [sys.executable, "-c", LOADING, json.dumps([[first], [first, second]]), *(str(tmp_path / p) for p in PRESETS)],
        capture_output=True, text=True, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    for preset, student, found in zip(PRESETS, students, json.loads(done.stdout.splitlines()[-1]), strict=True):
        for inputs, logits in zip((zip(first, strict=True), zip(first, second, strict=True)), found, strict=True):
            expected = run_student(student, encode(student.tokenizer, list(inputs), 64))[0]
            assert np.allclose(expected, logits, atol=1e-4), preset


@pytest.mark.parametrize("preset", PRESETS)
def test_one_seed_gives_one_student_and_another_seed_another(preset, large_teacher, domain_texts):
    first, again, other = (make_student(preset, large_teacher, domain_texts, seed).snapshot() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_gives_gradients_at_its_word_embeddings(preset, large_teacher, domain_texts):
    student, inputs = make_student(preset, large_teacher, domain_texts), domain_texts[:6]
    gradients = embedding_gradients(student, lambda texts: predict(large_teacher, texts, 32), inputs, 32)
    lengths = encode(student.tokenizer, inputs, 32).lengths
    assert [gradient.shape for gradient in gradients] == [(n, student.word_embeddings().shape[1]) for n in lengths]
    assert all(np.abs(gradient).sum(axis=1).min() > 0 for gradient in gradients)


def test_a_fresh_student_starts_as_a_bag_of_words(large_teacher, domain_texts):
    """Ridge regression reads the mean word vector of unseen texts off its features; judged by the R^2."""
    student = make_student("narrow", large_teacher, domain_texts)
    encoded, vectors = encode(student.tokenizer, domain_texts, 32), student.word_embeddings().numpy()
    starts, ends = encoded.offsets[:-1], encoded.offsets[1:]
    bags = np.stack([vectors[encoded.ids[start:end]].mean(0) for start, end in zip(starts, ends, strict=True)])
    bags /= bags.std()
    features, half = run_student(student, encoded)[1], len(domain_texts) // 2
    reader = Ridge(alpha=0.01).fit(features[:half], bags[:half])
    assert reader.score(features[half:], bags[half:]) > 0.75


def test_a_checkpoint_of_the_user_is_taken(classifier_folder, large_teacher):
    student = build_student(StudentConfig(model=str(classifier_folder)), large_teacher, LABELS, (), seed=0)
    assert student.model.config.id2label == dict(enumerate(LABELS))


def test_features_times_output_layer_are_the_logits(student):
    logits, features = run_student(student, encode(student.tokenizer, make_examples(7).inputs, 24))
    weight, bias = student.output.weight.detach().numpy(), student.output.bias.detach().numpy()
    assert np.allclose(features @ weight.T + bias, logits, atol=1e-4)


def test_a_snapshot_restores_every_weight(student, built_student):
    saved = student.snapshot()
    for parameter in student.model.parameters():
        parameter.data += 1
    student.restore(saved)
    assert all(torch.equal(value, student.snapshot()[name]) for name, value in built_student.snapshot().items())


WIDE = StudentConfig("narrow", max_share=0.3)  # wide enough for two attention heads


@pytest.fixture
def word_pairs():
    """Pairs of the same words in another order, and pairs without a common word."""
    rng = np.random.default_rng(5)
    drawn = [rng.choice(WORDS, 12, replace=False) for _ in range(40)]
    same = tuple((" ".join(words[:6]), " ".join(rng.permutation(words[:6]))) for words in drawn)
    return same, tuple((" ".join(words[:6]), " ".join(words[6:])) for words in drawn)


@pytest.fixture
def of_pairs(large_teacher, domain_texts):
    pairs = tuple(first + second for first, second in zip(domain_texts[::2], domain_texts[1::2], strict=True))
    return build_student(WIDE, large_teacher, LABELS, pairs, seed=0)


def mismatches(student, pairs):
    """Mean size of what the first layer leaves beside the words, over the tokens of each pair."""
    size, encoded = presets.aligned_size(student.model.bert), encode(student.tokenizer, list(pairs), 64)
    batch = encoded.padded(np.arange(len(pairs)))
    with torch.inference_mode():
        states = student.model.bert(**batch, output_hidden_states=True).hidden_states[1]
    mask = batch["attention_mask"][..., None]
    return ((states[..., size : 2 * size] * mask).sum(1) / mask.sum(1)).mean(1).numpy()


def test_a_student_of_pairs_starts_by_telling_shared_words_from_others(of_pairs, word_pairs):
    same, different = (mismatches(of_pairs, pairs) for pairs in word_pairs)
    assert same.max() < different.min()


def test_words_are_matched_in_the_other_text_not_in_their_own(of_pairs, word_pairs):
    batch = encode(of_pairs.tokenizer, list(word_pairs[0]), 64).padded(np.arange(40))
    body = of_pairs.model.bert
    body.set_attn_implementation("eager")
    with torch.inference_mode():
        weights = body(**batch, output_attentions=True).attentions[0][:, 0]
    ids, sides = batch["input_ids"], batch["token_type_ids"]
    words = ~torch.isin(ids, torch.tensor(of_pairs.tokenizer.all_special_ids))
    other = (sides[:, :, None] != sides[:, None, :]) & words[:, None, :]
    alike = (ids[:, :, None] == ids[:, None, :]) & other
    assert (weights * alike).sum(2)[words].mean() > 0.7
    assert (weights * other).sum(2)[words].mean() > 0.9


def test_a_student_of_single_texts_keeps_whole_word_vectors(large_teacher, domain_texts, of_pairs):
    single = build_student(WIDE, large_teacher, LABELS, domain_texts, seed=0)
    size = presets.aligned_size(single.model.bert)
    assert size > 0 and single.word_embeddings()[:, size:].abs().sum() > 0
    assert of_pairs.word_embeddings()[:, size - 1 :].abs().sum() == 0


@pytest.fixture
def states():
    return np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32) * np.arange(1, 17, dtype=np.float32)


def test_word_vectors_are_the_same_whichever_sign_the_machine_gives(states, monkeypatch):
    before, solve = presets.principal_word_vectors(states, 6), torch.linalg.eigh

    def turned(matrix):
        found = solve(matrix)
        return torch.return_types.linalg_eigh((found.eigenvalues, found.eigenvectors * torch.tensor([1.0, -1.0] * 8)))

    monkeypatch.setattr(torch.linalg, "eigh", turned)
    assert torch.equal(presets.principal_word_vectors(states, 6), before)


def test_word_vectors_are_the_leading_components_at_one_scale(states):
    found, centred = presets.principal_word_vectors(states, 3).numpy(), states - states.mean(0)
    ratios = np.abs(found / (centred @ np.linalg.svd(centred, full_matrices=False)[2][:3].T))
    assert np.allclose(ratios, ratios[0, 0], rtol=1e-2)
    assert np.linalg.norm(found, axis=1).mean() == pytest.approx(0.1 * 3**0.5, rel=1e-4)


def test_more_components_than_the_teacher_has_are_refused(states):
    with pytest.raises(UsageError, match="exceeds the teacher's width 16"):
        presets.principal_word_vectors(states, 17)


@given(st.integers(1, 128).map(lambda eighth: 8 * eighth))
def test_heads_divide_every_width_into_even_parts(width):
    heads = presets.attention_heads(width)
    assert width % heads == 0 == (width // heads) % 2
    assert heads == 1 or width // heads >= 32


@given(st.integers(11, 3000))
def test_the_largest_size_that_fits_is_found(budget):
    config = StudentConfig(max_share=budget / 10_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("l2a.student.student.classifier_of", lambda size, weights: nn.Linear(10, size))
        teacher = SimpleNamespace(parameters_count=10_000)
        size = presets.largest_fitting(config, teacher, range(1, 400), lambda size: size)
    assert 11 * size <= int(config.max_share * 10_000) < 11 * (size + 1)


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


def test_every_token_keeps_its_text_under_its_new_number(full, kept, pruned):
    assert len(pruned) == len(kept) == 200 and pruned.is_fast
    assert vocabulary(pruned) == tuple(full.convert_ids_to_tokens(kept.tolist()))
    assert sorted(pruned.get_vocab().values()) == list(range(200))


KNOWN = [character for character in CHARACTERS if character.isascii() or character == "ж"]


@given(st.text(alphabet=[*KNOWN, " "], max_size=60))
def test_a_text_of_known_characters_still_splits_into_pieces(full, pruned, text):
    pieces, whole = ("".join(one.tokenize(text)).replace("##", "") for one in (pruned, full))
    assert pieces == whole, "a piece is unknown, lost or another"


def test_words_of_the_texts_stay_whole_and_others_split(full, pruned, domain_texts):
    used = {word for (text,) in domain_texts for word in text.split()}
    assert all(len(pruned.tokenize(word)) == 1 for word in used)
    foreign = next(word for word in WORDS if word not in pruned.get_vocab())
    assert len(full.tokenize(foreign)) == 1 < len(pruned.tokenize(foreign))


def test_the_most_frequent_tokens_stay(full, domain_texts):
    counts = count_tokens(full, domain_texts)
    needed = presets.needed_tokens(full, counts)
    kept = choose_tokens(full, counts, int(needed.sum()) + 10)
    chosen = np.setdiff1d(kept, np.flatnonzero(needed))
    assert len(chosen) == 10
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
        full = plain_tokenizer(full)
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
    pruned = keep_tokens(full, choose_tokens(full, count_tokens(full, [*domain_texts, ("kada <user> !",)]), 200))
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
    assert SPECIALS[0] in student.tokenizer.get_vocab() and 0 < len(ids) < len(large_teacher.tokenizer)
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
    small = [presets.wants_small_rate(StudentConfig(), large_teacher, width) for width in (128, 384)]
    assert small == [False, preset == "minilm-l6"]
    assert presets.wants_small_rate(StudentConfig(model="a checkpoint of the user"), large_teacher, 384)
