"""The store of teacher outputs: exact, compact, and safe against damage, killed writers and several at once."""

import errno
import multiprocessing
import os
import signal
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from scipy.special import softmax

import l2a.teacher.labelling as module
from l2a.teacher.labelling import OutputStore, TeacherOutputs, content_key, join_outputs
from l2a.util import RunError

CLASSES, WIDTH = 3, 5
KEYS = [content_key((str(i),)) for i in range(40)]
PROCESSES = multiprocessing.get_context("fork")  # a fresh interpreter would load torch for seconds


def open_store(folder: Path) -> OutputStore:
    return OutputStore(folder, CLASSES, WIDTH)


def make_outputs(count: int, seed: int = 0) -> TeacherOutputs:
    rng = np.random.default_rng(seed)
    embeddings = rng.normal(size=(count, WIDTH)).astype(np.float16).astype(np.float32)
    return TeacherOutputs(rng.normal(size=(count, CLASSES)).astype(np.float32), embeddings)


OUTPUTS = make_outputs(len(KEYS))


def fill(folder: Path) -> OutputStore:
    store = open_store(folder)
    store.append(KEYS, OUTPUTS)
    return store


def holds(store: OutputStore, keys: list[bytes] = KEYS, expected: TeacherOutputs = OUTPUTS) -> bool:
    outputs, known = store.read(keys)
    same = known.all() and np.array_equal(outputs.logits, expected.logits)
    return bool(same and np.array_equal(outputs.embeddings, expected.embeddings))


def label_again(store: OutputStore, times: int) -> None:
    """Read a store and write what is lost, some times; what is found is right, and in the end all is there."""
    for _ in range(times):
        outputs, known = store.read(KEYS)
        assert np.array_equal(outputs.logits[known], OUTPUTS.logits[known])
        lost = np.flatnonzero(~known)
        store.append([KEYS[i] for i in lost], OUTPUTS.take(lost))
    assert holds(open_store(store.path.parent))


def change(path: Path, row: int, column: str, value: object) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(f"UPDATE outputs SET {column} = ? WHERE row = ?", (value, row))


@settings(max_examples=12)
@given(st.lists(st.lists(st.integers(0, 20), max_size=8), max_size=6))
def test_every_text_gives_back_exactly_what_was_stored_for_it_last(tmp_path_factory, batches):
    folder, last = tmp_path_factory.mktemp("store"), {}
    store = open_store(folder)
    for seed, batch in enumerate(batches):
        outputs = make_outputs(len(batch), seed)
        store.append([KEYS[i] for i in batch], outputs)
        last |= {KEYS[i]: (outputs.logits[row], outputs.embeddings[row]) for row, i in enumerate(batch)}
    keys = [*last, *last]
    for reader in (store, open_store(folder)):
        found, known = reader.read(keys)
        assert known.all()
        for key, *rows in zip(keys, found.logits, found.embeddings, strict=True):
            assert all(map(np.array_equal, rows, last[key]))
    assert not store.read([content_key(("never",))])[1].any()


@settings(max_examples=12)
@given(st.integers(0, 2**20), st.integers(0, 7), st.integers(0, 1))
def test_no_changed_bit_of_the_file_gives_wrong_outputs_or_stops_labelling(tmp_path_factory, place, bit, header):
    folder = tmp_path_factory.mktemp("store")
    path = fill(folder).path
    content = bytearray(path.read_bytes())
    content[place % (100 if header else len(content))] ^= 1 << bit
    path.write_bytes(content)
    label_again(open_store(folder), 3)


@pytest.mark.parametrize("content", [b"", b"garbage" * 999, b"SQLite format 3\0" + b"\xff" * 9000])
def test_a_file_that_is_no_store_is_put_aside_with_one_warning(tmp_path, caplog, content):
    path = open_store(tmp_path).path
    path.write_bytes(content)
    store = open_store(tmp_path)
    assert not store.read(KEYS)[1].any()
    store.append(KEYS, OUTPUTS)
    assert holds(open_store(tmp_path))
    assert len(caplog.records) == (1 if content else 0)  # an empty file is a new one


@settings(max_examples=12)
@given(st.floats(0, 0.999))
@example(0.5053220549017247)  # within the last page
def test_a_file_cut_anywhere_is_filled_again(tmp_path_factory, share):
    folder = tmp_path_factory.mktemp("store")
    path = fill(folder).path
    os.truncate(path, int(share * path.stat().st_size))
    store = open_store(folder)
    assert not store.read(KEYS)[1].all()  # a row before the cut may be whole
    label_again(store, 2)  # writing may find more damage than reading did: then even what was found before goes


@pytest.mark.parametrize(("column", "value"), [("record", bytes(38)), ("record", b""), ("record", None), ("crc", 7)])
def test_a_damaged_row_is_missed_alone_and_written_again(tmp_path, column, value):
    change(fill(tmp_path).path, 3, column, value)
    store = open_store(tmp_path)
    assert np.flatnonzero(~store.read(KEYS)[1]).tolist() == [2]
    store.append([KEYS[2]], OUTPUTS.take(np.array([2])))
    assert holds(store) and holds(open_store(tmp_path))


def test_an_embedding_that_is_damaged_after_it_was_found_stops_the_run_and_is_labelled_in_the_next(tmp_path):
    store = fill(tmp_path)
    outputs, _ = store.read(KEYS)
    change(store.path, 3, "record", bytes(38))
    with pytest.raises(RunError, match="1 embeddings are gone or damaged; run again"):
        _ = outputs.take(np.array([1, 2])).embeddings
    assert not open_store(tmp_path).read(KEYS)[1].all()


