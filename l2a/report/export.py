"""The student's folder: an ordinary transformers model that loads without this package."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from l2a.data.encoding import EncodedTexts, encode
from l2a.data.examples import TextInput
from l2a.util.errors import RunError
from l2a.util.files import atomic_folder, atomic_write_bytes, atomic_write_text

TOLERANCE = 1e-4


def export_student(model: Any, tokenizer: Any, folder: Path, card: str) -> None:
    """Save a classifier with its tokenizer and its card.

    Args:
        model: A sequence classification model of transformers whose config names the classes.
        tokenizer: Its tokenizer.
        folder: Destination; an existing one is replaced.
        card: The text of README.md.

    Raises:
        RunError: If the disk is full; nothing is left behind.
    """
    with atomic_folder(folder) as temporary:
        model.save_pretrained(str(temporary))
        tokenizer.save_pretrained(str(temporary))
        atomic_write_text(temporary / "README.md", card)


def check_parity(model: Any, tokenizer: Any, folder: Path, inputs: Sequence[TextInput], max_length: int) -> float:
    """Compare a model with its saved copy, each with its own tokenizer.

    Args:
        model: The model in memory, on the CPU; it keeps the mode, training or not, that it came in.
        tokenizer: Its tokenizer.
        folder: The saved copy.
        inputs: Texts to compare on, at least one.
        max_length: Longest sequence in tokens.

    Returns:
        The largest absolute difference of the logits.

    Raises:
        RunError: If the classes have other names, or the difference is above 1e-4 or not a number.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    saved = AutoModelForSequenceClassification.from_pretrained(str(folder), local_files_only=True)
    saved_tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    if saved.config.id2label != model.config.id2label:
        raise RunError(f"student: it was saved with the classes {saved.config.id2label}, not {model.config.id2label}")
    before = _logits(model, encode(tokenizer, inputs, max_length))
    after = _logits(saved, encode(saved_tokenizer, inputs, max_length))
    difference = float((before - after).abs().max())
    if not difference <= TOLERANCE:  # also true of a NaN
        raise RunError(
            f"student: the saved model's logits differ from the trained one's by {difference:.2g}, at most {TOLERANCE} "
            "is allowed; its architecture does not keep all its weights when saved: choose another --student"
        )
    return difference


def _logits(model: Any, encoded: EncodedTexts) -> torch.Tensor:
    batch = encoded.padded(np.arange(len(encoded)))
    if not getattr(model.config, "type_vocab_size", 0):
        del batch["token_type_ids"]
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            logits: torch.Tensor = model(**batch).logits
    finally:
        model.train(was_training)
    return logits


SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("text_pair", pa.string()),
        ("origin", pa.string()),
        ("operator", pa.string()),
        ("degree", pa.float32()),
        ("teacher_probabilities", pa.list_(pa.float32())),
        ("selector_score", pa.float32()),
        ("kept", pa.bool_()),
        ("round", pa.int32()),
    ]
)


@dataclass(frozen=True)
class Augmentations:
    """One round's N candidates with the selector's verdict.

    Attributes:
        inputs: The texts, all single or all pairs.
        origins: The text that each was made from, such as "source:17".
        operators: What made each.
        degrees: float32 (N,), realised share of changed tokens.
        teacher_probabilities: float32 (N, C).
        selector_scores: float32 (N,), higher is better.
        kept: bool (N,), True for those that the student was trained on; of a rule that scores anew, its last choice.
    """

    inputs: Sequence[TextInput]
    origins: Sequence[str]
    operators: Sequence[str]
    degrees: NDArray[np.float32]
    teacher_probabilities: NDArray[np.float32]
    selector_scores: NDArray[np.float32]
    kept: NDArray[np.bool_]


def write_augmentations(path: Path, rounds: Sequence[Augmentations]) -> None:
    """Write all candidates, one a line, kept or not.

    Args:
        path: Destination, a Parquet file.
        rounds: In order, numbered from 0; none gives a file without lines.

    Raises:
        RunError: If the disk is full.
    """
    tables = [pa.table(_columns(number, candidates), schema=SCHEMA) for number, candidates in enumerate(rounds)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.concat_tables([SCHEMA.empty_table(), *tables]), sink)
    atomic_write_bytes(path, sink.getvalue().to_pybytes())


def _columns(number: int, candidates: Augmentations) -> dict[str, Any]:
    texts = candidates.inputs
    return {
        "text": [_storable(text[0]) for text in texts],
        "text_pair": [_storable(text[1]) if len(text) == 2 else None for text in texts],
        "origin": list(candidates.origins),
        "operator": list(candidates.operators),
        "degree": np.asarray(candidates.degrees, dtype=np.float32),
        "teacher_probabilities": list(np.asarray(candidates.teacher_probabilities, dtype=np.float32)),
        "selector_score": np.asarray(candidates.selector_scores, dtype=np.float32),
        "kept": np.asarray(candidates.kept, dtype=np.bool_),
        "round": np.full(len(texts), number, dtype=np.int32),
    }


def _storable(text: str) -> str:
    # JSON sources may hold lone surrogates, which UTF-8, and so Parquet, cannot.
    return text.encode("utf-8", "replace").decode("utf-8")
