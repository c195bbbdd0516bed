"""The pretrained teacher's hidden states, memory-mapped: one array for the corpus and one for its variants.

They are cached by content; a labelling that was interrupted starts again.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from l2a.cache import cached_folder, fingerprint
from l2a.encoding import EncodedTexts, encode, inference_batches
from l2a.examples import TextInput
from l2a.precision import has_fast_bfloat16
from l2a.pretraining.config import PretrainConfig
from l2a.pretraining.corpus import Corpus
from l2a.progress import SILENT, Progress
from l2a.teacher.model import Teacher

HIDDEN_FILE = "hidden.f16"


@dataclass(frozen=True)
class TeacherTargets:
    """Texts as the teacher reads them, and what it makes of them.

    Attributes:
        encoded: Token ids of N texts.
        hidden: Memory-mapped arrays, float16 (tokens, d), that together hold the last hidden state of every token in
            order; the mean over a text's tokens is its pooled embedding.
    """

    encoded: EncodedTexts
    hidden: tuple[NDArray[np.float16], ...]

    def states(self, index: int) -> NDArray[np.float16]:
        """Read the hidden states of one text.

        Args:
            index: Position of the text.

        Returns:
            float16 (tokens, d).
        """
        start, end = int(self.encoded.offsets[index]), int(self.encoded.offsets[index + 1])
        for part in self.hidden:
            if start < len(part):
                return np.array(part[start:end])
            start, end = start - len(part), end - len(part)
        raise IndexError(index)

    def padded_hidden(self, batch: NDArray[np.int64], width: int) -> torch.Tensor:
        """Read the hidden states of a batch.

        Args:
            batch: int64 (B,), positions of the texts.
            width: Padded length L.

        Returns:
            bfloat16 (B, L, d), zero where padded.
        """
        padded = torch.zeros(len(batch), width, self.hidden[0].shape[1], dtype=torch.bfloat16)
        for row, index in enumerate(batch):
            states = torch.from_numpy(self.states(int(index)))
            padded[row, : len(states)] = states
        return padded


def label_texts(
    teacher: Teacher, corpus: Corpus, config: PretrainConfig, device: torch.device, progress: Progress = SILENT
) -> TeacherTargets:
    """Label the texts and their variants; each part is cached on its own, so that new variants are all that is new.

    Args:
        teacher: The pretrained teacher; it is left on the processor in float32.
        corpus: The texts.
        config: The longest input.
        device: Where to compute.
        progress: Shows the tokens done.

    Returns:
        The labelled texts: first the originals, then the variants.

    Raises:
        RunError: If the disk is full.
    """
    key = teacher.fingerprint()
    parts = [encode_corpus(teacher.tokenizer, texts, config.max_length) for texts in (corpus.texts, corpus.variants)]
    dtype = torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    encoder = copy.deepcopy(teacher.encoder).to(device, dtype)
    return TeacherTargets(join_encoded(parts), tuple(label_part(encoder, part, key, progress) for part in parts))


def encode_corpus(tokenizer: Any, texts: Sequence[TextInput], max_length: int) -> EncodedTexts:
    """Tokenise single texts and pairs.

    Args:
        tokenizer: The teacher's tokenizer.
        texts: Single texts first, then pairs.
        max_length: Longest sequence in tokens.

    Returns:
        The token ids, in the order of the texts.
    """
    singles = [text for text in texts if len(text) == 1]
    pairs = [text for text in texts if len(text) == 2]
    return join_encoded([encode(tokenizer, part, max_length) for part in (singles, pairs)])


def join_encoded(parts: Sequence[EncodedTexts]) -> EncodedTexts:
    """Concatenate tokenised texts.

    Args:
        parts: At least one, with the same padding token.

    Returns:
        All texts, in order.
    """
    lengths = np.concatenate([part.lengths for part in parts])
    return EncodedTexts(
        ids=np.concatenate([part.ids for part in parts]),
        types=np.concatenate([part.types for part in parts]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        pad_id=parts[0].pad_id,
    )


def label_part(
    encoder: nn.Module, encoded: EncodedTexts, teacher_fingerprint: str, progress: Progress = SILENT
) -> NDArray[np.float16]:
    """Run the teacher over texts once; the result is cached by content.

    Args:
        encoder: A transformers encoder in eval mode.
        encoded: The texts.
        teacher_fingerprint: Hash of the encoder's weights.
        progress: Shows the tokens done.

    Returns:
        float16 (total tokens, d), memory-mapped.

    Raises:
        RunError: If the disk is full.
    """
    width = int(encoder.config.hidden_size)  # type: ignore[union-attr, arg-type]
    shape = (len(encoded.ids), width)

    def build(folder: Path) -> None:
        hidden = np.memmap(folder / HIDDEN_FILE, np.float16, "w+", shape=shape)
        with progress.stage("label the corpus", shape[0]) as advance:
            for batch in inference_batches(encoded, tokens_per_batch=4096):
                advance(_write_batch(encoder, encoded, batch, hidden))
        hidden.flush()

    key = fingerprint(teacher_fingerprint, encoded.ids, encoded.types, encoded.offsets)
    folder = cached_folder("pretraining", key, build)
    return np.memmap(folder / HIDDEN_FILE, np.float16, "r", shape=shape)


@torch.inference_mode()
def _write_batch(
    encoder: nn.Module, encoded: EncodedTexts, batch: NDArray[np.int64], hidden: NDArray[np.float16]
) -> int:
    device = next(encoder.parameters()).device
    inputs = encoded.padded(batch, device)
    states = encoder(**inputs).last_hidden_state.to(torch.float16).cpu().numpy()
    for row, index in enumerate(batch):
        start, end = encoded.offsets[index], encoded.offsets[index + 1]
        hidden[start:end] = states[row, : end - start]
    return int(encoded.lengths[batch].sum())
