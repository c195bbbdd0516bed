"""Teacher outputs and their cache: one SQLite file with a row per text, keyed by content.

A row is a checksum and one record (16 bytes of key, 4 a class, 2 a dimension). A row that is damaged counts as missing
and is written again; a file that is damaged is set aside and replaced.
"""

import copy
import hashlib
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
from scipy.special import softmax

from l2a.data import Bools, Examples, Floats, Ints, TextInput
from l2a.data.encoding import EncodedTexts, encode, inference_batches
from l2a.teacher.finetune import LowerStates, lower_states, upper_layers
from l2a.teacher.model import Teacher
from l2a.util import SILENT, Progress, RunError, cluster, errors, files, fingerprint, logger, training

# A writer holds the file for less than a second: after this long it hangs.
SECONDS_TO_WAIT = 300.0
NO_DAMAGE = tuple(f"SQLITE_{name}" for name in ("AUTH", "BUSY", "CANTOPEN", "FULL", "IOERR", "LOCKED", "PERM"))
# A write-ahead log needs memory that machines on a network disk do not share, so the journal is rolled back. It is
# set in words because one changed bit of the file can choose the other. A power cut costs one append at most.
SETUP = """PRAGMA page_size=8192; PRAGMA cache_size=-32768; PRAGMA journal_mode=DELETE; PRAGMA synchronous=NORMAL;
CREATE TABLE IF NOT EXISTS outputs (row INTEGER PRIMARY KEY, crc INTEGER, record BLOB)"""
INSERT = "INSERT INTO outputs (crc, record) VALUES (?, ?)"
# One changed bit makes text or nothing of a record. CROSS keeps the order of the request.
ADDED = "SELECT row, crc, record FROM outputs WHERE row > ? AND typeof(record) = 'blob'"
ASKED = """SELECT row, crc, record FROM json_each(?) asked CROSS JOIN outputs ON row = value
WHERE typeof(record) = 'blob'"""


def content_key(text_input: TextInput) -> bytes:
    """Digest one text, of one or two strings, exactly to 16 bytes, case and spacing included."""
    return hashlib.blake2b("\x1f".join(text_input).encode("utf-8", "surrogatepass"), digest_size=16).digest()


