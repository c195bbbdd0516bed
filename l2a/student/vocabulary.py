"""Prunes a WordPiece vocabulary to what the texts use; words that lose their token still split into pieces."""

import json
import string
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l2a.data.examples import TextInput
from l2a.util.errors import UsageError

PIECE = "##"
"""Marks a token that continues a word."""
SPELLING_SHARE = 1 / 3
"""Characters that no text shows stay while all characters together take at most this part of the vocabulary."""
TEXTS_PER_CALL = 2000


def refuse_other_tokenizers(tokenizer: Any, reader: str) -> None:
    """Stop when a vocabulary is not WordPiece.

    Args:
        tokenizer: A fast tokenizer of transformers.
        reader: What needs it, for the message.

    Raises:
        UsageError: If it is not.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] != "WordPiece" or model["continuing_subword_prefix"] != PIECE:
        raise UsageError(
            f"{reader} needs a WordPiece vocabulary, and this one is {model['type']}; give --teacher or --student a "
            "model of the BERT family, such as BERT, MPNet, ELECTRA or DistilBERT"
        )


def needed_tokens(tokenizer: Any, counts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Tell which tokens no pruning may drop.

    These are the added tokens, special ones included, and, alone and as a continuation, every character that is ASCII
    or occurs in the texts: with them, the longest match that WordPiece takes always finds a next piece.

    Args:
        tokenizer: A fast WordPiece tokenizer.
        counts: int64 (V,), from ``count_tokens``.

    Returns:
        bool (V,).
    """
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    used = {character for index in np.flatnonzero(counts) for character in _surface(tokens[index])}
    characters = used | set(string.printable)
    added = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    return np.array([token in added or _surface(token) in characters for token in tokens])


def choose_tokens(tokenizer: Any, counts: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Choose the tokens of a pruned vocabulary.

    After the needed tokens come all other characters, where they are few beside the rest, then the tokens that the
    texts use most, then the vocabulary's first ones, which are its most common words.

    Args:
        tokenizer: A fast WordPiece tokenizer.
        counts: int64 (V,), from ``count_tokens``.
        size: n, at least the number of needed tokens.

    Returns:
        int64 (n,), ids in the full vocabulary, rising.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    needed, single = needed_tokens(tokenizer, counts), np.array([len(_surface(token)) == 1 for token in tokens])
    spelled = single & ((needed | single).sum() <= SPELLING_SHARE * size)
    # Words are cut at brackets, so that tokens such as [unused7] never come out of a text.
    reachable = np.array([not (token.startswith("[") and token.endswith("]")) or len(token) == 1 for token in tokens])
    order = np.lexsort((np.arange(len(tokens)), -counts, ~reachable, ~spelled, ~needed))
    return np.asarray(np.sort(order[:size]), dtype=np.int64)


def _surface(token: str) -> str:
    return token.removeprefix(PIECE) or token


def count_tokens(tokenizer: Any, texts: Sequence[TextInput]) -> NDArray[np.int64]:
    """Count how often each token occurs.

    Args:
        tokenizer: A fast tokenizer of transformers.
        texts: N texts, single or pairs.

    Returns:
        int64 (V,).
    """
    sides, counts = [side for text in texts for side in text], np.zeros(len(tokenizer), np.int64)
    for start in range(0, len(sides), TEXTS_PER_CALL):
        part = sides[start : start + TEXTS_PER_CALL]
        for ids in tokenizer(part, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]:
            np.add.at(counts, ids, 1)
    return counts


def keep_tokens(tokenizer: Any, kept: NDArray[np.int64]) -> Any:
    """Cut a tokenizer down to some of its tokens.

    Args:
        tokenizer: A fast WordPiece tokenizer.
        kept: int64 (n,), from ``choose_tokens``.

    Returns:
        A fast tokenizer of the same kind, its token i that of ``kept[i]``.
    """
    from transformers import AutoTokenizer

    ids = {token: index for index, token in enumerate(tokenizer.convert_ids_to_tokens(kept.tolist()))}
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        path = Path(folder) / "tokenizer.json"
        path.write_text(json.dumps(_renumbered(json.loads(path.read_text("utf-8")), ids)), "utf-8")
        pruned = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    pruned.name_or_path = tokenizer.name_or_path
    return pruned


def _renumbered(tokenizer: dict[str, Any], ids: dict[str, int]) -> dict[str, Any]:
    words = tokenizer["model"]["vocab"].keys()
    return tokenizer | {
        "truncation": None,
        "padding": None,
        "added_tokens": [token | {"id": ids[token["content"]]} for token in tokenizer["added_tokens"]],
        "post_processor": _renumbered_processor(tokenizer["post_processor"], ids),
        "model": tokenizer["model"] | {"vocab": {token: index for token, index in ids.items() if token in words}},
    }


def _renumbered_processor(processor: Any, ids: dict[str, int]) -> Any:
    """Give the special tokens that a template or a BERT processor adds their new numbers."""
    if isinstance(processor, list):
        return [_renumbered_processor(part, ids) for part in processor]
    if not isinstance(processor, dict):
        return processor
    changed = {name: _renumbered_processor(part, ids) for name, part in processor.items()}
    for name in ("cls", "sep"):
        if isinstance(processor.get(name), list):
            changed[name] = [processor[name][0], ids[processor[name][0]]]
    if "tokens" in processor and "ids" in processor:
        changed["ids"] = [ids[token] for token in processor["tokens"]]
    return changed