def test_open_stores_see_each_other_and_an_emptied_folder(tmp_path):
    first, second = open_store(tmp_path), open_store(tmp_path)
    first.append(KEYS, OUTPUTS)
    assert holds(second)
    outputs, _ = first.read(KEYS)
    for path in tmp_path.iterdir():
        path.unlink()
    assert not second.read(KEYS)[1].any()
    second.append(KEYS[::-1], OUTPUTS)
    assert holds(first, KEYS[::-1])
    with pytest.raises(RunError, match="40 embeddings are gone"):  # not those that now have their rows
        _ = outputs.embeddings


def write_and_read(folder: Path, first: int) -> bool:
    store = open_store(folder)
    for i in range(first, len(KEYS), 4):
        store.append([KEYS[i]], OUTPUTS.take(np.array([i])))
        store.read(KEYS)
    return holds(store, KEYS[first::4], OUTPUTS.take(np.arange(first, len(KEYS), 4)))


def test_several_processes_write_and_read_at_once(tmp_path):
    with PROCESSES.Pool(2) as pool:
        assert all(pool.starmap(write_and_read, [(tmp_path, first) for first in range(4)], chunksize=1))
    assert holds(open_store(tmp_path))


def append_and_die(folder: Path) -> None:
    store = open_store(folder)
    store.append(KEYS[:20], OUTPUTS.take(np.arange(20)))
    connection = sqlite3.connect(store.path)
    connection.execute("PRAGMA cache_size=1")  # the file is written before the transaction ends
    connection.executemany(module.INSERT, [(0, bytes(999)) for _ in range(500)])
    connection.execute("UPDATE outputs SET crc = 0")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_in_the_middle_of_an_append_loses_that_append_alone(tmp_path, caplog):
    process = PROCESSES.Process(target=append_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    store = open_store(tmp_path)
    assert Path(f"{store.path}-journal").exists()
    assert store.read(KEYS)[1].tolist() == [True] * 20 + [False] * 20
    with sqlite3.connect(store.path) as connection:
        assert connection.execute("SELECT max(row) FROM outputs").fetchone() == (20,)
    assert not caplog.records


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), "database or disk is full"])
def test_a_full_disk_is_told_in_one_sentence(tmp_path, monkeypatch, error):
    store = fill(tmp_path)
    if isinstance(error, str):
        store._open().execute(f"PRAGMA max_page_count={os.path.getsize(store.path) // 8192}")  # SQLite's own
    else:
        monkeypatch.setattr(store, "_open", lambda: (_ for _ in ()).throw(error))
    keys = [content_key((f"new {i}",)) for i in range(2000)]
    with pytest.raises(RunError, match="disk is full; free some space"):
        store.append(keys, make_outputs(2000))
    monkeypatch.undo()
    assert holds(store)


def test_a_file_that_stays_locked_is_told_and_not_replaced(tmp_path, monkeypatch):
    path = fill(tmp_path).path
    monkeypatch.setattr(module, "SECONDS_TO_WAIT", 0.01)
    store, writer = open_store(tmp_path), sqlite3.connect(path, isolation_level=None)
    writer.execute("BEGIN EXCLUSIVE")
    with pytest.raises(RunError, match="locked"):
        store.read(KEYS)
    writer.execute("ROLLBACK")
    assert holds(store)


def test_threads_read_on(tmp_path):
    store = open_store(tmp_path)
    fill(tmp_path)
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(lambda _: holds(store), range(20)))


@settings(max_examples=12)
@given(st.data())
def test_stored_embeddings_are_joined_and_taken_as_arrays_are(tmp_path_factory, data):
    rows = [np.array(part, int) for part in data.draw(st.lists(st.lists(st.integers(0, 39)), min_size=1, max_size=4))]
    stored = fill(tmp_path_factory.mktemp("store"))
    parts = [stored.read([KEYS[i] for i in r])[0] if n % 2 else OUTPUTS.take(r) for n, r in enumerate(rows)]
    joined, expected = join_outputs(parts), OUTPUTS.take(np.concatenate(rows))
    chosen = np.arange(len(joined))[::-2]
    again = join_outputs([joined.take(chosen), joined])
    assert np.array_equal(again.embeddings, np.concatenate([expected.embeddings[chosen], expected.embeddings]))
    assert np.array_equal(again.logits, np.concatenate([expected.logits[chosen], expected.logits]))
    assert again.embeddings.dtype == again.logits.dtype == np.float32


def test_joining_and_taking_read_no_stored_embedding(tmp_path, monkeypatch):
    outputs, _ = fill(tmp_path).read(KEYS)
    monkeypatch.setattr(OutputStore, "__getitem__", lambda *_: pytest.fail("an embedding was read"))
    assert len(join_outputs([outputs, OUTPUTS, outputs]).take(np.arange(30, 90))) == 60


def test_a_text_costs_four_bytes_a_class_two_a_dimension_and_little_else(tmp_path):
    store = OutputStore(tmp_path, 2, 384)
    keys = [content_key((str(i),)) for i in range(4000)]
    store.append(keys, TeacherOutputs(np.zeros((4000, 2), np.float32), np.zeros((4000, 384), np.float32)))
    assert store.path.stat().st_size / 4000 < 1.1 * (4 * 2 + 2 * 384)


def test_probabilities_are_a_softmax_in_float32():
    probabilities = OUTPUTS.probabilities(2.0)
    assert probabilities.dtype == np.float32
    assert np.allclose(probabilities, softmax(OUTPUTS.logits.astype(np.float64) / 2, axis=1))


def test_pairs_and_single_texts_never_share_a_key():
    assert content_key(("a", "b")) != content_key(("ab",)) != content_key(("a b",))
