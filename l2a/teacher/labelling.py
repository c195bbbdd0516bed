"""Teacher outputs and their cache: one SQLite file with a row per text, keyed by content.

A row is its key, a checksum and one record of numbers (4 bytes a class, 2 a dimension). A row that is damaged counts
as missing and is written again; a file that is damaged is set aside and replaced.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import sqlite3
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from scipy.special import softmax

from l2a.data.encoding import EncodedTexts, encode, inference_batches
from l2a.data.examples import TextInput
from l2a.teacher.model import Teacher
from l2a.util.errors import RunError, os_errors_as_run_error
from l2a.util.files import cache_root, cached_folder, fingerprint
from l2a.util.progress import SILENT, Progress
from l2a.util.training import arithmetic, evaluating, mixed_precision

KEY_BYTES = 16
READ_AT_ONCE = 4096
"""Rows in memory while they are checked."""
SECONDS_TO_WAIT = 300.0
"""A writer holds the file for less than a second: after this long it hangs."""
NO_DAMAGE = ("SQLITE_AUTH", "SQLITE_BUSY", "SQLITE_CANTOPEN", "SQLITE_IOERR", "SQLITE_LOCKED", "SQLITE_PERM")
# A write-ahead log needs memory that machines on a network disk do not share, so the journal is rolled back. It is
# set in words because one changed bit of the file can choose the other. A power cut costs one append at most.
SETUP = """PRAGMA page_size=8192; PRAGMA cache_size=-32768; PRAGMA journal_mode=DELETE; PRAGMA synchronous=NORMAL;
CREATE TABLE IF NOT EXISTS outputs (row INTEGER PRIMARY KEY, key INTEGER UNIQUE, crc INTEGER, record BLOB)"""
# CROSS keeps the order asked for, which mostly is the order written: then the file is read from front to back.
SELECT = "SELECT asked.key, crc, record FROM json_each(?) asked CROSS JOIN outputs ON outputs.key = asked.value"
COUNT = "SELECT count(outputs.crc) FROM json_each(?) asked CROSS JOIN outputs ON outputs.key = asked.value"
INSERT = "INSERT OR REPLACE INTO outputs (key, crc, record) VALUES (?, ?, ?)"
logger = logging.getLogger(__name__)


def content_key(text_input: TextInput) -> bytes:
    """Digest one text, of one or two strings, exactly to 16 bytes, case and spacing included."""
    joined = "\x1f".join(text_input).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(joined, digest_size=KEY_BYTES).digest()


class OutputStore:
    """Outputs of one teacher at one maximum length; processes and threads may read and append at the same time.

    The first half of a key finds the row, and the checksum covers the whole key, so that no text gets another's row.
    Readers wait while somebody writes. A store may be pickled; every thread opens a connection of its own.
    """

    def __init__(self, folder: Path, classes: int, width: int) -> None:
        """Name a store; nothing is opened yet.

        Args:
            folder: Where the file lives; its name should hold the teacher's fingerprint and the maximum length.
            classes: C.
            width: d.
        """
        self.path = folder / f"outputs-{classes}x{width}.sqlite"
        self.record = np.dtype([("logits", "<f4", (classes,)), ("embedding", "<f2", (width,))])
        # By process and thread; a forked child neither uses nor closes what its parent has opened.
        self._held: dict[tuple[int, int], tuple[object, sqlite3.Connection]] = {}
        self._arguments = folder, classes, width

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the place alone."""
        return OutputStore, self._arguments

    def read(self, keys: Sequence[bytes]) -> tuple["TeacherOutputs", NDArray[np.bool_]]:
        """Look texts up and check their rows; the embeddings stay on disk until they are asked for.

        Args:
            keys: N content keys.

        Returns:
            The outputs, with logits float32 (N, C) that are not numbers where a text is missing, and which texts are
            there undamaged, bool (N,).

        Raises:
            RunError: If the file cannot be opened or stays locked.
        """
        words, known = _as_words(keys), np.zeros(len(keys), np.bool_)
        logits = np.full((len(keys), *self.record["logits"].shape), np.nan, np.float32)
        for places, records in self.intact(words):
            logits[places], known[places] = records["logits"], True
        return TeacherOutputs(logits, StoredRows((self,), np.zeros(len(keys), np.int64), words)), known

    def append(self, keys: Sequence[bytes], outputs: "TeacherOutputs") -> None:
        """Add texts in one step: a process that is killed here leaves the store as it was.

        Args:
            keys: N content keys; a key that is there already gets the new outputs.
            outputs: Their outputs; the embeddings are rounded to float16.

        Raises:
            RunError: If the disk is full, or the file cannot be opened or stays locked.
        """
        records = np.empty(len(keys), self.record)
        records["logits"], records["embedding"] = outputs.logits, outputs.embeddings
        numbers, values = _as_words(keys)[:, 0].tolist(), [record.tobytes() for record in records]
        sums = [zlib.crc32(value, zlib.crc32(key)) for key, value in zip(keys, values, strict=True)]

        def insert(connection: sqlite3.Connection) -> None:
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.executemany(INSERT, zip(numbers, sums, values, strict=True))
                if connection.execute(COUNT, (json.dumps(numbers),)).fetchone()[0] < len(numbers):
                    raise sqlite3.DatabaseError("rows that were just written are not found")

        self._run(insert)

    def intact(self, words: NDArray[np.int64]) -> Iterator[tuple[list[int], NDArray[Any]]]:
        """Yield the positions of the keys that are there undamaged, and their records; words are int64 (N, 2)."""

        def select(connection: sqlite3.Connection) -> dict[int, bytes]:
            rows = connection.execute(SELECT, (numbers,)).fetchall()
            found = {
                place: record
                for place, crc, record in rows
                if isinstance(record, bytes) and zlib.crc32(record, zlib.crc32(keys[place])) == crc
            }
            if len(found) < len(rows):  # perhaps the index leads to a wrong row, which writing again would replace
                connection.execute("REINDEX")
            return found

        for start in range(0, len(words), READ_AT_ONCE):
            some = words[start : start + READ_AT_ONCE]
            numbers, keys = json.dumps(some[:, 0].tolist()), some.view(f"V{KEY_BYTES}")[:, 0].tolist()
            found = self._run(select)
            yield [start + place for place in found], np.frombuffer(b"".join(found.values()), self.record)

    def _run(self, action: Callable[[sqlite3.Connection], Any]) -> Any:
        """Do something with the file; once more with a new one if it turns out to be damaged."""
        with os_errors_as_run_error(self.path):
            try:
                return action(self._connection())
            except sqlite3.DatabaseError as error:
                self._refuse_or_replace(error)
            return action(self._connection())

    def _connection(self) -> sqlite3.Connection:
        """Return the connection of this process and thread, reopened if the file is another."""
        me = os.getpid(), threading.get_ident()
        if me not in self._held or self._held[me][0] != _file_number(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            number = _file_number(self.path)
            connection = sqlite3.connect(self.path, SECONDS_TO_WAIT, isolation_level=None, check_same_thread=False)
            connection.text_factory = bytes  # one changed bit makes text of a record
            self._held[me] = number, connection
            connection.executescript(SETUP)
        return self._held[me][1]

    def _refuse_or_replace(self, error: sqlite3.DatabaseError) -> None:
        """Put a damaged file aside, once however many processes see it; raise what is no damage."""
        number, connection = self._held.pop((os.getpid(), threading.get_ident()), (None, None))
        if connection:
            connection.close()
        name = getattr(error, "sqlite_errorname", "")
        if name == "SQLITE_FULL":
            raise OSError(errno.ENOSPC, str(error)) from error
        # One changed bit can make a file read-only; a mistake of ours is a ProgrammingError.
        locked = name.startswith("SQLITE_READONLY") and not os.access(self.path, os.W_OK)
        if locked or name.startswith(NO_DAMAGE) or isinstance(error, sqlite3.ProgrammingError):
            raise RunError(f"cannot use {self.path}: {error}; check the disk and other runs, then run again") from error
        with FileLock(f"{self.path}.lock"):
            if number == _file_number(self.path):  # else another process has done it
                logger.warning("%s is damaged (%s): its texts are labelled again", self.path, error)
                Path(f"{self.path}-journal").unlink(missing_ok=True)
                os.replace(self.path, f"{self.path}.damaged")


@dataclass(frozen=True)
class StoredRows:
    """Embeddings that are read when they are asked for.

    Attributes:
        sources: Stores, and arrays (n_i, d), at least one.
        owners: int64 (N,), the source of each text.
        words: int64 (N, 2), its content key in a store; in an array its row and anything.
    """

    sources: "tuple[OutputStore | NDArray[np.float32], ...]"
    owners: NDArray[np.int64]
    words: NDArray[np.int64]

    def take(self, indices: NDArray[np.int64]) -> "StoredRows":
        """Select rows by position, int64; nothing is read."""
        return StoredRows(self.sources, self.owners[indices], self.words[indices])

    def read(self) -> NDArray[np.float32]:
        """Read all rows, float32 (N, d).

        Raises:
            RunError: If a row is gone or damaged since it was found.
        """
        first = self.sources[0]
        width = first.record["embedding"].shape[0] if isinstance(first, OutputStore) else first.shape[1]
        rows = np.empty((len(self.owners), width), np.float32)
        for number, source in enumerate(self.sources):
            mine = np.flatnonzero(self.owners == number)
            if not isinstance(source, OutputStore):
                rows[mine] = source[self.words[mine, 0]]
                continue
            left = len(mine)
            for places, records in source.intact(self.words[mine]):
                rows[mine[places]], left = records["embedding"], left - len(places)
            if left:
                raise RunError(f"{source.path}: {left} embeddings are gone or damaged; run again to replace them")
        return rows


@dataclass(frozen=True)
class TeacherOutputs:
    """A teacher's outputs for N texts.

    Attributes:
        logits: float32 (N, C).
        states: float32 (N, d), the pooled last hidden state h_T(x), or where it is stored.
    """

    logits: NDArray[np.float32]
    states: NDArray[np.float32] | StoredRows

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.logits)

    @property
    def embeddings(self) -> NDArray[np.float32]:
        """The pooled last hidden state h_T(x), float32 (N, d); stored ones are read on every access."""
        return self.states.read() if isinstance(self.states, StoredRows) else self.states

    def take(self, indices: NDArray[np.int64]) -> "TeacherOutputs":
        """Select rows by position, int64; embeddings that are stored are not read."""
        states = self.states.take(indices) if isinstance(self.states, StoredRows) else self.states[indices]
        return TeacherOutputs(self.logits[indices], states)

    def probabilities(self, temperature: float = 1.0) -> NDArray[np.float32]:
        """Turn logits into class probabilities, float32 (N, C); a temperature above 1 softens them."""
        probabilities: NDArray[np.float32] = softmax(self.logits / np.float32(temperature), axis=1)
        return probabilities


