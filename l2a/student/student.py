"""The student: an ordinary sequence classifier of transformers, the weights that it starts from, and its presets."""

import copy
import json
import string
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers

from l2a.config import StudentConfig
from l2a.data import Bools, Floats, Ints, TextInput, encoding
from l2a.teacher.labelling import token_vectors
from l2a.teacher.model import PACKAGED, Checkpoint, Teacher, load_encoder, output_layer, usable_positions
from l2a.util import UsageError, training


class Student:
    """A sequence classifier, its tokenizer, and the features that its output layer reads.

    Attributes:
        model: ``AutoModelForSequenceClassification`` of transformers.
        tokenizer: Its fast tokenizer, whose own call returns what the model reads.
        output: The model's last linear layer (h) -> (C).
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """Watch a model's output layer; the tokenizer is copied.

        Raises:
            UsageError: If the model has no such layer.
        """
        self.model = model
        self.tokenizer = encoding.fit_tokenizer(tokenizer, model.config)
        self.output = output_layer(model)
        self._features = torch.zeros(0)
        self.output.register_forward_pre_hook(self._keep_features)

    def _keep_features(self, module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        self._features = arguments[0]

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Give a padded batch's logits, float32 (B, C), and the features that gave them, float32 (B, h).

        The batch is made by ``EncodedTexts.padded``; inputs_embeds, float32 (B, L, e), may stand for input_ids.
        """
        return self.model(**encoding.model_inputs(self.model.config, batch)).logits, self._features

    @property
    def positions(self) -> int | None:
        """Longest sequence that it reads, in tokens; None where there is no limit."""
        return usable_positions(self.model)

    @property
    def parameters_count(self) -> int:
        """All parameters, embeddings and head included."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def word_embeddings(self) -> torch.Tensor:
        """Return the word-embedding matrix, float32 (V, e), detached."""
        weight: torch.Tensor = self.model.get_input_embeddings().weight
        return weight.detach().float()

    def snapshot(self) -> dict[str, torch.Tensor]:
        """Copy all weights."""
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def restore(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Load weights that ``snapshot`` copied."""
        self.model.load_state_dict(weights)


def class_names(label_names: tuple[str, ...]) -> dict[str, Any]:
    """Name the C classes as a config of transformers wants them."""
    return {"id2label": dict(enumerate(label_names)), "label2id": {name: i for i, name in enumerate(label_names)}}


def load_checkpoint(model: str, label_names: tuple[str, ...], weights: bool = True) -> Student:
    """Load a folder, a Hub id or "minilm-l6" as a classifier; an output layer of another size is drawn afresh.

    Args:
        model: The checkpoint.
        label_names: The C classes.
        weights: False gives a student without memory for its weights, for checks.

    Raises:
        RunError: If it cannot be fetched.
        UsageError: If it is broken or no encoder with a fast tokenizer that fits it.
    """
    checkpoint = Checkpoint("student.model", model)
    checkpoint.config.update(class_names(label_names))
    loaded = checkpoint.load(transformers.AutoModelForSequenceClassification, weights, fresh_head=True)
    return Student(loaded, checkpoint.tokenizer)


def principal_word_vectors(states: Floats, size: int) -> torch.Tensor:
    """Project word states, float32 (V, d), onto their e leading principal components.

    Returns:
        float32 (V, e), the components' scales kept relative to each other, the rows' mean norm 0.1 sqrt(e): that is
        well above the positions' 0.02, so that words are what is averaged.

    Raises:
        UsageError: If e exceeds d.
    """
    projected = _projected(states, size)
    return projected.mul(0.1 * size**0.5 / projected.norm(dim=1).mean())


def _even_word_vectors(states: Floats, size: int) -> torch.Tensor:
    """Likewise, whitened and every row's norm 0.1 sqrt(e): a word then matches itself or its like, none by chance."""
    projected = _projected(states, size)
    whitened = projected / projected.std(0).clamp_min(1e-6)
    return whitened.mul(0.1 * size**0.5).div(whitened.norm(dim=1, keepdim=True).clamp_min(1e-6))


