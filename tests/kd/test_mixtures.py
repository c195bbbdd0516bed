import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2a.data.encoding import encode
from l2a.kd.data import DistillationSet, cycle, join, mixture_batches, refuse_constant_targets
from l2a.teacher.labelling import TeacherOutputs
from l2a.util.errors import RunError


def make_set(tokenizer, count: int, seed: int = 0) -> DistillationSet:
    rng = np.random.default_rng(seed)
    encoded = encode(tokenizer, [("good " * int(n),) for n in rng.integers(1, 9, count)], 16)
    outputs = TeacherOutputs(
        rng.normal(size=(count, 2)).astype(np.float32), rng.normal(size=(count, 4)).astype(np.float32)
    )
    return DistillationSet(encoded, outputs, rng.integers(0, 2, count))


def cycles_of(sizes, rng):
    parts = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    return [cycle(part, rng) for part in parts]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=4).filter(any), st.integers(1, 12), st.integers(1, 40))
def test_every_step_gives_a_whole_batch_of_existing_texts(sizes, batch_size, steps):
    lengths, rng = np.arange(sum(sizes)) % 7 + 1, np.random.default_rng(0)
    shares = [1.0 if size else 0.0 for size in sizes]
    batches = list(mixture_batches(cycles_of(sizes, rng), shares, lengths, batch_size, steps, rng))
    assert len(batches) == steps
    assert all(len(batch) == batch_size for batch in batches)
    assert all(0 <= i < sum(sizes) for batch in batches for i in batch)


def test_shares_hold_over_the_run_and_a_small_set_repeats_evenly():
    rng = np.random.default_rng(0)
    batches = mixture_batches(cycles_of([4, 1000], rng), [0.25, 0.75], np.ones(1004), 32, 64, rng)
    counts = np.bincount(np.concatenate(list(batches)), minlength=1004)
    assert counts[:4].sum() == pytest.approx(0.25 * 32 * 64, abs=2)
    assert np.ptp(counts[:4]) <= 1


def test_joining_and_taking_keep_texts_with_their_labels(tokenizer):
    first, second = make_set(tokenizer, 5, 0), make_set(tokenizer, 7, 1)
    both = join([first, second])
    back = both.take(np.arange(5, 12))
    assert (back.labels == second.labels).all()
    assert (back.encoded.ids == second.encoded.ids).all()
    assert (back.teacher.logits == second.teacher.logits).all()
    assert (back.encoded.padded(np.array([3]))["input_ids"] == second.encoded.padded(np.array([3]))["input_ids"]).all()


def test_constant_teacher_labels_are_refused(tokenizer):
    data = make_set(tokenizer, 6)
    constant = DistillationSet(
        data.encoded, TeacherOutputs(np.ones((6, 2), np.float32), data.teacher.embeddings), data.labels
    )
    with pytest.raises(RunError, match="same probabilities"):
        refuse_constant_targets(constant)
    refuse_constant_targets(data)
