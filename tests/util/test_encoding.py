import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from l2a.data.encoding import BUCKETS, bucket_of, encode, inference_batches, training_batches

lengths_of_texts = st.lists(st.integers(1, 60), min_size=1, max_size=80)


@given(lengths_of_texts, st.integers(1, 40), st.integers(0, 5))
def test_an_epoch_holds_every_text_once(lengths, batch_size, seed):
    batches = list(training_batches(np.array(lengths), batch_size, np.random.default_rng(seed)))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert max(map(len, batches)) <= batch_size


@given(st.integers(1, 600))
def test_a_bucket_holds_the_length(length):
    assert bucket_of(length) >= length
    assert bucket_of(length) in BUCKETS or bucket_of(length) == length


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(words=st.lists(st.integers(1, 30), min_size=1, max_size=20))
def test_padding_keeps_every_token(tokenizer, words):
    encoded = encode(tokenizer, [("good " * count,) for count in words], 24)
    assert (encoded.lengths == np.minimum(np.array(words) + 2, 24)).all()
    seen = np.concatenate(list(inference_batches(encoded)))
    assert sorted(seen.tolist()) == list(range(len(words)))
    batch = encoded.padded(np.arange(len(words)))
    assert (batch["attention_mask"].sum(1).numpy() == encoded.lengths).all()
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()


def test_pairs_keep_their_segments(tokenizer):
    encoded = encode(tokenizer, [("good film", "bad story")], 32)
    batch = encoded.padded(np.array([0]))
    types = batch["token_type_ids"][0][batch["attention_mask"][0] == 1]
    assert types.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_no_text_gives_no_batch(tokenizer):
    assert list(inference_batches(encode(tokenizer, [], 16))) == []
