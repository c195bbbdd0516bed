"""The student's folder: an ordinary, complete transformers model that loads without this package."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from l2a.data.encoding import encode, fit_tokenizer, model_inputs
from l2a.data.examples import TextInput
from l2a.generator.pool import CandidatePool
from l2a.selector.problem import Selection
from l2a.teacher.model import usable_positions
from l2a.util.errors import RunError
from l2a.util.files import atomic_folder, atomic_write_bytes, atomic_write_text

TOLERANCE = 1e-3
"""Batches are padded to other lengths, which changes the last digits."""


def export_student(model: Any, tokenizer: Any, folder: Path, card: str, max_length: int) -> None:
    """Save a classifier with its tokenizer and its card.

    Args:
        model: A sequence classification model of transformers whose config names the classes.
        tokenizer: Its tokenizer.
        folder: Destination; an existing one is replaced.
        card: The text of README.md.
        max_length: Longest sequence in tokens that it was trained with; the saved tokenizer cuts there.

    Raises:
        RunError: If the disk is full; nothing is left behind.
    """
    length = min(max_length, usable_positions(model) or max_length)
    with atomic_folder(folder) as temporary:
        model.save_pretrained(str(temporary))
        _plain_config(model).save_pretrained(str(temporary))
        fit_tokenizer(tokenizer, model.config, length).save_pretrained(str(temporary))
        atomic_write_text(temporary / "README.md", card)
        for path in temporary.iterdir():
            path.chmod(0o644)  # weights are written for their owner alone


def _plain_config(model: Any) -> Any:
    """Keep what the architecture defines: no settings of another task that the base checkpoint was trained for."""
    kind, content = type(model.config), model.config.to_dict()
    known = {name: value for name, value in content.items() if name in kind().to_dict()}
    known |= {"problem_type": "single_label_classification", "architectures": [type(model).__name__]}
    return kind.from_dict(known)


def check_parity(model: Any, tokenizer: Any, folder: Path, inputs: Sequence[TextInput], max_length: int) -> float:
    """Compare a model with its saved copy, which is used as its card says: by a pipeline and its tokenizer's own call.

    Args:
        model: The model in memory, on the CPU; it keeps the mode, training or not, that it came in.
        tokenizer: Its tokenizer.
        folder: The saved copy.
        inputs: Texts to compare on, at least one; a text longer than the model reads is added.
        max_length: Longest sequence in tokens that the model was trained with.

    Returns:
        The largest absolute difference of the logits.

    Raises:
        RunError: If the classes have other names, or scores or logits differ by more than 1e-3 or are no numbers.
    """
    from transformers import pipeline

    classify: Any = pipeline(
        "text-classification", model=str(folder), device="cpu", truncation=True, top_k=None, trust_remote_code=False
    )
    names = model.config.id2label
    if classify.model.config.id2label != names:
        raise RunError(f"student: it was saved with the classes {classify.model.config.id2label}, not {names}")
    probe = [*inputs, _long_text(inputs, max_length)]
    logits = _logits(model, tokenizer, probe, max_length)
    asked = [dict(zip(("text", "text_pair"), text, strict=False)) for text in probe]
    differences = []
    for expected, choice in ((logits.softmax(-1), {}), (logits, {"function_to_apply": "none"})):
        found = [{each["label"]: each["score"] for each in answer} for answer in classify(asked, **choice)]
        scores = torch.tensor([[answer[names[i]] for i in range(len(names))] for answer in found])
        differences.append(float((expected - scores).abs().max()))
    if not max(differences) <= TOLERANCE:  # also true of a NaN
        raise RunError(
            f"student: the saved model's scores and logits differ from the trained one's by {differences[0]:.2g} and "
            f"{differences[1]:.2g}, and at most {TOLERANCE} is allowed; its architecture or tokenizer does not keep "
            "all its settings when saved: choose another --student"
        )
    return differences[1]


def _long_text(inputs: Sequence[TextInput], max_length: int) -> TextInput:
    """Repeat the texts until they are longer than the model reads."""
    sides = [" ".join(side) for side in zip(*inputs, strict=True)]
    return tuple(" ".join([side] * (1 + max_length // max(1, len(side.split())))) for side in sides)


def _logits(model: Any, tokenizer: Any, inputs: Sequence[TextInput], max_length: int) -> torch.Tensor:
    """Classify in memory, as in training and measuring."""
    encoded, was_training = encode(tokenizer, inputs, max_length), model.training
    model.eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(**model_inputs(model.config, encoded.padded(np.arange(len(encoded))))).logits
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


def write_augmentations(path: Path, rounds: Sequence[tuple[CandidatePool, Selection]]) -> None:
    """Write all candidates, one a line, kept or not.

    Args:
        path: Destination, a Parquet file.
        rounds: What was drawn and what was kept of it, numbered from 0; none gives a file without lines.

    Raises:
        RunError: If the disk is full.
    """
    tables = [pa.table(_columns(number, *done), schema=SCHEMA) for number, done in enumerate(rounds)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.concat_tables([SCHEMA.empty_table(), *tables]), sink)
    atomic_write_bytes(path, sink.getvalue().to_pybytes())


def _columns(number: int, pool: CandidatePool, selection: Selection) -> dict[str, Any]:
    texts = pool.inputs
    return {
        "text": [_storable(text[0]) for text in texts],
        "text_pair": [_storable(text[1]) if len(text) == 2 else None for text in texts],
        "origin": list(pool.origins),
        "operator": list(pool.operators),
        "degree": pool.degrees,
        "teacher_probabilities": list(pool.teacher.probabilities()),
        "selector_score": selection.scores,
        "kept": selection.kept,
        "round": np.full(len(texts), number, dtype=np.int32),
    }


def _storable(text: str) -> str:
    # JSON sources may hold lone surrogates, which UTF-8, and so Parquet, cannot.
    return text.encode("utf-8", "replace").decode("utf-8")
