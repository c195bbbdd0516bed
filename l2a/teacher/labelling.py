"""Teacher outputs and their cache: one SQLite file with a row per text, keyed by content.

A row is a checksum and one record (16 bytes of key, 4 a class, 2 a dimension). A row that is damaged counts as missing
and is written again; a file that is damaged is set aside and replaced.
"""

import errno
import hashlib
import json
import logging
import os
import sqlite3
import threading
import zlib
from collections.abc import Callable, Sequence
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

SECONDS_TO_WAIT = 300.0
"""A writer holds the file for less than a second: after this long it hangs."""
NO_DAMAGE = ("SQLITE_AUTH", "SQLITE_BUSY", "SQLITE_CANTOPEN", "SQLITE_IOERR", "SQLITE_LOCKED", "SQLITE_PERM")
# A write-ahead log needs memory that machines on a network disk do not share, so the journal is rolled back. It is
# set in words because one changed bit of the file can choose the other. A power cut costs one append at most.
SETUP = """PRAGMA page_size=8192; PRAGMA cache_size=-32768; PRAGMA journal_mode=DELETE; PRAGMA synchronous=NORMAL;
CREATE TABLE IF NOT EXISTS outputs (row INTEGER PRIMARY KEY, crc INTEGER, record BLOB)"""
INSERT = "INSERT INTO outputs (crc, record) VALUES (?, ?)"
# One changed bit makes text or nothing of a record. CROSS keeps the order of the rows that are asked for.
SCAN = "SELECT row, crc, record FROM outputs WHERE row > ? AND typeof(record) = 'blob'"
SELECT = """SELECT crc, record FROM json_each(?) asked CROSS JOIN outputs ON outputs.row = asked.value
WHERE typeof(record) = 'blob'"""
AT_ONCE = 4096
"""Rows in memory while they are checked."""
logger = logging.getLogger(__name__)


def content_key(text_input: TextInput) -> bytes:
    """Digest one text, of one or two strings, exactly to 16 bytes, case and spacing included."""
    return hashlib.blake2b("\x1f".join(text_input).encode("utf-8", "surrogatepass"), digest_size=16).digest()


