"""The student's folder: an ordinary transformers model that loads without this package."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from l2a.encoding import EncodedTexts, encode
from l2a.errors import RunError
from l2a.examples import TextInput
from l2a.files import atomic_folder, atomic_write_text

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
