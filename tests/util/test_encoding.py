from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from l2a.data import encoding
from l2a.data.encoding import encode, inference_batches, refuse_long_sequences
from l2a.util.errors import UsageError
from tests.conftest import plain_tokenizer

lengths_of_texts = st.lists(st.integers(1, 60), min_size=1, max_size=80)


@given(lengths_of_texts, st.integers(1, 40), st.integers(0, 5))
def test_an_epoch_holds_every_text_once(lengths, batch_size, seed):
    batches = list(encoding.training_batches(np.array(lengths), batch_size, np.random.default_rng(seed)))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert max(map(len, batches)) <= batch_size


@given(st.integers(1, 600))
def test_a_bucket_holds_the_length(length):
    bucket = encoding.bucket_of(length)
    assert bucket == length or (bucket > length and bucket in encoding.BUCKETS)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(st.integers(1, 30), min_size=1, max_size=20))
def test_padding_keeps_every_token(tokenizer, words):
    encoded = encode(tokenizer, [("good " * count,) for count in words], 24)
    assert (encoded.lengths == np.minimum(np.array(words) + 2, 24)).all()
    assert sorted(np.concatenate(list(inference_batches(encoded))).tolist()) == list(range(len(words)))
    order = np.arange(len(words))[::-1]
    batch = encoded.padded(order)
    rows = [ids[mask == 1].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert rows == [encoded.ids[slice(*encoded.offsets[i : i + 2])].tolist() for i in order]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()


def test_pairs_keep_their_segments(tokenizer):
    batch = encode(tokenizer, [("good film", "bad story")], 32).padded(np.array([0]))
    assert batch["token_type_ids"][batch["attention_mask"] == 1].tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_texts_are_encoded_as_the_tokenizers_own_call_does(tokenizer):
    plain, inputs = plain_tokenizer(tokenizer, padding_side="left"), [("good film " * 9, "it was bad")]
    for config, types in (({"type_vocab_size": 2}, True), ({"type_vocab_size": 1}, False), ({}, False)):
        fitted = encoding.fit_tokenizer(plain, SimpleNamespace(**config), 16)
        batch = encoding.model_inputs(SimpleNamespace(**config), encode(fitted, inputs, 16).padded(np.array([0])))
        own = fitted(*inputs[0], truncation=True, padding="max_length", return_tensors="pt")
        assert set(own) == set(batch) == {"input_ids", "attention_mask"} | ({"token_type_ids"} if types else set())
        assert all(np.array_equal(own[name], batch[name]) for name in own)
    assert plain.padding_side == "left" and "token_type_ids" not in plain("a", "b")


@pytest.mark.parametrize(("positions", "longest"), [(130, 128), (126, 96), (514, 514), (20, 20)])
def test_the_longest_length_that_is_advised_is_accepted_and_the_next_refused(positions, longest):
    refuse_long_sequences("the teacher", positions, longest)
    refuse_long_sequences("the teacher", None, 9999)
    with pytest.raises(UsageError, match=f"at most {positions} tokens; give --max-length {longest} or less"):
        refuse_long_sequences("the teacher", positions, longest + 1)


def test_no_text_gives_no_batch(tokenizer):
    assert list(inference_batches(encode(tokenizer, [], 16))) == []
