"""What a student is built from: a preset of a size that the teacher's allows, or a checkpoint."""

import copy
import json
import math
import string
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from l2a.student.student import (
    Student,
    class_names,
    let_last_layer_average,
    load_checkpoint,
    open_head,
    queries_of,
    start_from_words,
)
from l2a.teacher.labelling import token_vectors
from l2a.teacher.model import Teacher
from l2a.util.errors import UsageError
from l2a.util.training import seeded

PIECE = "##"
"""Marks a token that continues a word."""
SPELLING_SHARE = 1 / 3
"""Characters that no text shows stay while all characters together take at most this part of the vocabulary."""
TEXTS_PER_CALL = 2000


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


def needed_tokens(tokenizer: Any, counts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Tell which tokens no pruning may drop.

    These are the added tokens, special ones included, and, alone and as a continuation, every character that is ASCII
    or occurs in the texts: with them, the longest match that WordPiece takes always finds a next piece.

    Args:
        tokenizer: A fast WordPiece tokenizer.
        counts: int64 (V,), from ``count_tokens``.
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
    """Count how often each token of a fast tokenizer occurs in texts, single or pairs, int64 (V,)."""
    sides, counts = [side for text in texts for side in text], np.zeros(len(tokenizer), np.int64)
    for start in range(0, len(sides), TEXTS_PER_CALL):
        part = sides[start : start + TEXTS_PER_CALL]
        for ids in tokenizer(part, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]:
            np.add.at(counts, ids, 1)
    return counts


def keep_tokens(tokenizer: Any, kept: NDArray[np.int64]) -> Any:
    """Cut a fast WordPiece tokenizer down to some of its tokens, so that its token i is that of ``kept[i]``."""
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


@dataclass(frozen=True)
class StudentRequest:
    """One student wanted.

    Attributes:
        config: The preset or the checkpoint, and the largest share.
        teacher: Gives weights, vocabulary and the size to compare with.
        label_names: The C classes.
        texts: Texts of the domains, without labels; they say which tokens are worth keeping.
    """

    config: StudentConfig
    teacher: Teacher
    label_names: tuple[str, ...]
    texts: Sequence[TextInput]

    @property
    def preset(self) -> str:
        """Name of the preset."""
        return "narrow" if self.config.preset == "auto" else self.config.preset

    @property
    def budget(self) -> int:
        """Parameters allowed."""
        return int(self.config.max_share * self.teacher.parameters_count)

    @property
    def of_pairs(self) -> bool:
        """Whether the student is to read two texts at a time."""
        return bool(self.texts) and len(self.texts[0]) == 2


@dataclass(frozen=True)
class Plan:
    """A student's config, its tokenizer, and the id of each of its tokens in the teacher's vocabulary, int64 (V,)."""

    config: Any
    tokenizer: Any
    kept: NDArray[np.int64]


def classifier_of(config: Any) -> Any:
    """Make an ``AutoModelForSequenceClassification`` with random weights in float32."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_config(  # type: ignore[no-untyped-call]
        config, dtype=torch.float32, trust_remote_code=False
    )


def parameters_count(config: Any) -> int:
    """Count the parameters of a classifier, embeddings and head included, without memory for its weights."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in classifier_of(config).parameters())


def largest_fitting(request: StudentRequest, sizes: Sequence[int], shape: Callable[[int], Any]) -> Any:
    """Find the config of the largest model that fits the budget.

    Args:
        request: Says how many parameters are allowed.
        sizes: At least one size, rising; the model grows with it.
        shape: Gives the config of a size.

    Raises:
        UsageError: If not even the first fits.
    """
    fitting = bisect_right(sizes, request.budget, key=lambda size: parameters_count(shape(size)))
    if not fitting:
        least = parameters_count(shape(sizes[0]))
        share = math.ceil(1000 * least / request.teacher.parameters_count) / 1000
        raise UsageError(
            f"student.max_share: {request.config.max_share} of the teacher are {request.budget:,} parameters, but the "
            f"preset {request.preset!r} needs at least {least:,}; raise student.max_share to {share}, choose another "
            "student.preset, or give --student a smaller checkpoint"
        )
    return shape(sizes[fitting - 1])


LEAST_WIDTH = 32
MOST_POSITIONS = 512
"""A fresh student reads no longer sequences, even where its teacher does."""


def attention_heads(width: int) -> int:
    """Choose the number of attention heads of a fresh layer of an even width.

    It is the largest whose heads are at least 32 wide (one below that), of even width, and fill the layer.
    """
    return max(heads for heads in range(1, max(1, width // 32) + 1) if width % (2 * heads) == 0)


def _plan_narrow(request: StudentRequest) -> Plan:
    """Shape the widest BERT over the teacher's vocabulary that fits the budget and is not wider than the teacher."""
    from transformers import BertConfig

    teacher, tokenizer = request.teacher, request.teacher.tokenizer

    def shape(width: int) -> Any:
        return BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            num_hidden_layers=max(2, int(teacher.encoder.config.num_hidden_layers) // 3),
            num_attention_heads=attention_heads(width),
            intermediate_size=4 * width,
            max_position_embeddings=min(MOST_POSITIONS, teacher.positions or MOST_POSITIONS),
            pad_token_id=tokenizer.pad_token_id,
            hidden_dropout_prob=0.0,  # with so few updates dropout costs a fifth of their time and helps nothing
            attention_probs_dropout_prob=0.0,
            **class_names(request.label_names),
        )

    widest = teacher.hidden_size
    config = largest_fitting(request, range(min(LEAST_WIDTH, widest), widest + 1, 8), shape)
    return Plan(config, tokenizer, np.arange(len(tokenizer)))


LEAST_VOCABULARY = 1 / 8
"""A further layer is kept only where it leaves room for this part of the teacher's vocabulary."""


def _plan_pruned(request: StudentRequest) -> Plan:
    """Shape a student that is cut out of the teacher: as many of its first layers as fit, then of its tokens."""
    tokenizer, original = request.teacher.tokenizer, request.teacher.encoder
    refuse_other_tokenizers(tokenizer, f"student.preset {request.preset!r}")
    if not queries_of(original):
        raise UsageError(
            f"student.preset {request.preset!r} cannot cut a {original.config.model_type}; choose another "
            "student.preset or a teacher such as BERT, MPNet, ELECTRA or DistilBERT"
        )

    def shape(layers: int, vocabulary: int, pad_token_id: int = 0) -> Any:
        config = copy.deepcopy(original.config)
        config.update({"num_hidden_layers": layers, "vocab_size": vocabulary, "pad_token_id": pad_token_id})
        config.update(class_names(request.label_names))
        return config

    counts, least = count_tokens(tokenizer, request.texts), int(LEAST_VOCABULARY * len(tokenizer))
    fewer = range(int(original.config.num_hidden_layers), 1, -1)
    layers = next((n for n in fewer if parameters_count(shape(n, least)) <= request.budget), 1)
    sizes = range(int(needed_tokens(tokenizer, counts).sum()), len(tokenizer) + 1)
    size = largest_fitting(request, sizes, partial(shape, layers)).vocab_size
    kept = choose_tokens(tokenizer, counts, size)
    pruned = keep_tokens(tokenizer, kept)
    return Plan(shape(layers, size, pruned.pad_token_id), pruned, kept)


def _start_pruned(student: Student, request: StudentRequest, plan: Plan) -> None:
    """Read the teacher's layers and the vectors of the kept tokens; let the last layer attend to all tokens alike."""
    body, teacher = student.model.base_model, request.teacher.encoder.base_model
    shapes = {name: value.shape for name, value in body.state_dict().items()}
    shared = {name: value for name, value in teacher.state_dict().items() if shapes.get(name) == value.shape}
    body.load_state_dict(shared, strict=False)
    with torch.no_grad():
        body.get_input_embeddings().weight.copy_(teacher.get_input_embeddings().weight[torch.from_numpy(plan.kept)])
    let_last_layer_average(body)
    open_head(student, request.texts)


def _start_narrow(student: Student, request: StudentRequest, plan: Plan) -> None:
    start_from_words(student, token_vectors(request.teacher)[plan.kept], request.of_pairs)


PRESETS: dict[str, tuple[Callable[[StudentRequest], Plan], Callable[[Student, StudentRequest, Plan], None] | None]] = {
    "narrow": (_plan_narrow, _start_narrow),
    "scratch": (_plan_narrow, None),
    "pruned": (_plan_pruned, _start_pruned),
}
"""How each preset is shaped, which needs no weights, and what it starts from: None for the usual random weights."""


def check_student(
    config: StudentConfig, teacher: Teacher, label_names: tuple[str, ...], texts: Sequence[TextInput], max_length: int
) -> None:
    """Refuse a student that cannot be built or used, before anything is trained; no weights are read.

    Args:
        config: The preset or the checkpoint, and the largest share.
        teacher: As ``check_teacher`` gives it.
        label_names: The C classes.
        texts: Texts of the domains, which a pruned vocabulary depends on.
        max_length: Longest sequence in tokens.

    Raises:
        UsageError: If the checkpoint is broken or too large, the preset does not suit the teacher, the vocabulary is
            not WordPiece, which the generator needs, or the student reads shorter texts.
        RunError: If the checkpoint cannot be fetched.
    """
    if config.model is not None:
        student = load_checkpoint(config.model, label_names, weights=False)
    else:
        request = StudentRequest(config, teacher, label_names, texts)
        plan = PRESETS[request.preset][0](request)
        with torch.device("meta"):
            student = Student(classifier_of(plan.config), plan.tokenizer)
    _refuse_large(student, config, teacher)
    refuse_other_tokenizers(student.tokenizer, "the generator")
    refuse_long_sequences("the student", student.positions, max_length)


def _refuse_large(student: Student, config: StudentConfig, teacher: Teacher) -> None:
    share = student.parameters_count / teacher.parameters_count
    if share > config.max_share:
        raise UsageError(
            f"student.model {config.model!r}: its {student.parameters_count:,} parameters are {share:.1%} of the "
            f"teacher's {teacher.parameters_count:,}, but at most {config.max_share:.1%} is allowed; raise "
            "student.max_share or give a smaller checkpoint"
        )


def build_student(
    config: StudentConfig, teacher: Teacher, label_names: tuple[str, ...], texts: Sequence[TextInput], seed: int
) -> Student:
    """Build the student and check its size.

    Args:
        config: The preset or the checkpoint, and the largest share.
        teacher: Gives weights, vocabulary and the size to compare with.
        label_names: The C classes.
        texts: Texts of the domains, without labels: a pruned vocabulary keeps the tokens that they use.
        seed: Draws the weights that are not initialised from the teacher.

    Returns:
        The student in eval mode, on the CPU.

    Raises:
        UsageError: If the checkpoint is broken, the preset does not suit the teacher or the student is larger than
            allowed.
        RunError: If the checkpoint cannot be fetched.
    """
    with seeded(seed):
        if config.model is not None:
            student = load_checkpoint(config.model, label_names)
            _refuse_large(student, config, teacher)
        else:
            request = StudentRequest(config, teacher, label_names, texts)
            shape, start = PRESETS[request.preset]
            plan = shape(request)
            student = Student(classifier_of(plan.config).eval(), plan.tokenizer)
            if start is not None:
                start(student, request, plan)
    student.model.eval()
    return student
