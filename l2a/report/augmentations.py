"""The file augmentations.parquet: every candidate that a run drew, and what became of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from l2a.examples import TextInput
from l2a.files import atomic_write_bytes

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