class OutputStore:
    """Outputs of one teacher at one maximum length; several processes may read and append at the same time.

    Rows are only ever added; the last one of a text counts. Keys and logits stay in memory once they were read.
    """

    def __init__(self, folder: Path, classes: int, width: int) -> None:
        """Name a store of C classes and width d in a folder; nothing is opened yet."""
        self.path = folder / f"rows-{classes}x{width}.sqlite"
        self.record = np.dtype([("key", "V16"), ("logits", "<f4", (classes,)), ("embedding", "<f2", (width,))])
        self._lock = threading.RLock()  # Python 3.13 mixes up threads that run one statement of a connection at once
        self._number = self._last = 0  # of the file that is open, and its last row that was read
        # A known text has a place in these arrays; place 0 is that of unknown texts.
        self._places: dict[bytes, int] = {}
        self._rows, self._logits = np.zeros(1, np.int64), np.full((1, classes), np.nan, np.float32)

    def read(self, keys: Sequence[bytes]) -> tuple["TeacherOutputs", Bools]:
        """Look N texts up by their keys; the embeddings stay on disk until they are read.

        Returns:
            The outputs, with logits float32 (N, C) that are not numbers where a text is missing, and which texts are
            there undamaged, bool (N,).

        Raises:
            RunError: If the file cannot be opened or stays locked.
        """

        def note_added(connection: sqlite3.Connection) -> None:
            for rows, records in self._intact(connection.execute(ADDED, (self._last,))):
                self._places |= {key: place for place, key in enumerate(records["key"].tolist(), len(self._rows))}
                self._rows, self._last = np.append(self._rows, rows), int(rows[-1])
                self._logits = np.append(self._logits, records["logits"], axis=0)

        with self._lock:
            self._run(note_added)
            places = np.array([self._places.get(key, 0) for key in keys], np.int64)
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

    def __getitem__(self, places: Ints) -> Floats:
        """Read embeddings, float32 (N, d), by the places, int64 (N,), that ``read`` gave to texts.

        Raises:
            RunError: If a row is gone or damaged since it was found.
        """

        def select(connection: sqlite3.Connection) -> list[Floats]:
            asked = connection.execute(ASKED, (str(self._rows[places].tolist()),))  # as JSON
            return [records["embedding"].astype(np.float32) for _, records in self._intact(asked)]

        found = np.concatenate([np.zeros((0, *self.record["embedding"].shape), np.float32), *self._run(select)])
        if lost := len(places) - len(found):
            raise RunError(f"{self.path}: {lost} embeddings are gone or damaged; run again to replace them")
        return found

    def _intact(self, selected: sqlite3.Cursor) -> Iterator[tuple[Ints, np.typing.NDArray[Any]]]:
        """Yield the numbers of the rows that are undamaged and their records, some at a time."""
        while some := selected.fetchmany(4096):
            if intact := [(row, record) for row, crc, record in some if zlib.crc32(record) == crc]:
                rows, records = zip(*intact, strict=True)
                yield np.array(rows), np.frombuffer(b"".join(records), self.record)

    def _run(self, action: Callable[[sqlite3.Connection], Any]) -> Any:
        """Do something with the file; once more with a new one if it turns out to be damaged."""
        with self._lock, errors.writing(self.path):
            try:
                return action(self._open())
            except sqlite3.DatabaseError as error:
                self._refuse_or_replace(error)
            return action(self._open())

    def _open(self) -> sqlite3.Connection:
        """Return the connection, a new one if the file is another than before."""
        if not self.path.exists():
            self.path.touch()
        number = self.path.stat().st_ino
        if number != self._number:
            self._connection = sqlite3.connect(
                self.path, SECONDS_TO_WAIT, isolation_level="IMMEDIATE", check_same_thread=False
            )
            self._number, self._last, self._places = number, 0, {}
            self._rows[:] = 0
            self._connection.executescript(SETUP)
            # A page that was cut short may be read by one query and not by the next.
            if (found := self._connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(found)
        return self._connection

    def _refuse_or_replace(self, error: sqlite3.DatabaseError) -> None:
        """Put a damaged file aside, once however many processes see it; raise what is no damage."""
        name, number, self._number = getattr(error, "sqlite_errorname", ""), self._number, 0
        self._connection.close()
        # One changed bit can make a file read-only.
        if name.startswith(NO_DAMAGE) or (name.startswith("SQLITE_READONLY") and not os.access(self.path, os.W_OK)):
            raise RunError(f"cannot use {self.path}: {error}; free some space, wait for other runs, or check the disk")
        with FileLock(f"{self.path}.lock"):
            if self.path.exists() and self.path.stat().st_ino == number:  # else another process has done it
                logger.warning("%s is damaged (%s): its texts are labelled again", self.path, error)
                Path(f"{self.path}-journal").unlink(missing_ok=True)
                os.replace(self.path, f"{self.path}.damaged")


@dataclass(frozen=True)
class StoredRows:
    """Embeddings that are read when ``numpy.asarray`` asks for them.

    Attributes:
        sources: At least one store, array (n, d), or other stored rows.
        owners: int64 (N,), the source of each text.
        places: int64 (N,), its place in that source.
    """

    sources: "tuple[OutputStore | Floats | StoredRows, ...]"
    owners: Ints
    places: Ints

    def __getitem__(self, indices: Ints) -> "StoredRows":
        """Select rows by position, int64; nothing is read."""
        return StoredRows(self.sources, self.owners[indices], self.places[indices])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Floats:
        """Read all rows, float32 (N, d)."""
        parts = [np.asarray(source[self.places[self.owners == i]]) for i, source in enumerate(self.sources)]
        by_owner = np.argsort(self.owners, kind="stable")  # as the parts have them
        return np.concatenate(parts)[np.argsort(by_owner)]


@dataclass(frozen=True)
class TeacherOutputs:
    """A teacher's outputs for N texts.

    Attributes:
        logits: float32 (N, C).
        states: float32 (N, d), the pooled last hidden state h_T(x), or where it is stored.
    """

    logits: Floats
    states: Floats | StoredRows

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.logits)

    @property
    def embeddings(self) -> Floats:
        """The pooled last hidden state h_T(x), float32 (N, d); stored ones are read on every access."""
        return np.asarray(self.states)

    def take(self, indices: Ints) -> "TeacherOutputs":
        """Select rows by position, int64; embeddings that are stored are not read."""
        return TeacherOutputs(self.logits[indices], self.states[indices])

    def probabilities(self, temperature: float = 1.0) -> Floats:
        """Turn logits into class probabilities, float32 (N, C); a temperature above 1 softens them."""
        return np.asarray(softmax(self.logits / np.float32(temperature), axis=1))