def _projected(states: Floats, size: int) -> torch.Tensor:
    if size > states.shape[1]:
        raise UsageError(f"embedding_size is {size}, which exceeds the teacher's width {states.shape[1]}; lower it")
    centred = torch.from_numpy(states - states.mean(0))
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :size]
    # The sign of an eigenvector is arbitrary: fixing it lets every machine start from the same student.
    return centred @ torch.where(directions.sum(0) < 0, -directions, directions)


def aligned_size(body: Any) -> int:
    """Tell how many entries of a BERT body's state can hold a word beside what it is compared with.

    That is the width of half of the attention heads; 0 where there is a single head, and nothing can be aligned.
    """
    heads = int(body.config.num_attention_heads)
    return heads // 2 * (int(body.config.hidden_size) // heads)


def _start_by_aligning(body: Any) -> None:
    """Let the first layer add to every word how it differs from its match in the other sentence."""
    # The words must fill the first ``aligned_size`` - 1 entries of the embeddings, the others must be 0.
    size, layer, types = aligned_size(body), body.encoder.layer[0], body.embeddings.token_type_embeddings.weight
    types.zero_()
    types[0, size - 1], types[1, size - 1] = 0.15, -0.15  # beside word entries of deviation 0.1
    reads, output = layer.attention.self, layer.attention.output.dense.weight
    query, key, value, width = reads.query.weight, reads.key.weight, reads.value.weight, reads.attention_head_size
    query[:size], key[:size], value[:size], output[:, :size] = 0, 0, 0, 0
    for start in range(0, size, width):
        for weight, contrast in ((query, -4.0), (key, 4.0)):  # a token looks away from its own sentence
            torch.nn.init.eye_(weight[start : start + width - 1, : width - 1])
            weight[start + width - 1, size - 1] = contrast
    torch.nn.init.eye_(value[:size, :size])
    torch.nn.init.eye_(output[size : 2 * size, :size])
    _compare(layer.intermediate.dense, layer.output.dense, size)


def _compare(inner: torch.nn.Linear, outer: torch.nn.Linear, size: int) -> None:
    """Replace the match y beside each word x by |x - y|, out of gelu(z) + gelu(-z) = |z| and gelu(z) - gelu(-z) = z."""
    identity = 2.0 * torch.eye(size)  # so sharp that gelu(z) + gelu(-z) is close to |z|
    inner.weight[: 4 * size], outer.weight[:, : 4 * size] = 0, 0
    for block, (word, match, sign) in enumerate(((1, -1, 1), (-1, 1, 1), (0, 1, -1), (0, -1, 1))):
        places = slice(block * size, (block + 1) * size)
        inner.weight[places, : 2 * size] = torch.cat([word * identity, match * identity], 1)
        outer.weight[size : 2 * size, places] = sign * torch.eye(size) / 2.0


def start_from_words(student: Student, vectors: Floats, of_pairs: bool) -> None:
    """Let a fresh student start as a mean over words; over words and what sets them apart from their matches in a pair.

    Every attention block starts as the mean over all tokens: small random queries and keys attend to all tokens alike,
    identity values and outputs pass the mean on. With the usual small random values the first token, which the
    classifier reads, sees nothing of the text for long. What the teacher makes of each token alone already holds much
    of the task, also for words that no text shows; the principal directions keep most of that.

    Args:
        student: A BERT classifier, changed in place.
        vectors: float32 (V, d), one vector for each token of its vocabulary.
        of_pairs: Whether to align the two texts, where there are two attention heads and a tokenizer that marks them.
    """
    body, table = student.model.base_model, student.model.get_input_embeddings()
    aligned = aligned_size(body) if of_pairs and any(student.tokenizer("a", "a")["token_type_ids"]) else 0
    with torch.no_grad():
        for layer in body.encoder.layer:
            torch.nn.init.eye_(layer.attention.self.value.weight)
            torch.nn.init.eye_(layer.attention.output.dense.weight)
        if aligned:
            table.weight.zero_()
            table.weight[:, : aligned - 1] = _even_word_vectors(vectors, aligned - 1)
            _start_by_aligning(body)
        else:
            table.weight.copy_(principal_word_vectors(vectors, table.embedding_dim))
    open_head(student)


