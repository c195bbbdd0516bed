import numpy as np
import pytest
import torch

from l2a.config import StudentConfig
from l2a.data.encoding import encode
from l2a.student.student import aligned_size, build_student
from tests.conftest import LABELS
from tests.student.conftest import WORDS

WIDE = StudentConfig("narrow", max_share=0.3)  # wide enough for two attention heads


@pytest.fixture
def word_pairs():
    """Pairs of the same words in another order, and pairs without a common word."""
    rng = np.random.default_rng(5)
    drawn = [rng.choice(WORDS, 12, replace=False) for _ in range(40)]
    same = tuple((" ".join(words[:6]), " ".join(rng.permutation(words[:6]))) for words in drawn)
    return same, tuple((" ".join(words[:6]), " ".join(words[6:])) for words in drawn)


@pytest.fixture(scope="module")
def of_pairs(loaded_large_teacher, domain_texts, tmp_path_factory):
    pairs = tuple(first + second for first, second in zip(domain_texts[::2], domain_texts[1::2], strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("L2A_CACHE", str(tmp_path_factory.mktemp("cache")))
        return build_student(WIDE, loaded_large_teacher, LABELS, pairs, seed=0)


def mismatches(student, pairs):
    """Mean size of what the first layer leaves beside the words, over the tokens of each pair."""
    size, encoded = aligned_size(student.model.bert), encode(student.tokenizer, list(pairs), 64)
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
    words = (batch["attention_mask"] == 1) & (batch["input_ids"] != of_pairs.tokenizer.sep_token_id)
    words &= batch["input_ids"] != of_pairs.tokenizer.cls_token_id
    other = (batch["token_type_ids"][:, :, None] != batch["token_type_ids"][:, None, :]) & words[:, None, :]
    alike = (batch["input_ids"][:, :, None] == batch["input_ids"][:, None, :]) & other
    assert (weights * alike).sum(2)[words].mean() > 0.7
    assert (weights * other).sum(2)[words].mean() > 0.9


def test_a_student_of_single_texts_keeps_whole_word_vectors(large_teacher, domain_texts, of_pairs):
    single = build_student(WIDE, large_teacher, LABELS, domain_texts, seed=0)
    size = aligned_size(single.model.bert)
    assert size > 0
    assert single.word_embeddings()[:, size:].abs().sum() > 0
    assert of_pairs.word_embeddings()[:, size - 1 :].abs().sum() == 0
