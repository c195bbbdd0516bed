"""The student: an ordinary sequence classifier of transformers, and the weights that a fresh one starts from."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from l2a.data.encoding import encode, fit_tokenizer, inference_batches, model_inputs
from l2a.data.examples import TextInput
from l2a.teacher.model import Checkpoint, output_layer, usable_positions
from l2a.util.errors import UsageError


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
        self.tokenizer = fit_tokenizer(tokenizer, model.config)
        self.output = output_layer(model)
        self._features = torch.zeros(0)
        self.output.register_forward_pre_hook(self._keep_features)

    def _keep_features(self, module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        self._features = arguments[0]

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Classify a padded batch.

        Args:
            batch: As made by ``EncodedTexts.padded``; inputs_embeds, float32 (B, L, e), may stand for input_ids.

        Returns:
            Logits, float32 (B, C), and the features that gave them, float32 (B, h).
        """
        return self.model(**model_inputs(self.model.config, batch)).logits, self._features

    @property
    def positions(self) -> int | None:
        """Longest sequence that it reads, in tokens; None where there is no limit."""
        return usable_positions(self.model)

    @property
    def parameters_count(self) -> int:
        """All parameters, embeddings and head included."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def embeddings_name(self) -> str:
        """Name of the word-embedding matrix among the model's weights."""
        table = self.model.get_input_embeddings().weight
        return next(str(name) for name, parameter in self.model.named_parameters() if parameter is table)

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
    from transformers import AutoModelForSequenceClassification

    checkpoint = Checkpoint("student.model", model)
    checkpoint.config.update(class_names(label_names))
    loaded = checkpoint.load(AutoModelForSequenceClassification, weights, fresh_head=True)
    return Student(loaded, checkpoint.tokenizer)


def principal_word_vectors(states: NDArray[np.float32], size: int) -> torch.Tensor:
    """Project word states, float32 (V, d), onto their e leading principal components.

    Returns:
        float32 (V, e), the components' scales kept relative to each other, the rows' mean norm 0.1 sqrt(e): that is
        well above the positions' 0.02, so that words are what is averaged.

    Raises:
        UsageError: If e exceeds d.
    """
    projected = _projected(states, size)
    scale: torch.Tensor = 0.1 * size**0.5 / projected.norm(dim=1).mean()
    return projected * scale


def _even_word_vectors(states: NDArray[np.float32], size: int) -> torch.Tensor:
    """Likewise, whitened and every row's norm 0.1 sqrt(e): a word then matches itself or its like, none by chance."""
    projected = _projected(states, size)
    whitened = projected / projected.std(0).clamp_min(1e-6)
    lengths = whitened.norm(dim=1, keepdim=True).clamp_min(1e-6)
    even: torch.Tensor = 0.1 * size**0.5 * whitened / lengths
    return even


def _projected(states: NDArray[np.float32], size: int) -> torch.Tensor:
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
    """Let the first layer add to every word how it differs from its match in the other sentence.

    The words must fill the first ``aligned_size`` - 1 entries of the embeddings, the others must be 0.
    """
    size, layer, types = aligned_size(body), body.encoder.layer[0], body.embeddings.token_type_embeddings.weight
    types.zero_()
    types[0, size - 1], types[1, size - 1] = 0.15, -0.15  # beside word entries of deviation 0.1
    _attend_to_matches(layer.attention, size)
    _compare(layer.intermediate.dense, layer.output.dense, size)


def _attend_to_matches(attention: Any, size: int) -> None:
    query, key, value = attention.self.query.weight, attention.self.key.weight, attention.self.value.weight
    width, output = attention.self.attention_head_size, attention.output.dense.weight
    query[:size], key[:size], value[:size], output[:, :size] = 0, 0, 0, 0
    for start in range(0, size, width):
        for weight, contrast in ((query, -4.0), (key, 4.0)):  # a token looks away from its own sentence
            nn.init.eye_(weight[start : start + width - 1, : width - 1])
            weight[start + width - 1, size - 1] = contrast
    nn.init.eye_(value[:size, :size])
    nn.init.eye_(output[size : 2 * size, :size])


def _compare(inner: nn.Linear, outer: nn.Linear, size: int) -> None:
    """Replace the match y beside each word x by |x - y|, out of gelu(z) + gelu(-z) = |z| and gelu(z) - gelu(-z) = z."""
    identity = 2.0 * torch.eye(size)  # so sharp that gelu(z) + gelu(-z) is close to |z|
    inner.weight[: 4 * size], outer.weight[:, : 4 * size] = 0, 0
    for block, (word, match, sign) in enumerate(((1, -1, 1), (-1, 1, 1), (0, 1, -1), (0, -1, 1))):
        places = slice(block * size, (block + 1) * size)
        inner.weight[places, : 2 * size] = torch.cat([word * identity, match * identity], 1)
        outer.weight[size : 2 * size, places] = sign * torch.eye(size) / 2.0


