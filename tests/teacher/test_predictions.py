"""The store of teacher outputs: exact, compact, and safe against damage and killed writers."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l2a.teacher.store import KEY_TYPE, KeyIndex, PredictionStore, TeacherOutputs, content_key, hash_factors, row_sums

CLASSES, WIDTH = 3, 5
FILES = ("index", "logits", "embeddings")
TEXTS = [(str(i),) for i in range(4)]
KEYS = [content_key(text) for text in TEXTS]


def open_store(folder: Path) -> PredictionStore:
    return PredictionStore(folder, CLASSES, WIDTH)


def make_outputs(count: int, seed: int = 0) -> TeacherOutputs:
    rng = np.random.default_rng(seed)
    embeddings = rng.normal(size=(count, WIDTH)).astype(np.float16).astype(np.float32)
    return TeacherOutputs(rng.normal(size=(count, CLASSES)).astype(np.float32), embeddings)


def file_of(folder: Path, name: str) -> Path:
    return folder / f"{name}-{CLASSES}x{WIDTH}.bin"


@pytest.fixture
def filled(tmp_path) -> Path:
    """A folder in which the four texts are stored."""
    open_store(tmp_path).append(KEYS, make_outputs(4))
    return tmp_path


@pytest.mark.slow
@given(st.lists(st.lists(st.integers(0, 20), max_size=8, unique=True), max_size=6))
def test_every_text_gives_back_exactly_what_was_stored_for_it_last(tmp_path_factory, batches):
    folder, last = tmp_path_factory.mktemp("store"), {}
    store = open_store(folder)
    for seed, batch in enumerate(batches):
        keys, outputs = [content_key((str(i),)) for i in batch], make_outputs(len(batch), seed)
        store.append(keys, outputs)
        last |= {key: (outputs, row) for row, key in enumerate(keys)}
    for reader in (store, open_store(folder)):
        assert len(reader) == len(last)
        found = reader.read(reader.find(list(last)))
        for (outputs, row), logits, embedding in zip(last.values(), found.logits, found.embeddings, strict=True):
            assert np.array_equal(logits, outputs.logits[row])
            assert np.array_equal(embedding, outputs.embeddings[row])
    assert (store.find([content_key(("never",))]) == -1).all()


@given(st.sampled_from(FILES), st.integers(0, 2**16), st.integers(1, 255))
def test_damage_to_any_byte_loses_one_row_and_no_other(tmp_path_factory, name, place, flipped):
    folder = tmp_path_factory.mktemp("store")
    open_store(folder).append(KEYS, make_outputs(4))
    file = file_of(folder, name)
    content = bytearray(file.read_bytes())
    content[place % len(content)] ^= flipped
    file.write_bytes(content)
    expected = np.arange(4)
    expected[place % len(content) * 4 // len(content)] = -1
    assert open_store(folder).find(KEYS).tolist() == expected.tolist()


@given(st.sampled_from(FILES), st.integers(0, 3))
def test_a_row_of_zeros_and_a_row_in_another_place_are_missed(tmp_path_factory, name, row):
    folder = tmp_path_factory.mktemp("store")
    open_store(folder).append(KEYS, make_outputs(4))
    file = file_of(folder, name)
    rows = np.frombuffer(file.read_bytes(), np.uint8).reshape(4, -1).copy()
    moved, zeroed = np.roll(rows, 1, axis=0), rows.copy()
    zeroed[row] = 0
    file.write_bytes(zeroed.tobytes())
    assert np.flatnonzero(open_store(folder).find(KEYS) < 0).tolist() == [row]
    file.write_bytes(moved.tobytes())
    assert (open_store(folder).find(KEYS) == -1).all()


@pytest.mark.slow
@given(st.sampled_from(FILES), st.integers(1, 10_000))
def test_a_file_cut_anywhere_costs_the_rows_behind_the_cut_until_they_are_labelled_again(tmp_path_factory, name, cut):
    folder, outputs = tmp_path_factory.mktemp("store"), make_outputs(4)
    open_store(folder).append(KEYS, outputs)
    file = file_of(folder, name)
    content = file.read_bytes()
    left = len(content) - 1 - cut % len(content)
    file.write_bytes(content[:left])
    whole = left * 4 // len(content)
    store = open_store(folder)
    assert store.find(KEYS).tolist() == [*range(whole), *[-1] * (4 - whole)]
    lost = np.arange(whole, 4)
    store.append([KEYS[i] for i in lost], outputs.take(lost))
    for reader in (store, open_store(folder)):
        rows = reader.find(KEYS)
        assert (rows >= 0).all()
        assert np.array_equal(reader.read(rows).embeddings, outputs.embeddings)


def test_rows_that_a_killed_writer_left_without_an_index_line_are_overwritten(filled):
    for name in ("logits", "embeddings"):
        with file_of(filled, name).open("ab") as file:
            file.write(b"\1" * 7)
    open_store(filled).append([content_key(("new",))], make_outputs(1, seed=1))
    store = open_store(filled)
    rows = store.find([*KEYS, content_key(("new",))])
    assert rows.tolist() == [0, 1, 2, 3, 4]
    assert np.array_equal(store.read(rows[4:]).logits, make_outputs(1, seed=1).logits)


def test_two_open_stores_write_to_one_folder_and_see_each_other_after_writing(tmp_path):
    first, second = open_store(tmp_path), open_store(tmp_path)
    outputs = make_outputs(4)
    first.append(KEYS[:1], outputs.take(np.array([0])))
    second.append(KEYS[1:], outputs.take(np.arange(1, 4)))
    assert second.find(KEYS).tolist() == [0, 1, 2, 3]
    assert first.find(KEYS).tolist() == [0, -1, -1, -1]
    first.append([], outputs.take(np.arange(0)))
    assert np.array_equal(first.read(first.find(KEYS)).logits, outputs.logits)


def test_outputs_that_were_read_stay_readable_while_the_store_grows(filled):
    store = open_store(filled)
    outputs = store.read(store.find(KEYS))
    store.append([content_key(("new",))], make_outputs(1, seed=1))
    assert np.array_equal(outputs.embeddings, make_outputs(4).embeddings)


def test_a_reader_of_logits_alone_needs_no_embeddings(filled):
    file_of(filled, "embeddings").unlink()
    store = open_store(filled)
    assert store.find(KEYS, embeddings=False).tolist() == [0, 1, 2, 3]
    assert store.find(KEYS).tolist() == [-1, -1, -1, -1]


def test_a_text_costs_four_bytes_a_class_two_a_dimension_and_an_index_line(filled):
    sizes = {name: file_of(filled, name).stat().st_size / 4 for name in FILES}
    assert sizes == {"index": 24, "logits": 4 * CLASSES, "embeddings": 2 * WIDTH}


def test_every_single_bit_changes_the_sum_of_a_row():
    # Flipping bit k of word i adds or takes b_i 2^k; the high half stays only if that of b_i 2^k is all 0 or all 1.
    changes = hash_factors(2048)[1:, None] << np.arange(32, dtype=np.uint64)
    assert not np.isin(changes >> np.uint64(32), [0, 2**32 - 1]).any()


def test_the_sum_of_a_row_is_the_same_in_every_version():
    keys, values = np.arange(8, dtype="<u4").reshape(2, 4), np.array([[1.5, -2.0], [0.0, 3.25]], "<f2")
    assert row_sums(keys, values).tolist() == [3302719299, 345660299]


@given(st.lists(st.lists(st.binary(min_size=16, max_size=16) | st.sampled_from([b"\0" * 16, b"a" + b"\0" * 15]))))
def test_the_index_knows_the_last_row_of_every_key(batches):
    index, rows, count = KeyIndex(), {}, 0
    for batch in batches:
        index.add(np.array(batch, KEY_TYPE), count)
        rows |= {key: count + i for i, key in enumerate(batch)}
        count += len(batch)
    assert index.find(np.array(list(rows), KEY_TYPE)).tolist() == list(rows.values())
    assert index.find(np.array([b"b" * 15 + b"\0"], KEY_TYPE)).tolist() == [rows.get(b"b" * 15 + b"\0", -1)]


def test_pairs_and_single_texts_never_share_a_key():
    assert content_key(("a", "b")) != content_key(("ab",)) != content_key(("a b",))


def test_a_store_whose_folder_was_emptied_never_gives_the_outputs_of_another_text(filled):
    store = open_store(filled)
    for path in filled.iterdir():
        path.unlink()
    others = [content_key((f"other {i}",)) for i in range(4)]
    open_store(filled).append(others, make_outputs(4, seed=1))
    assert (store.find(KEYS) == -1).all()
    outputs = make_outputs(4, seed=2)
    store.append(KEYS, outputs)
    assert np.array_equal(store.read(store.find(KEYS)).logits, outputs.logits)


def test_an_emptied_store_is_indexed_anew(filled):
    store, outputs = open_store(filled), make_outputs(2, seed=3)
    for path in filled.iterdir():
        path.unlink()
    store.append(KEYS[1::-1], outputs)
    assert np.array_equal(store.read(store.find(KEYS[1::-1])).logits, outputs.logits)
    assert (store.find(KEYS[2:]) == -1).all()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="counts resident pages as Linux shows them")
def test_pages_of_embeddings_that_were_read_do_not_stay_in_memory(tmp_path):
    store = PredictionStore(tmp_path, 2, 1024)
    keys = [content_key((str(i),)) for i in range(2000)]
    zeros = np.zeros((2000, 1024), np.float32)
    store.append(keys, TeacherOutputs(zeros[:, :2], zeros))
    outputs = store.read(store.find(keys))
    assert outputs.embeddings.shape == (2000, 1024)
    lines = Path("/proc/self/smaps").read_text().split("embeddings-2x1024.bin")[1:]
    resident = [int(line.split("Rss:")[1].split()[0]) for line in lines]
    assert resident
    assert max(resident) < 100  # kB, of 4,000
