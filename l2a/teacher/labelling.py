"""Labels texts with the teacher: cached by content, duplicates labelled once, batches of similar length."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from l2a.data.encoding import EncodedTexts, encode, inference_batches
from l2a.data.examples import TextInput
from l2a.teacher.model import Teacher
from l2a.teacher.store import Labeller, OutputStore, TeacherOutputs, content_key
from l2a.util.errors import RunError
from l2a.util.files import cache_root, cached_folder, fingerprint
from l2a.util.progress import SILENT, Progress
from l2a.util.training import arithmetic, mixed_precision

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
    device, training = next(teacher.parameters()).device, teacher.training
    teacher.eval()
    stage = progress.stage("label with the teacher", len(encoded))
    # One context around all batches: the weights are rounded once, not for every batch.
    with torch.inference_mode(), mixed_precision(device), stage as advance:
        for indices in inference_batches(encoded):
            batch_logits, pooled = teacher(encoded.padded(indices, device))
            logits[indices], embeddings[indices] = batch_logits.float().cpu().numpy(), pooled.float().cpu().numpy()
            advance(len(indices))
    teacher.train(training)
    return TeacherOutputs(logits, embeddings)


def token_vectors(teacher: Teacher, progress: Progress = SILENT) -> NDArray[np.float32]:
    """Read one vector for each token of the vocabulary: the teacher's embedding of the token alone.

    Args:
        teacher: The fine-tuned teacher.
        progress: Shows how many tokens are done.

    Returns:
        float32 (V, d); computed once for each teacher and then read from the cache.
    """
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
    """Make a labeller that asks the teacher only about texts that it has never seen.

    Args:
        teacher: The fine-tuned teacher.
        max_length: Longest sequence in tokens.
        progress: Shows how many texts are done.

    Returns:
        A function from texts to outputs.
    """
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