class OutputStore:
    """Outputs of one teacher at one maximum length; processes and threads may read and append at the same time.

    Rows are only ever added; the last one of a text counts. Keys and logits stay in memory once they were read.
    """

    def __init__(self, folder: Path, classes: int, width: int) -> None:
        """Name a store of C classes and width d in a folder; nothing is opened yet."""
        self.path = folder / f"rows-{classes}x{width}.sqlite"
        self.record = np.dtype([("key", "V16"), ("logits", "<f4", (classes,)), ("embedding", "<f2", (width,))])
        self._lock, self._number, self._last = threading.Lock(), 0, 0  # of the file that is open, and its last row read
        self._places: dict[bytes, int] = {}
        # By place, and place 0 is that of unknown texts.
        self._rows, self._logits = np.zeros(1, np.int64), np.full((1, classes), np.nan, np.float32)

    def read(self, keys: Sequence[bytes]) -> tuple["TeacherOutputs", NDArray[np.bool_]]:
        """Look texts up; the embeddings stay on disk until they are asked for.

        Args:
            keys: N content keys.

        Returns:
            The outputs, with logits float32 (N, C) that are not numbers where a text is missing, and which texts are
            there undamaged, bool (N,).

        Raises:
            RunError: If the file cannot be opened or stays locked.
        """

        def look_up(connection: sqlite3.Connection) -> NDArray[np.int64]:
            added = connection.execute(SCAN, (self._last,))
            while some := added.fetchmany(AT_ONCE):
                self._last = some[-1][0]
                intact = [(row, record) for row, crc, record in some if zlib.crc32(record) == crc]
                records = np.frombuffer(b"".join(record for _, record in intact), self.record)
                places = range(len(self._rows), len(self._rows) + len(records))
                self._places |= zip(records["key"].tolist(), places, strict=True)
                self._rows = np.append(self._rows, np.array([row for row, _ in intact], np.int64))
                self._logits = np.append(self._logits, records["logits"], axis=0)
            return np.array([self._places.get(key, 0) for key in keys], np.int64)

        places = self._run(look_up)
        states = StoredRows((self,), np.zeros(len(keys), np.int64), places)
        return TeacherOutputs(self._logits[places], states), places > 0

    def append(self, keys: Sequence[bytes], outputs: "TeacherOutputs") -> None:
        """Add N texts by their keys in one step: a process that is killed here leaves the store as it was.

        Raises:
            RunError: If the disk is full, or the file cannot be opened or stays locked.
        """
        records = np.empty(len(keys), self.record)
        records["key"] = np.array(keys, "V16")
        records["logits"], records["embedding"] = outputs.logits, outputs.embeddings
        rows = [(zlib.crc32(record), record) for record in [record.tobytes() for record in records]]

        def insert(connection: sqlite3.Connection) -> None:
            with connection:
                connection.executemany(INSERT, rows)

        self._run(insert)

    def __getitem__(self, places: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read embeddings, float32 (N, d), by the places, int64 (N,), that ``read`` gave to texts.

        Raises:
            RunError: If a row is gone or damaged since it was found.
        """
        found = np.empty((len(places), *self.record["embedding"].shape), np.float32)

        def fill(connection: sqlite3.Connection) -> int:
            left = len(places)
            for start in range(0, len(places), AT_ONCE):
                asked = self._rows[places[start : start + AT_ONCE]].tolist()
                rows = connection.execute(SELECT, (json.dumps(asked),))
                records = [record for crc, record in rows if zlib.crc32(record) == crc]
                if len(records) == len(asked):
                    found[start : start + AT_ONCE] = np.frombuffer(b"".join(records), self.record)["embedding"]
                left -= len(records)
            return left

        if left := self._run(fill):
            raise RunError(f"{self.path}: {left} embeddings are gone or damaged; run again to replace them")
        return found

    def _run(self, action: Callable[[sqlite3.Connection], Any]) -> Any:
        """Do something with the file; once more with a new one if it turns out to be damaged."""
        with self._lock, os_errors_as_run_error(self.path):
            try:
                return action(self._open())
            except sqlite3.DatabaseError as error:
                self._refuse_or_replace(error)
            return action(self._open())

    def _open(self) -> sqlite3.Connection:
        """Return the connection, a new one if the file is another than before."""
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
        if self._number != (number := self.path.stat().st_ino):
            self._connection = sqlite3.connect(
                self.path, SECONDS_TO_WAIT, isolation_level="IMMEDIATE", check_same_thread=False
            )
            self._number, self._last, self._places = number, 0, {}
            self._rows[:] = 0
            self._connection.executescript(SETUP)
        return self._connection

    def _refuse_or_replace(self, error: sqlite3.DatabaseError) -> None:
        """Put a damaged file aside, once however many processes see it; raise what is no damage."""
        name, number = getattr(error, "sqlite_errorname", ""), self._number
        self._connection.close()
        self._number = 0
        if name == "SQLITE_FULL":
            raise OSError(errno.ENOSPC, str(error)) from error
        # One changed bit can make a file read-only.
        if name.startswith(NO_DAMAGE) or (name.startswith("SQLITE_READONLY") and not os.access(self.path, os.W_OK)):
            raise RunError(f"cannot use {self.path}: {error}; check the disk and other runs, then run again") from error
        with FileLock(f"{self.path}.lock"):
            if self.path.exists() and self.path.stat().st_ino == number:  # else another process has done it
                logger.warning("%s is damaged (%s): its texts are labelled again", self.path, error)
                Path(f"{self.path}-journal").unlink(missing_ok=True)
                os.replace(self.path, f"{self.path}.damaged")


@dataclass(frozen=True)
class StoredRows:
    """Embeddings that are read when ``numpy.asarray`` asks for them.

    Attributes:
        sources: Stores, and arrays (n_i, d), at least one.
        owners: int64 (N,), the source of each text.
        places: int64 (N,), its place in that source.
    """

    sources: "tuple[OutputStore | NDArray[np.float32], ...]"
    owners: NDArray[np.int64]
    places: NDArray[np.int64]

    def __getitem__(self, indices: NDArray[np.int64]) -> "StoredRows":
        """Select rows by position, int64; nothing is read."""
        return StoredRows(self.sources, self.owners[indices], self.places[indices])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[np.float32]:
        """Read all rows, float32 (N, d)."""
        parts = [source[self.places[self.owners == number]] for number, source in enumerate(self.sources)]
        rows = np.empty((len(self.owners), parts[0].shape[1]), np.float32)
        for number, part in enumerate(parts):
            rows[self.owners == number] = part
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
        return np.asarray(self.states)

    def take(self, indices: NDArray[np.int64]) -> "TeacherOutputs":
        """Select rows by position, int64; embeddings that are stored are not read."""
        return TeacherOutputs(self.logits[indices], self.states[indices])

    def probabilities(self, temperature: float = 1.0) -> NDArray[np.float32]:
        """Turn logits into class probabilities, float32 (N, C); a temperature above 1 softens them."""
        probabilities: NDArray[np.float32] = softmax(self.logits / np.float32(temperature), axis=1)
        return probabilities


Labeller = Callable[[Sequence[TextInput]], TeacherOutputs]
"""Labels texts with the teacher: cached by content, duplicates labelled once."""


def join_outputs(parts: Sequence[TeacherOutputs]) -> TeacherOutputs:
    """Lay one or more outputs of a teacher one behind another; embeddings that are stored are not read."""
    sources: list[Any] = []
    owners, places = list[NDArray[np.int64]](), list[NDArray[np.int64]]()
    for part in parts:
        known = part.states
        if not isinstance(known, StoredRows):
            known = StoredRows((known,), np.zeros(len(part), np.int64), np.arange(len(part)))
        owners.append(known.owners + len(sources))
        places.append(known.places)
        sources += known.sources
    states = StoredRows(tuple(sources), np.concatenate(owners), np.concatenate(places))
    return TeacherOutputs(np.concatenate([part.logits for part in parts]), states)


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
