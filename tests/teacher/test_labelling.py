import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2a.teacher.labelling import cached_labeller, predict, token_vectors
from l2a.teacher.outputs import TeacherOutputs
from l2a.teacher.predictions import PredictionStore, content_key
from tests.conftest import make_examples

TEXTS = make_examples(20).inputs


@pytest.fixture
def calls(monkeypatch):
    """Record the texts that really reach the model."""
    seen: list[tuple[str, ...]] = []

    def spy(teacher, inputs, *rest):
        seen.extend(inputs)
        return predict(teacher, inputs, *rest)

    monkeypatch.setattr("l2a.teacher.labelling.predict", spy)
    return seen


def test_a_text_is_labelled_once_whatever_its_place(teacher, calls):
    label = cached_labeller(teacher, 24)
    first = label(TEXTS)
    again = label([*reversed(TEXTS), TEXTS[0], ("the phone was poor",)])
    assert len(calls) == len(set(TEXTS)) + 1
    assert np.array_equal(again.logits[: len(TEXTS)], first.logits[::-1])


def test_labels_survive_the_process_and_match_a_fresh_prediction(teacher, calls):
    first = cached_labeller(teacher, 24)(TEXTS)
    calls.clear()
    second = cached_labeller(teacher, 24)(TEXTS)
    assert not calls
    assert np.array_equal(first.logits, second.logits)
    assert np.allclose(second.logits, predict(teacher, TEXTS, 24).logits, atol=1e-3)


def test_another_length_or_other_weights_do_not_share_labels(teacher, calls):
    cached_labeller(teacher, 24)(TEXTS)
    calls.clear()
    cached_labeller(teacher, 16)(TEXTS)
    assert len(calls) == len(set(TEXTS))
    calls.clear()
    teacher.head.weight.data += 1
    cached_labeller(teacher, 24)(TEXTS)
    assert len(calls) == len(set(TEXTS))


def test_batching_does_not_change_a_label(teacher):
    together = predict(teacher, TEXTS, 24).logits
    alone = np.concatenate([predict(teacher, [text], 24).logits for text in TEXTS])
    assert np.allclose(together, alone, atol=2e-2)


def test_the_teacher_keeps_its_mode(teacher):
    teacher.train()
    predict(teacher, TEXTS[:2], 24)
    assert teacher.training


def test_every_token_has_a_vector(teacher):
    vectors = token_vectors(teacher)
    assert vectors.shape == (len(teacher.tokenizer), teacher.hidden_size)
    good = teacher.tokenizer.convert_tokens_to_ids("good")
    assert np.allclose(vectors[good], predict(teacher, [("good",)], 24).embeddings[0], atol=2e-2)


def fill(store: PredictionStore, texts: list[tuple[str, ...]], seed: int = 0) -> TeacherOutputs:
    rng = np.random.default_rng(seed)
    outputs = TeacherOutputs(
        rng.normal(size=(len(texts), 3)).astype(np.float32), rng.normal(size=(len(texts), 4)).astype(np.float32)
    )
    store.append([content_key(text) for text in texts], outputs)
    return outputs


@given(st.lists(st.tuples(st.text(max_size=8)), min_size=1, max_size=12, unique=True))
def test_a_store_gives_back_what_it_was_given(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("store")
    outputs = fill(PredictionStore(folder, 3, 4), texts)
    reopened = PredictionStore(folder, 3, 4)
    found = reopened.read(reopened.find([content_key(text) for text in texts]))
    assert np.array_equal(found.logits, outputs.logits)
    assert np.allclose(found.embeddings, outputs.embeddings, atol=2e-3)


def test_a_damaged_row_is_missed_not_trusted(tmp_path):
    texts = [(str(i),) for i in range(4)]
    fill(PredictionStore(tmp_path, 3, 4), texts)
    (file,) = tmp_path.glob("*.bin")
    content = bytearray(file.read_bytes())
    content[len(content) // 4 + 22] ^= 0xFF
    file.write_bytes(content)
    found = PredictionStore(tmp_path, 3, 4).find([content_key(text) for text in texts])
    assert found.tolist() == [0, -1, 2, 3]


def test_a_torn_last_row_is_overwritten(tmp_path):
    fill(PredictionStore(tmp_path, 3, 4), [("a",), ("b",)])
    (file,) = tmp_path.glob("*.bin")
    file.write_bytes(file.read_bytes()[:-5])
    store = PredictionStore(tmp_path, 3, 4)
    assert store.find([content_key(("a",)), content_key(("b",))]).tolist() == [0, -1]
    fill(store, [("b",)], seed=1)
    assert (PredictionStore(tmp_path, 3, 4).find([content_key(("a",)), content_key(("b",))]) >= 0).all()


def test_pairs_and_single_texts_never_share_a_key():
    assert content_key(("a", "b")) != content_key(("ab",)) != content_key(("a b",))