Labeller = Callable[[Sequence[TextInput]], TeacherOutputs]
"""Labels texts with the teacher: cached by content, duplicates labelled once."""


def join_outputs(parts: Sequence[TeacherOutputs]) -> TeacherOutputs:
    """Lay one or more outputs of a teacher one behind another; embeddings that are stored are not read."""
    owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    places = np.concatenate([np.arange(len(part)) for part in parts])
    states = StoredRows(tuple(part.states for part in parts), owners, places)
    return TeacherOutputs(np.concatenate([part.logits for part in parts]), states)


# Raise it whenever ``run_teacher`` gives other numbers than before: cached labels and vectors are then made again.
RECIPE = 2
# Texts of a piece of work on a cluster.
SENT_AT_ONCE = 256
# Texts after which labels are written down: memory stays the same however many there are, and little work is lost.
LABELLED_AT_ONCE = 16_384


def predict(
    teacher: Teacher, inputs: Sequence[TextInput], max_length: int, progress: Progress = SILENT,
    frozen: int | None = None,
) -> TeacherOutputs:  # fmt: skip
    """Run the teacher once over N texts of at most ``max_length`` tokens.

    Args:
        teacher: Any teacher; it is put in eval mode and left in the mode it came in.
        inputs: The texts.
        max_length: Longest sequence in tokens.
        progress: Shows how many texts are done.
        frozen: Lowest layers that no training changed: where their states of these texts are kept, they are not run.

    Raises:
        RunError: If a logit is not finite.
    """
    states = lower_states(teacher, frozen or 0, inputs, max_length, only_kept=True)
    model = upper_layers(teacher, frozen or 0) if states else teacher
    outputs = run_teacher(model, states or encode(teacher.tokenizer, inputs, max_length), progress)
    for bad in map(int, np.flatnonzero(~np.isfinite(outputs.logits).all(axis=1))):
        raise RunError(f"teacher: its logits for text {bad} ({inputs[bad][0][:60]!r}) are not finite; train it again")
    return outputs


def run_teacher(teacher: Teacher, encoded: EncodedTexts | LowerStates, progress: Progress = SILENT) -> TeacherOutputs:
    """Run a teacher over token ids, or its upper layers over the states that the frozen ones gave."""
    logits = np.zeros((len(encoded), len(teacher.label_names)), np.float32)
    embeddings = np.zeros((len(encoded), teacher.hidden_size), np.float32)
    device = next(teacher.parameters()).device
    stage = progress.stage("label with the teacher", len(encoded))
    # One context around all batches: the weights are rounded once, not for every batch.
    with training.evaluating(teacher), torch.no_grad(), training.mixed_precision(device), stage as advance:
        for indices in inference_batches(encoded):
            found = teacher(encoded.padded(indices, device))
            logits[indices], embeddings[indices] = (part.float().cpu().numpy() for part in found)
            advance(len(indices))
    return TeacherOutputs(logits, embeddings)


