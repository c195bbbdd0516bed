"""The general student: a classifier and the projections that it is trained through."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import nn

from l2a.data.encoding import EncodedTexts, encode, inference_batches
from l2a.data.examples import TextInput
from l2a.pretrain.corpus import Corpus, PretrainConfig, StudentShape
from l2a.student.initialisation import start_by_averaging
from l2a.teacher.model import Teacher
from l2a.util.cache import cached_folder, fingerprint
from l2a.util.files import atomic_write_bytes, atomic_write_text
from l2a.util.progress import SILENT, Progress
from l2a.util.training import has_fast_bfloat16, mixed_precision, seeded


@dataclass(frozen=True)
class StudentStates:
    """What the student makes of a batch, in the teacher's space.

    Attributes:
        sentence: float32 (B, d), the projected input of the classifier's output layer.
        tokens: float32 (B, L, d), the projected last hidden states.
    """

    sentence: torch.Tensor
    tokens: torch.Tensor


class GeneralStudent(nn.Module):
    """A sequence classifier whose body is trained through two projections; they are dropped on export.

    Attributes:
        classifier: ``ElectraForSequenceClassification``; the ``dense`` layer of its head is trained here too, so that
            the exported head starts from a sentence representation, and only its output layer is fresh.
        sentence_projection: (h) -> (d).
        token_projection: (h) -> (d).
    """

    def __init__(self, classifier: nn.Module, teacher_width: int, seed: int) -> None:
        """Add the projections.

        Args:
            classifier: The student.
            teacher_width: Width d of the teacher's states.
            seed: Draws the projections.
        """
        super().__init__()
        self.classifier = classifier
        width = int(classifier.config.hidden_size)  # type: ignore[union-attr, arg-type]
        with seeded(seed):
            self.sentence_projection = nn.Linear(width, teacher_width)
            self.token_projection = nn.Linear(width, teacher_width)

    def forward(self, batch: dict[str, torch.Tensor]) -> StudentStates:
        """Project the student's states.

        Args:
            batch: input_ids, attention_mask and token_type_ids, int64 (B, L).

        Returns:
            The states in the teacher's space.
        """
        hidden = self.classifier.electra(**batch).last_hidden_state  # type: ignore[operator]
        sentence = self.sentence_projection(sentence_representation(self.classifier, hidden))
        return StudentStates(sentence.float(), self.token_projection(hidden).float())


def sentence_representation(classifier: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Compute what the output layer of an ELECTRA classifier reads: gelu(dense(first token)).

    Args:
        classifier: ``ElectraForSequenceClassification``.
        hidden: float (B, L, h), its last hidden states.

    Returns:
        float (B, h).
    """
    head: Any = classifier.classifier
    return torch.nn.functional.gelu(head.dense(hidden[:, 0]))


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


WORDS_PER_CHUNK = 4096
FITTED_TEXTS = 6000


def build_student(vectors: torch.Tensor, pad_token_id: int, shape: StudentShape, seed: int) -> nn.Module:
    """Create a student that starts by averaging given word vectors.

    Args:
        vectors: float32 (V, e), from ``principal_word_vectors``.
        pad_token_id: The padding token of the vocabulary.
        shape: Size of the student.
        seed: Draws every other weight.

    Returns:
        An ``ElectraForSequenceClassification`` with two labels and dropout 0.
    """
    from transformers import ElectraConfig, ElectraForSequenceClassification

    config = ElectraConfig(
        vocab_size=len(vectors),
        embedding_size=shape.embedding_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=shape.positions,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=pad_token_id,
    )
    with seeded(seed), torch.no_grad():
        student: Any = ElectraForSequenceClassification(config)
        student.electra.embeddings.word_embeddings.weight.copy_(vectors)
        # Inputs of unit variance: with the usual 0.02 the projection behind would have to be large and fragile.
        nn.init.normal_(student.classifier.dense.weight, std=shape.hidden_size**-0.5)
        start_by_averaging(student.electra)
    # On processors the fused attention's backward pass in bfloat16 is several times slower than plain products.
    student.set_attn_implementation("eager")
    return student  # type: ignore[no-any-return]


