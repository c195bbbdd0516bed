"""Texts as token ids, tokenised once, and padded batches in a few fixed lengths.

Training, measuring and the exported folder encode in one way: by the tokenizer's own call, after ``fit_tokenizer``.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from l2a.data.examples import Ints, TextInput
from l2a.util import UsageError, training

# Padded lengths: few, so that compiled kernels are reused, and close, so that little padding is computed.
BUCKETS = (4, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 192, 256, 384, 512)
ENCODED_AT_ONCE = 2048  # texts in a call of the tokenizer, whose results take some 8 kB a text until they are numbers


@dataclass(frozen=True)
class EncodedTexts:
    """Token ids of N texts in one flat array.

    Attributes:
        ids: int32 (total,), all token ids, special tokens included.
        types: int8 (total,), the segment of each token: 0 first, 1 second.
        offsets: int64 (N + 1,), text i is ``ids[offsets[i]:offsets[i + 1]]``.
        pad_id: The token that fills a padded row.
    """

    ids: np.typing.NDArray[np.int32]
    types: np.typing.NDArray[np.int8]
    offsets: Ints
    pad_id: int

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Ints:
        """Tokens in each text, int64 (N,)."""
        return np.diff(self.offsets)

    def padded(self, indices: Ints, device: torch.device = training.CPU) -> dict[str, torch.Tensor]:
        """Build the model inputs of the texts at B positions, int64 (B,), padded to the nearest bucket.

        Returns:
            input_ids, attention_mask and token_type_ids, int64 (B, L), on the device.
        """
        lengths = self.lengths[indices]
        columns = np.arange(bucket_of(int(lengths.max())))
        mask = columns < lengths[:, None]
        places = (self.offsets[indices][:, None] + columns)[mask]
        ids, types = np.full(mask.shape, self.pad_id, np.int64), np.zeros(mask.shape, np.int64)
        ids[mask], types[mask] = self.ids[places], self.types[places]
        arrays = {"input_ids": ids, "attention_mask": mask.astype(np.int64), "token_type_ids": types}
        return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def first_texts(tokenizer: Any, ids: torch.Tensor) -> str:
    """Quote the texts of some rows of token ids, int64 (B, L), for a message."""
    return ", ".join(repr(text[:80]) for text in tokenizer.batch_decode(ids, skip_special_tokens=True))


def reads_types(config: Any) -> bool:
    """Tell whether a model tells the texts of a pair apart by token types; those of one type, as RoBERTa, do not."""
    return (getattr(config, "type_vocab_size", None) or 0) > 1


def model_inputs(config: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Choose what a model reads of a padded batch: token_type_ids only where its config has them."""
    return {name: value for name, value in batch.items() if name != "token_type_ids" or reads_types(config)}


def fit_tokenizer(tokenizer: Any, config: Any, max_length: int | None = None) -> Any:
    """Copy a fast tokenizer so that its own call, with truncation=True, returns what a config's model is trained on.

    It gives token types where the model reads them, and pads on the right, as ``EncodedTexts.padded`` does, also when
    it is saved and loaded again. ``max_length`` is the longest sequence in tokens that its call shall give; None leaves
    it as it is.
    """
    fitted = copy.deepcopy(tokenizer)
    names = ["input_ids", *(["token_type_ids"] if reads_types(config) else []), "attention_mask"]
    longest = fitted.model_max_length if max_length is None else max_length
    settings = {"model_input_names": names, "padding_side": "right", "model_max_length": longest}
    for name, value in settings.items():
        setattr(fitted, name, value)
    fitted.init_kwargs |= settings  # what is saved
    fitted.init_kwargs.pop("auto_map", None)
    fitted.backend_tokenizer.no_truncation()
    fitted.backend_tokenizer.no_padding()
    return fitted


def refuse_long_sequences(reader: str, positions: int | None, max_length: int) -> None:
    """Stop before training when texts of ``max_length`` tokens, padded, would be longer than a model can read.

    The message names the model as ``reader``, which reads ``positions`` tokens, or any number where that is None.

    Raises:
        UsageError: If they would be; it names the largest length that is allowed.
    """
    if positions is not None and bucket_of(max_length) > positions:
        longest = positions if positions >= BUCKETS[-1] else max(size for size in (1, *BUCKETS) if size <= positions)
        reads = f"{reader} reads at most {positions} tokens"
        raise UsageError(f"max_length is {max_length}, but {reads}; give --max-length {longest} or less")


def bucket_of(length: int) -> int:
    """Return the smallest member of ``BUCKETS`` that holds a number of tokens, or the number itself above the last."""
    return next((bucket for bucket in BUCKETS if bucket >= length), length)


def encode(tokenizer: Any, inputs: Sequence[TextInput], max_length: int) -> EncodedTexts:
    """Tokenise N texts, single or pairs, once, by a fast tokenizer that ``fit_tokenizer`` has fitted to its model.

    Texts of more than ``max_length`` tokens are cut (the longer side first in pairs).
    """
    ids, types, lengths = [np.zeros(0, np.int32)], [np.zeros(0, np.int8)], [0]
    for start in range(0, len(inputs), ENCODED_AT_ONCE):
        sides = map(list, zip(*inputs[start : start + ENCODED_AT_ONCE], strict=True))
        encoded = tokenizer(*sides, truncation=True, max_length=max_length)
        ids.append(np.concatenate([np.asarray(row, np.int32) for row in encoded["input_ids"]]))
        given = encoded.get("token_type_ids")
        types.append(np.zeros(len(ids[-1]), np.int8) if given is None else np.concatenate(given).astype(np.int8))
        lengths += map(len, encoded["input_ids"])
    offsets = np.cumsum(lengths, dtype=np.int64)
    return EncodedTexts(np.concatenate(ids), np.concatenate(types), offsets, int(tokenizer.pad_token_id))


def inference_batches(encoded: Any, tokens_per_batch: int = 2048) -> Iterator[Ints]:
    """Group texts of similar length, so that little padding is computed: int64 positions, every text once.

    Args:
        encoded: Texts, whose ``lengths`` in tokens are int64 (N,).
        tokens_per_batch: Padded tokens in a batch, at most (a longer single text is a batch of its own).
    """
    order = np.argsort(encoded.lengths, kind="stable")[::-1]
    while len(order):
        size = max(1, tokens_per_batch // bucket_of(int(encoded.lengths[order[0]])))
        yield order[:size]
        order = order[size:]


def training_batches(lengths: Ints, batch_size: int, rng: np.random.Generator, window: int = 16) -> Iterator[Ints]:
    """Shuffle one epoch into batches of similar length: int64 positions, every text once.

    Texts are shuffled, sorted by length inside windows of some batches, and the batches are shuffled again: the order
    stays random while padding is small. The last batch may be smaller; none is dropped.

    Args:
        lengths: int64 (N,), tokens in each text.
        batch_size: Texts in a batch.
        rng: Source of the order.
        window: Batches sorted together.
    """
    order = rng.permutation(len(lengths))
    chunks = [order[i : i + window * batch_size] for i in range(0, len(order), window * batch_size)]
    ordered = [chunk[np.argsort(lengths[chunk], kind="stable")] for chunk in chunks]
    batches = [chunk[i : i + batch_size] for chunk in ordered for i in range(0, len(chunk), batch_size)]
    yield from (batches[position] for position in rng.permutation(len(batches)))