def start_from_layers(student: Student, original: Any, kept: Ints, texts: Sequence[TextInput]) -> None:
    """Give a student a trained encoder's layers and the vectors of the tokens that it keeps.

    Args:
        student: Of the encoder's shape, perhaps with fewer tokens; changed in place.
        original: The trained encoder, whose table is cut to these tokens.
        kept: int64 (V,), its tokens in the encoder's vocabulary.
        texts: Texts to fit the square layer below the output on.
    """
    table = original.get_input_embeddings()
    table.weight = torch.nn.Parameter(table.weight.detach()[torch.from_numpy(kept)])
    student.model.base_model.load_state_dict(original.state_dict(), strict=False)
    open_head(student, texts)


def open_head(student: Student, texts: Sequence[TextInput] = ()) -> None:
    """Let the square layer start as the identity, or, given texts, centre and scale what it reads on them.

    The student is a BERT classifier in eval mode, changed in place. A trained body's entries differ widely in size; a
    fresh body's do not. They are divided by their size, not by their deviation between texts, which may be a hundredth
    of it: the body would then be too sensitive to be trained.
    """
    dense = [module for module in student.model.modules() if isinstance(module, torch.nn.Linear)][-2]
    mean, size = torch.zeros(dense.in_features), torch.ones(dense.in_features)
    if texts:
        states = _inputs_of(dense, student, texts)
        mean, size = states.mean(0), states.square().mean(0).sqrt()
        size = size.clamp_min(0.1 * float(size.mean()))  # entries near 0 are not blown up
    # Half the size, so that tanh and gelu are nearly linear.
    dense.load_state_dict({"weight": torch.diag(0.5 / size), "bias": -0.5 * mean / size})


@torch.inference_mode()
def _inputs_of(layer: torch.nn.Linear, student: Student, texts: Sequence[TextInput]) -> torch.Tensor:
    sides = [(side,) for text in texts for side in text]
    sample = [sides[i] for i in np.linspace(0, len(sides) - 1, min(512, len(sides)), dtype=int)]
    encoded, states = encoding.encode(student.tokenizer, sample, max_length=64), list[torch.Tensor]()
    with layer.register_forward_pre_hook(lambda module, arguments: states.append(arguments[0])):
        for indices in encoding.inference_batches(encoded):
            student(encoded.padded(indices))
    return torch.cat(states)