@torch.inference_mode()
def isolated_word_states(encoder: nn.Module, tokenizer: Any) -> NDArray[np.float32]:
    """Read every vocabulary entry through the teacher, on its own between the special tokens.

    Args:
        encoder: A transformers encoder.
        tokenizer: Its tokenizer.

    Returns:
        float32 (V, d), the last hidden state of each word.
    """
    device = next(encoder.parameters()).device
    ids = torch.arange(encoder.get_input_embeddings().num_embeddings, device=device)  # type: ignore[operator]
    first, last = (torch.full_like(ids, value) for value in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    inputs = torch.stack([first, ids, last], dim=1)
    parts = [encoder(part).last_hidden_state[:, 1] for part in torch.split(inputs, WORDS_PER_CHUNK)]
    return np.asarray(torch.cat(parts).float().cpu().numpy(), dtype=np.float32)


def average_word_states(targets: TeacherTargets, isolated: NDArray[np.float32]) -> NDArray[np.float32]:
    """Average each word's state over its places in the corpus; its isolated state counts as two places.

    Args:
        targets: The labelled corpus.
        isolated: float32 (V, d), which is all there is for words that the corpus lacks.

    Returns:
        float32 (V, d).
    """
    sums, counts = torch.from_numpy(2.0 * isolated), np.full(len(isolated), 2.0, np.float32)
    position = 0
    for part in targets.hidden:
        for start in range(0, len(part), WORDS_PER_CHUNK * 16):
            states = np.array(part[start : start + WORDS_PER_CHUNK * 16])
            ids = targets.encoded.ids[position + start : position + start + len(states)].astype(np.int64)
            sums.index_add_(0, torch.from_numpy(ids), torch.from_numpy(states).float())
            counts += np.bincount(ids, minlength=len(counts)).astype(np.float32)
        position += len(part)
    return np.asarray(sums.numpy() / counts[:, None], dtype=np.float32)


@torch.inference_mode()
def fit_projections(model: GeneralStudent, targets: TeacherTargets, seed: int) -> None:
    """Fit both projections to the teacher by ridge regression on a sample of texts.

    Args:
        model: The student, changed in place.
        targets: The labelled corpus.
        seed: Draws the sample.
    """
    rng = np.random.default_rng([seed, 2])
    sample = rng.choice(len(targets.encoded), min(FITTED_TEXTS, len(targets.encoded)), replace=False)
    sample = sample[np.argsort(targets.encoded.lengths[sample], kind="stable")]
    features: list[list[torch.Tensor]] = [[], [], [], []]
    for batch in np.array_split(sample, max(1, len(sample) // 64)):
        for kept, new in zip(features, _states_of_batch(model, targets, batch), strict=True):
            kept.append(new)
    sentence, pooled, token, states = (torch.cat(parts) for parts in features)
    _ridge(model.sentence_projection, sentence, pooled)
    _ridge(model.token_projection, token, states)


def _states_of_batch(
    model: GeneralStudent, targets: TeacherTargets, batch: NDArray[np.int64]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    device = next(model.parameters()).device
    inputs = targets.encoded.padded(batch, device)
    with mixed_precision(device):
        hidden = model.classifier.electra(**inputs).last_hidden_state  # type: ignore[operator]
        sentence = sentence_representation(model.classifier, hidden)
    rows = [torch.from_numpy(targets.states(int(index))).float() for index in batch]
    # One text in eight is enough for the tokens: there are many more of them.
    token = torch.cat([hidden[row, : len(states)].float().cpu() for row, states in enumerate(rows) if row % 8 == 0])
    pooled = torch.stack([states.mean(0) for states in rows])
    return sentence.float().cpu(), pooled, token, torch.cat(rows[::8])


def _ridge(layer: nn.Linear, features: torch.Tensor, targets: torch.Tensor) -> None:
    extended = torch.cat([features, torch.ones(len(features), 1)], dim=1).double()
    gram = extended.T @ extended
    gram += 1e-5 * gram.trace() / len(gram) * torch.eye(len(gram), dtype=torch.float64)
    weights = torch.linalg.solve(gram, extended.T @ targets.double()).to(layer.weight)
    layer.weight.copy_(weights[:-1].T)
    layer.bias.copy_(weights[-1])


OUTPUT_LAYER = "classifier.out_proj."


def save_student(model: GeneralStudent, tokenizer: Any, folder: Path) -> None:
    """Write the student without its projections.

    The output layer is left out: ``AutoModelForSequenceClassification`` draws a fresh one for any number of labels.

    Args:
        model: The trained student.
        tokenizer: The tokenizer it shares with the teacher.
        folder: Receives config.json, model.safetensors and the tokenizer's files.
    """
    classifier: Any = model.classifier
    weights = {
        name: value.detach().to(torch.float16).cpu().contiguous()
        for name, value in classifier.state_dict().items()
        if not name.startswith(OUTPUT_LAYER)
    }
    atomic_write_bytes(folder / "model.safetensors", save(weights, metadata={"format": "pt"}))
    classifier.config.architectures = [type(classifier).__name__]
    # Stored in float16, loaded in float32: fine-tuning in half precision diverges.
    classifier.config.dtype = torch.float32
    classifier.config.save_pretrained(folder)
    _plain_tokenizer(tokenizer, int(classifier.config.max_position_embeddings)).save_pretrained(folder)


def _plain_tokenizer(tokenizer: Any, positions: int) -> Any:
    plain = copy.deepcopy(tokenizer)
    plain.model_max_length = positions
    # The last call's truncation and padding would be saved along and surprise those who use the file on its own.
    plain.backend_tokenizer.no_truncation()
    plain.backend_tokenizer.no_padding()
    return plain


def write_card(folder: Path, config: PretrainConfig, facts: Mapping[str, Any]) -> None:
    """Write README.md: what the model is, how it was made and from what.

    Args:
        folder: The model's folder.
        config: Settings of the run.
        facts: Counts, file hashes and versions, as JSON can hold them.
    """
    text = " ".join(f"--text {name}" for name in config.text)
    protect = " ".join(f"--protect {name}" for name in config.protect)
    shape = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in vars(config.student).items())
    command = (
        f"l2a pretrain --teacher {config.teacher} {text} {protect} --steps {config.steps} --seed {config.seed} "
        f"--max-length {config.max_length} --variants {config.variants} --tokens-per-batch {config.tokens_per_batch} "
        f"--learning-rate {config.learning_rate} {shape} --output-dir {config.output_dir.name}"
    )
    atomic_write_text(folder / "README.md", _CARD.format(command=" ".join(command.split()), facts=_table(facts)))


def _table(facts: Mapping[str, Any]) -> str:
    rows = (f"| {name} | {value if isinstance(value, str) else json.dumps(value)} |" for name, value in facts.items())
    return "\n".join(["| fact | value |", "| --- | --- |", *rows])


_CARD = """---
library_name: transformers
pipeline_tag: text-classification
---
# General student

A small sequence classifier without a task: its body was distilled, on unlabelled text, from the teacher's hidden states
(sentence embeddings, the batch's similarity matrix, token states). Its output layer is not part of the checkpoint;
`AutoModelForSequenceClassification.from_pretrained(folder, num_labels=...)` draws a fresh one to be trained.

    {command}

{facts}
"""