def start_by_averaging(body: Any) -> None:
    """Let every attention block of a BERT body start as the mean over all tokens.

    Small random queries and keys attend to all tokens alike; identity values and outputs pass the mean on. With the
    usual small random values the first token, which the classifier reads, sees nothing of the text for long.
    """
    with torch.no_grad():
        for layer in body.encoder.layer:
            nn.init.eye_(layer.attention.self.value.weight)
            nn.init.eye_(layer.attention.output.dense.weight)


def start_from_words(student: Student, vectors: NDArray[np.float32], of_pairs: bool) -> None:
    """Let a fresh student start as a mean over words; over words and what sets them apart from their matches in a pair.

    What the teacher makes of each token alone already holds much of the task, also for words that no text shows; the
    principal directions keep most of that.

    Args:
        student: A BERT classifier, changed in place.
        vectors: float32 (V, d), one vector for each token of its vocabulary.
        of_pairs: Whether it is to align the two texts that it reads; it needs two attention heads, and a tokenizer
            that marks the texts.
    """
    body, table = student.model.base_model, student.model.get_input_embeddings()
    marks_sides = any(student.tokenizer("a", "a")["token_type_ids"])
    aligned = aligned_size(body) if of_pairs and marks_sides else 0
    start_by_averaging(body)
    with torch.no_grad():
        if aligned:
            table.weight.zero_()
            table.weight[:, : aligned - 1] = _even_word_vectors(vectors, aligned - 1)
            _start_by_aligning(body)
        else:
            table.weight.copy_(principal_word_vectors(vectors, table.embedding_dim))
    open_head(student)


def queries_of(body: Any) -> list[nn.Module]:
    """List the layers that make an encoder's queries, the last layer's last; none for an unknown architecture."""
    names = ("query", "q_lin", "q")
    return [module for name, module in body.named_modules() if name.rpartition(".")[2] in names]


def start_from_layers(
    student: Student, original: Any, kept: NDArray[np.int64], texts: Sequence[TextInput], is_cut: bool
) -> None:
    """Give a student a trained encoder's layers and the vectors of the tokens that it keeps.

    Args:
        student: Of the encoder's shape, perhaps with fewer layers and tokens; changed in place.
        original: The trained encoder.
        kept: int64 (V,), its tokens in the encoder's vocabulary.
        texts: Texts to fit the square layer below the output on.
        is_cut: Whether upper layers are missing. The first token, which is all that the classifier reads, has hardly
            looked at the others yet in the middle of an encoder: the last layer then attends to all tokens alike.
    """
    body = student.model.base_model
    shapes = {name: value.shape for name, value in body.state_dict().items()}
    shared = {name: value for name, value in original.state_dict().items() if shapes.get(name) == value.shape}
    body.load_state_dict(shared, strict=False)
    with torch.no_grad():
        body.get_input_embeddings().weight.copy_(original.get_input_embeddings().weight[torch.from_numpy(kept)])
        for parameter in queries_of(body)[-1].parameters() if is_cut else ():
            nn.init.zeros_(parameter)
    open_head(student, texts)


def open_head(student: Student, texts: Sequence[TextInput] = ()) -> None:
    """Let the square layer start as the identity, or centre and scale what it reads on some texts.

    A trained body's entries differ widely in size; a fresh body's do not. They are divided by their size, not by their
    deviation between texts, which may be a hundredth of it: the body would then be too sensitive to be trained.

    Args:
        student: A student in eval mode, its square layer changed in place where it has one.
        texts: Texts to measure on; none for the identity.
    """
    dense = [module for module in student.model.modules() if isinstance(module, nn.Linear)][-2]
    if not dense.in_features == dense.out_features == student.output.in_features:
        return
    mean, size = torch.zeros(dense.in_features), torch.ones(dense.in_features)
    if texts and dense.bias is not None:
        states = _inputs_of(dense, student, texts)
        mean, size = states.mean(0), states.square().mean(0).sqrt()
        size = size.clamp_min(0.1 * float(size.mean()))  # entries near 0 are not blown up
    with torch.no_grad():  # half the size, so that tanh and gelu are nearly linear
        dense.weight.copy_(torch.diag(0.5 / size))
        if dense.bias is not None:
            dense.bias.copy_(-0.5 * mean / size)


@torch.inference_mode()
def _inputs_of(layer: nn.Linear, student: Student, texts: Sequence[TextInput]) -> torch.Tensor:
    sides = [(side,) for text in texts for side in text]
    sample = [sides[i] for i in np.linspace(0, len(sides) - 1, min(512, len(sides)), dtype=int)]
    encoded, states = encode(student.tokenizer, sample, max_length=64), list[torch.Tensor]()
    hook = layer.register_forward_pre_hook(lambda module, arguments: states.append(arguments[0]))
    for indices in inference_batches(encoded):
        student(encoded.padded(indices))
    hook.remove()
    return torch.cat(states)