# Of every preset: with so few updates, dropout costs time and helps nothing.
NO_DROPOUT: Mapping[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Marks a token that continues a word.
PIECE = "##"


def refuse_other_tokenizers(tokenizer: Any) -> None:
    """Raise a UsageError when a fast tokenizer's vocabulary is not WordPiece, which the generator needs."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] != "WordPiece" or model["continuing_subword_prefix"] != PIECE:
        needed = f"needs a WordPiece vocabulary, and this one is {model['type']}"
        fix = "give --teacher or --student a model of the BERT family, such as BERT, MPNet, ELECTRA or DistilBERT"
        raise UsageError(f"the generator {needed}; {fix}")


def count_tokens(tokenizer: Any, texts: Sequence[TextInput]) -> Ints:
    """Count how often each token of a fast tokenizer occurs in texts, single or pairs, int64 (V,)."""
    sides, counts = [side for text in texts for side in text], np.zeros(len(tokenizer), np.int64)
    for first in range(0, len(sides), 2000):
        for ids in tokenizer(sides[first : first + 2000], add_special_tokens=False, verbose=False)["input_ids"]:
            np.add.at(counts, ids, 1)
    return counts


def needed_tokens(tokenizer: Any, counts: Ints) -> Bools:
    """Tell which tokens no pruning may drop, bool (V,), by the counts of ``count_tokens``.

    These are the added tokens, special ones included, and, alone and as a continuation, every character that is ASCII
    or occurs in the texts: with them, the longest match that WordPiece takes always finds a next piece.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    surfaces = [token.removeprefix(PIECE) or token for token in tokens]
    characters = {character for index in np.flatnonzero(counts) for character in surfaces[index]} | {*string.printable}
    added = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    return np.array([token in added or text in characters for token, text in zip(tokens, surfaces, strict=True)])


def choose_tokens(tokenizer: Any, counts: Ints, size: int) -> Ints:
    """Choose the tokens of a pruned vocabulary: int64 (n,), ids in the full vocabulary, rising.

    After the needed tokens come all other characters, while characters take a third of the vocabulary at most, then the
    tokens that the texts use most, then the vocabulary's first ones, which are its most common words.

    Args:
        tokenizer: A fast WordPiece tokenizer.
        counts: int64 (V,), from ``count_tokens``.
        size: n, at least the number of needed tokens.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    needed = needed_tokens(tokenizer, counts)
    single = np.array([len(token.removeprefix(PIECE) or token) == 1 for token in tokens])
    spelled = single & ((needed | single).sum() <= size / 3)
    # Words are cut at brackets, so that tokens such as [unused7] never come out of a text.
    unreachable = np.array([token[0] + token[-1] == "[]" for token in tokens])
    order = np.lexsort((np.arange(len(tokens)), -counts, unreachable, ~spelled, ~needed))
    return np.asarray(np.sort(order[:size]), dtype=np.int64)


def keep_tokens(tokenizer: Any, kept: Ints) -> Any:
    """Cut a fast WordPiece tokenizer down to some of its tokens, so that its token i is that of ``kept[i]``."""
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
        pruned = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    pruned.name_or_path = tokenizer.name_or_path
    return pruned


def classifier_of(config: Any, weights: bool = True) -> Any:
    """Make a sequence classifier with random weights in float32 and eval mode, or without memory for its weights."""
    classifier: Any = transformers.AutoModelForSequenceClassification
    with torch.device("cpu" if weights else "meta"):
        return classifier.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()


def parameters_count(config: Any) -> int:
    """Count the parameters of a classifier, embeddings and head included."""
    return sum(parameter.numel() for parameter in classifier_of(config, weights=False).parameters())


def largest_fitting(config: StudentConfig, teacher: Teacher, sizes: Sequence[int], shape: Callable[[int], Any]) -> Any:
    """Find the config of the largest model whose share of the teacher's parameters is allowed.

    ``shape`` gives the config of a size; the model grows with the ``sizes``, at least one, which rise.

    Raises:
        UsageError: If not even the first fits.
    """
    budget = int(config.max_share * teacher.parameters_count)
    fitting = bisect_right(sizes, budget, key=lambda size: parameters_count(shape(size)))
    if not fitting:
        least = parameters_count(shape(sizes[0]))
        share = np.ceil(1000 * least / teacher.parameters_count) / 1000
        lack = f"{budget:,} parameters, but the preset {config.preset!r} needs at least {least:,}"
        fix = f"raise student.max_share to {share}, choose another student.preset, or give --student a smaller model"
        raise UsageError(f"student.max_share: {config.max_share} of the teacher are {lack}; {fix}")
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

    def shape(width: int) -> Any:
        return transformers.BertConfig(
            vocab_size=len(teacher.tokenizer), pad_token_id=teacher.tokenizer.pad_token_id,
            hidden_size=width, intermediate_size=4 * width, num_attention_heads=attention_heads(width),
            num_hidden_layers=max(2, int(teacher.encoder.config.num_hidden_layers) // 3),
            max_position_embeddings=min(512, teacher.positions or 512), **NO_DROPOUT, **class_names(label_names),
        )  # fmt: skip

    widest = teacher.hidden_size
    shaped = largest_fitting(config, teacher, range(min(32, widest), widest + 1, 8), shape)
    student = Student(classifier_of(shaped, weights), teacher.tokenizer)
    if weights:
        start_from_words(student, token_vectors(teacher), of_pairs=len(texts) > 0 and len(texts[0]) == 2)
    return student


def _pretrained(
    config: StudentConfig, teacher: Teacher, label_names: tuple[str, ...], texts: Sequence[TextInput], weights: bool
) -> Student:
    """Take a packaged encoder with all its layers, over as many of its tokens as are allowed."""
    base = load_encoder(config.preset, label_names, 0, weights=weights)
    tokenizer, original = base.tokenizer, base.encoder

    def shape(vocabulary: int, pad_token_id: int = 0) -> Any:
        shaped = copy.deepcopy(original.config)
        tokens = {"vocab_size": vocabulary, "pad_token_id": pad_token_id}
        shaped.update({**tokens, **NO_DROPOUT, **class_names(label_names)})
        return shaped

    counts = count_tokens(tokenizer, texts)
    sizes = range(int(needed_tokens(tokenizer, counts).sum()), len(tokenizer) + 1)
    kept = choose_tokens(tokenizer, counts, largest_fitting(config, teacher, sizes, shape).vocab_size)
    pruned = keep_tokens(tokenizer, kept)
    student = Student(classifier_of(shape(len(kept), pruned.pad_token_id), weights), pruned)
    if weights:
        start_from_layers(student, original, kept, texts)
    return student


# Parameters of MiniLM-L6 over 4,000 tokens, about the fewest with which its words are not cut into small pieces.
ROOM_FOR_MINILM = 12_300_000
# Width from which a pretrained student wants a small learning rate: BERT-tiny, of 128, learns little at 1e-4.
WIDE = 256
PRESETS = {"narrow": _narrow, "minilm-l6": _pretrained, "bert-tiny": _pretrained}
"""How each preset is built; without weights for checks."""


def resolve_preset(config: StudentConfig, teacher: Teacher) -> StudentConfig:
    """Choose what "auto" stands for: MiniLM-L6 where an eighth of its vocabulary fits, "narrow" below that."""
    if config.preset != "auto":
        return config
    roomy = config.max_share * teacher.parameters_count >= ROOM_FOR_MINILM
    return StudentConfig("minilm-l6" if roomy else "narrow", config.model, config.max_share)


def wants_small_rate(config: StudentConfig, teacher: Teacher, width: int) -> bool:
    """Tell whether a student of a width starts from a pretrained encoder that large updates would spoil."""
    return width >= WIDE and (config.model is not None or resolve_preset(config, teacher).preset in PACKAGED)


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
    refuse_other_tokenizers(student.tokenizer)
    encoding.refuse_long_sequences("the student", student.positions, max_length)


def build_student(
    config: StudentConfig, teacher: Teacher, label_names: tuple[str, ...], texts: Sequence[TextInput], seed: int,
    weights: bool = True,
) -> Student:  # fmt: skip
    """Build the student, in eval mode and on the CPU, and check its size.

    Args:
        config: The preset or the checkpoint, and the largest share.
        teacher: Gives weights, vocabulary and the size to compare with.
        label_names: The C classes.
        texts: Texts of the domains, without labels: a pruned vocabulary keeps the tokens that they use.
        seed: Draws the weights that are not initialised from the teacher.
        weights: False gives a student without memory for its weights, for checks.

    Raises:
        UsageError: If the checkpoint is broken or too large, or the preset does not suit the teacher.
        RunError: If the checkpoint cannot be fetched.
    """
    with training.seeded(seed):
        if config.model is None:
            chosen = resolve_preset(config, teacher)
            return PRESETS[chosen.preset](chosen, teacher, label_names, texts, weights)
        student = load_checkpoint(config.model, label_names, weights)
    ours, theirs = student.parameters_count, teacher.parameters_count
    if ours / theirs > config.max_share:
        excess = f"its {ours:,} parameters are {ours / theirs:.1%} of the teacher's {theirs:,}"
        fix = f"but at most {config.max_share:.1%} is allowed; raise student.max_share or give a smaller checkpoint"
        raise UsageError(f"student.model {config.model!r}: {excess}, {fix}")
    return student