Labeller = Callable[[Sequence[TextInput]], TeacherOutputs]
"""Labels texts with the teacher: cached by content, duplicates labelled once."""


def join_outputs(parts: Sequence[TeacherOutputs]) -> TeacherOutputs:
    """Lay one or more outputs of a teacher one behind another; embeddings that are stored are not read."""
    rows = [_stored(part.states) for part in parts]
    starts = np.cumsum([0, *(len(stored.sources) for stored in rows)])
    owners = np.concatenate([stored.owners + start for stored, start in zip(rows, starts, strict=False)])
    sources = tuple(source for stored in rows for source in stored.sources)
    states = StoredRows(sources, owners, np.concatenate([stored.words for stored in rows]))
    return TeacherOutputs(np.concatenate([part.logits for part in parts]), states)


def _stored(states: NDArray[np.float32] | StoredRows) -> StoredRows:
    if isinstance(states, StoredRows):
        return states
    return StoredRows((states,), np.zeros(len(states), np.int64), np.tile(np.arange(len(states))[:, None], 2))


def _as_words(keys: Sequence[bytes]) -> NDArray[np.int64]:
    return np.frombuffer(b"".join(keys), "<i8").reshape(-1, 2)


def _file_number(path: Path) -> int | None:
    """Tell one file from another of the same name."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_ino
    return None


RECIPE = 2
"""Raise it whenever ``run_teacher`` gives other numbers than before: cached labels and vectors are then made again."""
LABELLED_AT_ONCE = 16_384
"""Texts after which labels are written down: memory stays the same however many there are, and little work is lost."""


def predict(
    teacher: Teacher, inputs: Sequence[TextInput], max_length: int, progress: Progress = SILENT
) -> TeacherOutputs:
    """Run the teacher once over texts.

    Args:
        teacher: Any teacher; it is put in eval mode and left in the mode it came in.
        inputs: N texts.
        max_length: Longest sequence in tokens.
        progress: Shows how many texts are done.

    Returns:
        Logits and embeddings in the order of the texts.

    Raises:
        RunError: If a logit is not finite.
    """
    outputs = run_teacher(teacher, encode(teacher.tokenizer, inputs, max_length), progress)
    if not np.isfinite(outputs.logits).all():
        bad = int(np.flatnonzero(~np.isfinite(outputs.logits).all(axis=1))[0])
        raise RunError(f"teacher: its logits for text {bad} ({inputs[bad][0][:60]!r}) are not finite; train it again")
    return outputs


def run_teacher(teacher: Teacher, encoded: EncodedTexts, progress: Progress = SILENT) -> TeacherOutputs:
    """Run the teacher over token ids; the arguments are those of ``predict``, the texts in its tokens."""
    logits = np.zeros((len(encoded), len(teacher.label_names)), np.float32)
    embeddings = np.zeros((len(encoded), teacher.hidden_size), np.float32)
    device = next(teacher.parameters()).device
    stage = progress.stage("label with the teacher", len(encoded))
    # One context around all batches: the weights are rounded once, not for every batch.
    with evaluating(teacher), torch.inference_mode(), mixed_precision(device), stage as advance:
        for indices in inference_batches(encoded):
            batch_logits, pooled = teacher(encoded.padded(indices, device))
            logits[indices], embeddings[indices] = batch_logits.float().cpu().numpy(), pooled.float().cpu().numpy()
            advance(len(indices))
    return TeacherOutputs(logits, embeddings)


def token_vectors(teacher: Teacher, progress: Progress = SILENT) -> NDArray[np.float32]:
    """Read the teacher's embedding of each token of the vocabulary alone, float32 (V, d); computed once and cached."""
    size, frame = len(teacher.tokenizer), np.array(teacher.tokenizer("")["input_ids"], np.int32)  # such as [CLS] [SEP]
    ids = np.insert(np.tile(frame, (size, 1)), (len(frame) + 1) // 2, np.arange(size), axis=1)
    ends = np.arange(size + 1) * ids.shape[1]
    encoded = EncodedTexts(ids.ravel(), np.zeros(ids.size, np.int8), ends, teacher.tokenizer.pad_token_id)

    def build(folder: Path) -> None:
        np.save(folder / "vectors.npy", run_teacher(teacher, encoded, progress).embeddings)

    folder = cached_folder("token_vectors", _key(teacher), build)
    vectors: NDArray[np.float32] = np.load(folder / "vectors.npy", allow_pickle=False)
    return vectors


def _key(teacher: Teacher, *more: int) -> str:
    """Name what a teacher says: by its weights, the recipe and the arithmetic."""
    return fingerprint(teacher.fingerprint(), RECIPE, arithmetic(next(teacher.parameters()).device), *more)


def cached_labeller(teacher: Teacher, max_length: int, progress: Progress = SILENT) -> Labeller:
    """Make a labeller that asks the fine-tuned teacher only about texts that it has never seen."""
    folder = cache_root() / "predictions" / _key(teacher, max_length)
    store = OutputStore(folder, len(teacher.label_names), teacher.hidden_size)

    def label(inputs: Sequence[TextInput]) -> TeacherOutputs:
        keys = [content_key(text) for text in inputs]
        for _ in range(3):  # a file that proves damaged while it is written to starts again, without its old rows
            outputs, known = store.read(keys)
            if known.all():
                return outputs
            new = {key: text for key, text, is_known in zip(keys, inputs, known, strict=True) if not is_known}
            new_keys = list(new)
            for start in range(0, len(new_keys), LABELLED_AT_ONCE):
                some = new_keys[start : start + LABELLED_AT_ONCE]
                store.append(some, predict(teacher, [new[key] for key in some], max_length, progress))
        raise RunError(f"{folder}: what was just written there is gone or damaged; check the disk and run again")

    return label