def token_vectors(teacher: Teacher, progress: Progress = SILENT) -> Floats:
    """Read the teacher's embedding of each token of the vocabulary alone, float32 (V, d); computed once and cached."""
    size, frame = len(teacher.tokenizer), np.array(teacher.tokenizer("")["input_ids"], np.int32)  # such as [CLS] [SEP]
    ids = np.insert(np.tile(frame, (size, 1)), (len(frame) + 1) // 2, np.arange(size), axis=1)
    ends = np.arange(size + 1) * ids.shape[1]
    encoded = EncodedTexts(ids.ravel(), np.zeros(ids.size, np.int8), ends, teacher.tokenizer.pad_token_id)

    def build(folder: Path) -> None:
        np.save(folder / "vectors.npy", run_teacher(teacher, encoded, progress).embeddings)

    folder = files.cached_folder("token_vectors", _key(teacher), build)
    return np.asarray(np.load(folder / "vectors.npy", allow_pickle=False))


def _key(teacher: Teacher, *more: int) -> str:
    """Name what a teacher says: by its weights, the recipe and the arithmetic."""
    return fingerprint(teacher.fingerprint(), RECIPE, training.arithmetic(next(teacher.parameters()).device), *more)


def cached_labeller(
    teacher: Teacher, max_length: int, progress: Progress = SILENT, frozen: int | None = None, client: Any = None
) -> Labeller:
    """Make a labeller that asks the fine-tuned teacher only about texts that it has never seen.

    Args:
        teacher: The teacher.
        max_length: Longest sequence in tokens.
        progress: Shows how many texts are done.
        frozen: Lowest layers that no training changed, whose states may be kept.
        client: Of Dask, whose workers get the teacher and label; None for this process.
    """
    folder = files.cache_root() / "predictions" / _key(teacher, max_length)
    store = OutputStore(folder, len(teacher.label_names), teacher.hidden_size)

    def label(inputs: Sequence[TextInput]) -> TeacherOutputs:
        keys = [content_key(text) for text in inputs]
        for _ in range(3):  # a file that proves damaged while it is written to starts again, without its old rows
            outputs, known = store.read(keys)
            if known.all():
                return outputs
            new = list({keys[place]: inputs[place] for place in map(int, np.flatnonzero(~known))}.items())
            count = LABELLED_AT_ONCE if client is None else SENT_AT_ONCE
            pieces: list[Any] = [[*zip(*new[i : i + count], strict=True)] for i in range(0, len(new), count)]
            if client is None:
                for some_keys, texts in pieces:
                    store.append(some_keys, predict(teacher, texts, max_length, progress, frozen))
                continue
            sent = copy.deepcopy(teacher).cpu(), max_length, training.arithmetic(next(teacher.parameters()).device)
            with progress.stage("label with the teacher", len(new)) as advance:
                for some_keys, found in cluster.spread(client, _predict_there, sent, pieces):
                    store.append(some_keys, found)
                    advance(len(some_keys))
        raise RunError(f"{folder}: what was just written there is gone or damaged; check the disk and run again")

    return label


def _predict_there(sent: tuple[Teacher, int, str], texts: Sequence[TextInput]) -> TeacherOutputs:
    """Label in a process of a cluster, whose labels are kept as this one's and have to be computed alike."""
    teacher, max_length, expected = sent
    if (found := training.arithmetic(training.best_device())) != expected:
        raise RunError(f"a worker of the cluster computes in {found}, this process in {expected}; use workers alike")
    return predict(teacher.to(training.best_device()), texts, max_length)


def refuse_useless_teacher(labeller: Labeller, reward: Examples, progress: Progress = SILENT) -> None:
    """Stop before distilling a teacher that knows nothing of the target.

    Args:
        labeller: The teacher.
        reward: Labelled target examples that it was not trained on.
        progress: Gets the accuracy.

    Raises:
        RunError: If it is below chance by more than a standard error; near chance it is a warning.
    """
    if not len(reward):
        logger.warning("teacher: no label is held out to tell whether it knows the target; give --dev-shots 8")
        return
    chance = 1 / len(reward.label_names)
    accuracy = float(np.mean(labeller(reward.inputs).logits.argmax(axis=1) == reward.labels))
    progress.event("teacher_on_reward_split", accuracy=accuracy, chance=chance)
    fix = "check that the labels of source and target mean the same, give more --shots, or choose another --teacher"
    found = f"it is right on {accuracy:.0%} of {len(reward)} held-out target examples, chance is {chance:.0%}"
    standard_error = (chance * (1 - chance) / len(reward)) ** 0.5
    if accuracy < chance - standard_error:
        raise RunError(f"teacher: {found}; {fix}")
    if accuracy < chance + 2 * standard_error:
        logger.warning("teacher: %s; %s", found, fix)
