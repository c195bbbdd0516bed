"""What a student is built from: a preset of a size that the teacher's allows, or a checkpoint."""

import copy
import dataclasses
import json
import math
import string
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from l2a.config import StudentConfig
from l2a.data.encoding import refuse_long_sequences
from l2a.data.examples import TextInput
from l2a.student import student as start
from l2a.student.student import Student, class_names
from l2a.teacher.labelling import token_vectors
from l2a.teacher.model import PACKAGED, Teacher, load_encoder
from l2a.util.errors import UsageError
from l2a.util.training import seeded

DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")
"""Zero in every student: with so few updates, dropout costs time and helps nothing."""
PIECE = "##"
"""Marks a token that continues a word."""


def refuse_other_tokenizers(tokenizer: Any, reader: str) -> None:
    """Stop when a fast tokenizer's vocabulary is not WordPiece, which a reader needs.

    Raises:
        UsageError: If it is not.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] != "WordPiece" or model["continuing_subword_prefix"] != PIECE:
        raise UsageError(
            f"{reader} needs a WordPiece vocabulary, and this one is {model['type']}; give --teacher or --student a "
            "model of the BERT family, such as BERT, MPNet, ELECTRA or DistilBERT"
        )


def count_tokens(tokenizer: Any, texts: Sequence[TextInput]) -> NDArray[np.int64]:
    """Count how often each token of a fast tokenizer occurs in texts, single or pairs, int64 (V,)."""
    sides, counts = [side for text in texts for side in text], np.zeros(len(tokenizer), np.int64)
    for first in range(0, len(sides), 2000):
        some = sides[first : first + 2000]
        for ids in tokenizer(some, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]:
            np.add.at(counts, ids, 1)
    return counts


def needed_tokens(tokenizer: Any, counts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Tell which tokens no pruning may drop, bool (V,), by the counts of ``count_tokens``.

    These are the added tokens, special ones included, and, alone and as a continuation, every character that is ASCII
    or occurs in the texts: with them, the longest match that WordPiece takes always finds a next piece.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    surfaces = [token.removeprefix(PIECE) or token for token in tokens]
    characters = {character for index in np.flatnonzero(counts) for character in surfaces[index]} | {*string.printable}
    added = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    return np.array([token in added or text in characters for token, text in zip(tokens, surfaces, strict=True)])


def choose_tokens(tokenizer: Any, counts: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Choose the tokens of a pruned vocabulary.

    After the needed tokens come all other characters, while characters take a third of the vocabulary at most, then the
    tokens that the texts use most, then the vocabulary's first ones, which are its most common words.

    Args:
        tokenizer: A fast WordPiece tokenizer.
        counts: int64 (V,), from ``count_tokens``.
        size: n, at least the number of needed tokens.

    Returns:
        int64 (n,), ids in the full vocabulary, rising.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    needed = needed_tokens(tokenizer, counts)
    single = np.array([len(token.removeprefix(PIECE) or token) == 1 for token in tokens])
    spelled = single & ((needed | single).sum() <= size / 3)
    # Words are cut at brackets, so that tokens such as [unused7] never come out of a text.
    unreachable = np.array([token[0] + token[-1] == "[]" for token in tokens])
    order = np.lexsort((np.arange(len(tokens)), -counts, unreachable, ~spelled, ~needed))
    return np.asarray(np.sort(order[:size]), dtype=np.int64)


def keep_tokens(tokenizer: Any, kept: NDArray[np.int64]) -> Any:
    """Cut a fast WordPiece tokenizer down to some of its tokens, so that its token i is that of ``kept[i]``."""
    from transformers import AutoTokenizer

    ids = {token: index for index, token in enumerate(tokenizer.convert_ids_to_tokens(kept.tolist()))}

    def renumber(part: dict[str, Any]) -> dict[str, Any]:
        """Give the special tokens that a template or a BERT processor adds their new numbers."""
        named = [(name, part[name][0]) for name in ("cls", "sep") if isinstance(part.get(name), list)]
        framed = {name: [token, ids[token]] for name, token in named}
        return part | framed | ({"ids": [ids[token] for token in part["tokens"]]} if "tokens" in part else {})

    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        path = Path(folder) / "tokenizer.json"
        content = json.loads(path.read_text("utf-8"))
        words = content["model"]["vocab"]
        content["model"]["vocab"] = {token: index for token, index in ids.items() if token in words}
        content["added_tokens"] = [token | {"id": ids[token["content"]]} for token in content["added_tokens"]]
        content["post_processor"] = json.loads(json.dumps(content["post_processor"]), object_hook=renumber)
        path.write_text(json.dumps(content | {"truncation": None, "padding": None}), "utf-8")
        pruned = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    pruned.name_or_path = tokenizer.name_or_path
    return pruned


def classifier_of(config: Any, weights: bool = True) -> Any:
    """Make a sequence classifier with random weights in float32 and eval mode, or without memory for its weights."""
    from transformers import AutoModelForSequenceClassification

    with torch.device("cpu" if weights else "meta"):
        return AutoModelForSequenceClassification.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.float32, trust_remote_code=False
        ).eval()


def parameters_count(config: Any) -> int:
    """Count the parameters of a classifier, embeddings and head included."""
    return sum(parameter.numel() for parameter in classifier_of(config, weights=False).parameters())


def largest_fitting(config: StudentConfig, teacher: Teacher, sizes: Sequence[int], shape: Callable[[int], Any]) -> Any:
    """Find the config of the largest model whose share of the teacher's parameters is allowed.

    Args:
        config: Names the preset and the share.
        teacher: The teacher.
        sizes: At least one size, rising; the model grows with it.
        shape: Gives the config of a size.

    Raises:
        UsageError: If not even the first fits.
    """
    budget = int(config.max_share * teacher.parameters_count)
    fitting = bisect_right(sizes, budget, key=lambda size: parameters_count(shape(size)))
    if not fitting:
        least = parameters_count(shape(sizes[0]))
        share = math.ceil(1000 * least / teacher.parameters_count) / 1000
        raise UsageError(
            f"student.max_share: {config.max_share} of the teacher are {budget:,} parameters, but the preset "
            f"{config.preset!r} needs at least {least:,}; raise student.max_share to {share}, choose another "
            "student.preset, or give --student a smaller checkpoint"
        )
    return shape(sizes[fitting - 1])


def attention_heads(width: int) -> int:
    """Choose the number of attention heads of a fresh layer of an even width.

    It is the largest whose heads are at least 32 wide (one below that), of even width, and fill the layer.
    """
    return max(heads for heads in range(1, max(1, width // 32) + 1) if width % (2 * heads) == 0)


def _narrow(
    config: StudentConfig, teacher: Teacher, label_names: tuple[str, ...], texts: Sequence[TextInput], weights: bool
) -> Student:
    """Build the widest BERT over the teacher's vocabulary that is allowed and not wider than the teacher."""
    from transformers import BertConfig

    def shape(width: int) -> Any:
        return BertConfig(
            vocab_size=len(teacher.tokenizer),
            hidden_size=width,
            num_hidden_layers=max(2, int(teacher.encoder.config.num_hidden_layers) // 3),
            num_attention_heads=attention_heads(width),
            intermediate_size=4 * width,
            max_position_embeddings=min(512, teacher.positions or 512),
            pad_token_id=teacher.tokenizer.pad_token_id,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **class_names(label_names),
        )

    widest = teacher.hidden_size
    shaped = largest_fitting(config, teacher, range(min(32, widest), widest + 1, 8), shape)
    student = Student(classifier_of(shaped, weights), teacher.tokenizer)
    if weights and config.preset != "scratch":
        start.start_from_words(student, token_vectors(teacher), of_pairs=len(texts) > 0 and len(texts[0]) == 2)
    return student


def _pruned(
    config: StudentConfig, teacher: Teacher, label_names: tuple[str, ...], texts: Sequence[TextInput], weights: bool
) -> Student:
    """Cut a student out of the teacher or a packaged encoder: as many layers as are allowed, then as many tokens."""
    base = teacher
    if config.preset in PACKAGED:
        base = load_encoder(config.preset, label_names, 0, weights=weights)
    tokenizer, original = base.tokenizer, base.encoder
    refuse_other_tokenizers(tokenizer, f"student.preset {config.preset!r}")
    if not start.queries_of(original):
        raise UsageError(
            f"student.preset {config.preset!r} cannot cut a {original.config.model_type}; choose another "
            "student.preset or a teacher such as BERT, MPNet, ELECTRA or DistilBERT"
        )

    def shape(layers: int, vocabulary: int, pad_token_id: int = 0) -> Any:
        shaped = copy.deepcopy(original.config)
        shaped.update({"num_hidden_layers": layers, "vocab_size": vocabulary, "pad_token_id": pad_token_id})
        shaped.update(class_names(label_names) | {name: 0.0 for name in DROPOUTS if hasattr(shaped, name)})
        return shaped

    counts, budget = count_tokens(tokenizer, texts), int(config.max_share * teacher.parameters_count)
    # A further layer is kept only where it leaves room for an eighth of the vocabulary.
    all_layers, least = int(original.config.num_hidden_layers), len(tokenizer) // 8
    layers = next((n for n in range(all_layers, 1, -1) if parameters_count(shape(n, least)) <= budget), 1)
    sizes = range(int(needed_tokens(tokenizer, counts).sum()), len(tokenizer) + 1)
    size = largest_fitting(config, teacher, sizes, partial(shape, layers)).vocab_size
    kept = choose_tokens(tokenizer, counts, size)
    pruned = keep_tokens(tokenizer, kept)
    student = Student(classifier_of(shape(layers, size, pruned.pad_token_id), weights), pruned)
    if weights:
        start.start_from_layers(student, original.base_model, kept, texts, layers < all_layers)
    return student


ROOM_FOR_MINILM = 12_300_000
"""Parameters of MiniLM-L6 over 4,000 tokens, about the fewest with which its words are not cut into small pieces."""
WIDE = 256
"""Width from which a pretrained student wants a small learning rate: BERT-tiny, of 128, learns little at 1e-4."""
PRESETS = {"narrow": _narrow, "scratch": _narrow, "pruned": _pruned, "minilm-l6": _pruned, "bert-tiny": _pruned}
"""How each preset is built; without weights for checks."""


def resolve_preset(config: StudentConfig, teacher: Teacher) -> StudentConfig:
    """Choose what "auto" stands for: MiniLM-L6 where an eighth of its vocabulary fits, "narrow" below that."""
    if config.preset != "auto":
        return config
    roomy = config.max_share * teacher.parameters_count >= ROOM_FOR_MINILM
    return dataclasses.replace(config, preset="minilm-l6" if roomy else "narrow")


def wants_small_rate(config: StudentConfig, teacher: Teacher, width: int) -> bool:
    """Tell whether a student of a width starts from a pretrained encoder that large updates would spoil."""
    pretrained = config.model is not None or resolve_preset(config, teacher).preset in PACKAGED
    return pretrained and width >= WIDE


def check_student(
    config: StudentConfig, teacher: Teacher, label_names: tuple[str, ...], texts: Sequence[TextInput], max_length: int
) -> None:
    """Refuse a student that cannot be built or used, before anything is trained; no weights are read.

    The first arguments are those of ``build_student``; the teacher may be one of ``check_teacher``.

    Raises:
        UsageError: If the checkpoint is broken or too large, the preset does not suit the teacher, the vocabulary is
            not WordPiece, which the generator needs, or the student reads texts of less than ``max_length`` tokens.
        RunError: If the checkpoint cannot be fetched.
    """
    student = build_student(config, teacher, label_names, texts, 0, weights=False)
    refuse_other_tokenizers(student.tokenizer, "the generator")
    refuse_long_sequences("the student", student.positions, max_length)


def build_student(
    config: StudentConfig,
    teacher: Teacher,
    label_names: tuple[str, ...],
    texts: Sequence[TextInput],
    seed: int,
    weights: bool = True,
) -> Student:
    """Build the student and check its size.

    Args:
        config: The preset or the checkpoint, and the largest share.
        teacher: Gives weights, vocabulary and the size to compare with.
        label_names: The C classes.
        texts: Texts of the domains, without labels: a pruned vocabulary keeps the tokens that they use.
        seed: Draws the weights that are not initialised from the teacher.
        weights: False gives a student without memory for its weights, for checks.

    Returns:
        The student in eval mode, on the CPU.

    Raises:
        UsageError: If the checkpoint is broken or too large, or the preset does not suit the teacher.
        RunError: If the checkpoint cannot be fetched.
    """
    with seeded(seed):
        if config.model is None:
            chosen = resolve_preset(config, teacher)
            return PRESETS[chosen.preset](chosen, teacher, label_names, texts, weights)
        student = start.load_checkpoint(config.model, label_names, weights)
    share = student.parameters_count / teacher.parameters_count
    if share > config.max_share:
        raise UsageError(
            f"student.model {config.model!r}: its {student.parameters_count:,} parameters are {share:.1%} of the "
            f"teacher's {teacher.parameters_count:,}, but at most {config.max_share:.1%} is allowed; raise "
            "student.max_share or give a smaller checkpoint"
        )
    return student
