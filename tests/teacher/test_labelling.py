import numpy as np
import pytest

from l2a.config import TeacherConfig
from l2a.teacher.finetune import fine_tuned
from l2a.teacher.labelling import OutputStore, cached_labeller, predict, run_teacher, token_vectors
from l2a.teacher.model import load_encoder
from l2a.util import cache_root
from l2a.util.cluster import open_client
from tests.conftest import Killing, make_examples

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
    assert not calls and np.array_equal(first.logits, second.logits)
    assert np.allclose(second.logits, predict(teacher, TEXTS, 24).logits, atol=1e-3)


def test_another_length_or_other_weights_do_not_share_labels(teacher, calls):
    cached_labeller(teacher, 24)(TEXTS)
    cached_labeller(teacher, 16)(TEXTS)
    teacher.head.weight.data += 1
    cached_labeller(teacher, 24)(TEXTS)
    assert len(calls) == 3 * len(set(TEXTS))


CHANGES = {"code": ("teacher.labelling.RECIPE", "teacher.finetune.RECIPE"), "arithmetic": ("util.training.arithmetic",)}


@pytest.mark.parametrize("changed", CHANGES)
def test_other_code_or_arithmetic_labels_and_trains_anew(teacher, calls, monkeypatch, changed, encoder_folder):
    def work():
        """Give the names of what lies in the cache once all has been made."""
        cached_labeller(teacher, 24)(TEXTS)
        token_vectors(teacher)
        base = load_encoder(str(encoder_folder), teacher.label_names, 0)
        fine_tuned(base, make_examples(8), TeacherConfig(), 1, 24, 0, "train")
        return {path.name for path in cache_root().glob("*/*") if path.is_dir()}

    entries = work()
    calls.clear()
    for name in CHANGES[changed]:
        monkeypatch.setattr(f"l2a.{name}", 99 if changed == "code" else lambda device: "cuda bfloat16")
    assert len(work() - entries) == len(entries) == 3
    assert len(calls) == len(set(TEXTS))


def test_the_teacher_keeps_its_mode(teacher):
    teacher.train()
    predict(teacher, TEXTS[:2], 24)
    assert teacher.training


def test_every_token_has_a_vector(teacher):
    vectors = token_vectors(teacher)
    assert vectors.shape == (len(teacher.tokenizer), teacher.hidden_size)
    good = teacher.tokenizer.convert_tokens_to_ids("good")
    assert np.allclose(vectors[good], predict(teacher, [("good",)], 24).embeddings[0], atol=2e-2)


def test_an_interrupted_labelling_keeps_the_blocks_that_were_done(teacher, calls, monkeypatch):
    monkeypatch.setattr("l2a.teacher.labelling.LABELLED_AT_ONCE", 4)
    rounds = iter(range(2))

    def interrupted(*arguments):
        if next(rounds, None) is None:
            raise KeyboardInterrupt
        return run_teacher(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("l2a.teacher.labelling.run_teacher", interrupted)
        cached_labeller(teacher, 24)(TEXTS)
    calls.clear()
    outputs = cached_labeller(teacher, 24)(TEXTS)
    assert len(calls) == len(set(TEXTS)) - 2 * 4
    assert np.allclose(outputs.logits, predict(teacher, TEXTS, 24).logits, atol=2e-2)


@pytest.mark.slow
def test_a_cluster_labels_every_text_once_though_a_worker_is_killed(teacher, monkeypatch):
    monkeypatch.setattr("l2a.teacher.labelling.SENT_AT_ONCE", 8)
    texts, written, append = make_examples(600, seed=3).inputs, [], OutputStore.append
    note = lambda store, keys, *rest: (written.extend(keys), append(store, keys, *rest))  # noqa: E731
    monkeypatch.setattr(OutputStore, "append", note)
    with open_client(2) as client:
        progress = Killing(client)
        labelled = cached_labeller(teacher, 24, progress, client=client)(texts)
    assert progress.killed and len(written) == len(set(written)) == len(set(texts))
    assert np.allclose(labelled.logits, predict(teacher, texts, 24).logits, atol=2e-2)
