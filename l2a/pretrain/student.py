"""The general student: a classifier and the projections that it is trained through."""

import copy
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import nn

from l2a.data.encoding import EncodedTexts, encode, fit_tokenizer, inference_batches
from l2a.data.examples import TextInput
from l2a.kd.data import Indices, join_encoded
from l2a.pretrain.corpus import Corpus, PretrainConfig
from l2a.student.student import principal_word_vectors, start_by_averaging
from l2a.teacher.model import Teacher
from l2a.util.files import atomic_write_bytes, atomic_write_text, cached_folder, fingerprint
from l2a.util.progress import SILENT, Progress
from l2a.util.training import has_fast_bfloat16, mixed_precision, seeded


class GeneralStudent(nn.Module):
    """A sequence classifier whose body is trained through two projections; they are dropped on export.

    Attributes:
        classifier: ``ElectraForSequenceClassification``; the ``dense`` layer of its head is trained here too, so that
            the exported head starts from a sentence representation, and only its output layer is fresh.
        sentence_projection: (h) -> (d).
        token_projection: (h) -> (d).
    """

    def __init__(self, classifier: Any, teacher_width: int, seed: int) -> None:
        """Add the projections.

        Args:
            classifier: The student.
            teacher_width: Width d of the teacher's states.
            seed: Draws the projections.
        """
        super().__init__()
        self.classifier = classifier
        width = int(classifier.config.hidden_size)
        with seeded(seed):
            self.sentence_projection = nn.Linear(width, teacher_width)
            self.token_projection = nn.Linear(width, teacher_width)

    def states(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute what the output layer reads, gelu(dense(first token)), and the last hidden states.

        Args:
            batch: input_ids, attention_mask and token_type_ids, int64 (B, L).

        Returns:
            float (B, h) and float (B, L, h).
        """
        hidden = self.classifier.electra(**batch).last_hidden_state
        return nn.functional.gelu(self.classifier.classifier.dense(hidden[:, 0])), hidden

    def forward(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Project the student's states into the teacher's space.

        Args:
            batch: As for ``states``.

        Returns:
            float32 (B, d), sentences, and float32 (B, L, d), tokens.
        """
        sentence, hidden = self.states(batch)
        return self.sentence_projection(sentence).float(), self.token_projection(hidden).float()


RECIPE = 1
"""To be raised whenever the same corpus would be labelled otherwise: part of the cache's key."""
HIDDEN_FILE = "hidden.f16"


@dataclass(frozen=True)
class TeacherTargets:
    """Texts as the teacher reads them, and what it makes of them.

    Attributes:
        encoded: Token ids of N texts.
        hidden: float16 (tokens, d), memory-mapped: the last hidden state of every token in order; the mean over a
            text's tokens is its pooled embedding.
    """

    encoded: EncodedTexts
    hidden: NDArray[np.float16]

    def states(self, index: int) -> NDArray[np.float16]:
        """Read the hidden states of one text.

        Args:
            index: Position of the text.

        Returns:
            float16 (tokens, d).
        """
        return np.array(self.hidden[self.encoded.offsets[index] : self.encoded.offsets[index + 1]])

    def padded_hidden(self, batch: Indices, width: int) -> torch.Tensor:
        """Read the hidden states of a batch.

        Args:
            batch: int64 (B,), positions of the texts.
            width: Padded length L.

        Returns:
            bfloat16 (B, L, d), zero where padded.
        """
        padded = torch.zeros(len(batch), width, self.hidden.shape[1], dtype=torch.bfloat16)
        for row, index in enumerate(batch):
            states = torch.from_numpy(self.states(int(index)))
            padded[row, : len(states)] = states
        return padded


def label_texts(
    teacher: Teacher, corpus: Corpus, config: PretrainConfig, device: torch.device, progress: Progress = SILENT
) -> TeacherTargets:
    """Run the teacher over the texts and their variants once; the result is cached by content.

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
    parts = [_encode_corpus(teacher.tokenizer, texts, config.max_length) for texts in (corpus.texts, corpus.variants)]
    encoded = join_encoded(parts)
    dtype = torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    shape = (len(encoded.ids), teacher.hidden_size)

    def build(folder: Path) -> None:
        encoder = copy.deepcopy(teacher.encoder).to(device, dtype)
        hidden, start = np.memmap(folder / HIDDEN_FILE, np.float16, "w+", shape=shape), 0
        with progress.stage("label the corpus", len(encoded.ids)) as advance:
            for part in parts:
                for batch in inference_batches(part, tokens_per_batch=4096):
                    advance(_write_batch(encoder, part, batch, hidden[start:]))
                start += len(part.ids)
        hidden.flush()

    tokens = (encoded.ids, encoded.types, encoded.offsets, len(parts[0]))
    folder = cached_folder("pretraining", fingerprint(RECIPE, str(dtype), teacher.fingerprint(), *tokens), build)
    return TeacherTargets(encoded, np.memmap(folder / HIDDEN_FILE, np.float16, "r", shape=shape))


def _encode_corpus(tokenizer: Any, texts: Sequence[TextInput], max_length: int) -> EncodedTexts:
    """Tokenise single texts, then pairs."""
    return join_encoded([encode(tokenizer, [text for text in texts if len(text) == n], max_length) for n in (1, 2)])


@torch.inference_mode()
def _write_batch(encoder: nn.Module, encoded: EncodedTexts, batch: Indices, hidden: NDArray[np.float16]) -> int:
    inputs = encoded.padded(batch, next(encoder.parameters()).device)
    states = encoder(**inputs).last_hidden_state.to(torch.float16).cpu().numpy()
    for row, index in enumerate(batch):
        start, end = encoded.offsets[index], encoded.offsets[index + 1]
        hidden[start:end] = states[row, : end - start]
    return int(encoded.lengths[batch].sum())


WORDS_PER_CHUNK = 4096
FITTED_TEXTS = 6000


def start_student(teacher: Teacher, targets: TeacherTargets, config: PretrainConfig) -> GeneralStudent:
    """Build the student in the state that training starts from.

    Args:
        teacher: The pretrained teacher.
        targets: The labelled corpus.
        config: Size and seed.

    Returns:
        The student, with its projections fitted.

    Raises:
        UsageError: If the student's word vectors are wider than the teacher.
    """
    states = _average_word_states(targets, _isolated_word_states(teacher.encoder, teacher.tokenizer))
    vectors = principal_word_vectors(states, config.embedding_size)
    student = _build_student(vectors, int(teacher.tokenizer.pad_token_id), config)
    model = GeneralStudent(student, teacher.hidden_size, config.seed)
    _fit_projections(model, targets, config.seed)
    return model


def _build_student(vectors: torch.Tensor, pad_token_id: int, settings: PretrainConfig) -> Any:
    """Create a student of two labels and no dropout that starts by averaging given word vectors, float32 (V, e)."""
    from transformers import ElectraConfig, ElectraForSequenceClassification

    config = ElectraConfig(
        vocab_size=len(vectors),
        embedding_size=settings.embedding_size,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        intermediate_size=settings.intermediate_size,
        max_position_embeddings=settings.positions,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=pad_token_id,
    )
    with seeded(settings.seed), torch.no_grad():
        student: Any = ElectraForSequenceClassification(config)
        student.electra.embeddings.word_embeddings.weight.copy_(vectors)
        # Inputs of unit variance: with the usual 0.02 the projection behind would have to be large and fragile.
        nn.init.normal_(student.classifier.dense.weight, std=settings.hidden_size**-0.5)
        start_by_averaging(student.electra)
    # On processors the fused attention's backward pass in bfloat16 is several times slower than plain products.
    student.set_attn_implementation("eager")
    return student


@torch.inference_mode()
def _isolated_word_states(encoder: nn.Module, tokenizer: Any) -> NDArray[np.float32]:
    """Read every vocabulary entry alone between the special tokens: float32 (V, d), its last hidden state."""
    device = next(encoder.parameters()).device
    ids = torch.arange(encoder.get_input_embeddings().num_embeddings, device=device)  # type: ignore[operator]
    first, last = (torch.full_like(ids, value) for value in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    inputs = torch.stack([first, ids, last], dim=1)
    parts = [encoder(part).last_hidden_state[:, 1] for part in torch.split(inputs, WORDS_PER_CHUNK)]
    return np.asarray(torch.cat(parts).float().cpu().numpy(), dtype=np.float32)


def _average_word_states(targets: TeacherTargets, isolated: NDArray[np.float32]) -> NDArray[np.float32]:
    """Average each word's state over the corpus, (V, d); its isolated state counts as two places."""
    sums, counts = torch.from_numpy(2.0 * isolated), np.full(len(isolated), 2.0, np.float32)
    for start in range(0, len(targets.hidden), WORDS_PER_CHUNK * 16):
        states = torch.from_numpy(np.array(targets.hidden[start : start + WORDS_PER_CHUNK * 16])).float()
        ids = targets.encoded.ids[start : start + len(states)].astype(np.int64)
        sums.index_add_(0, torch.from_numpy(ids), states)
        counts += np.bincount(ids, minlength=len(counts)).astype(np.float32)
    return np.asarray(sums.numpy() / counts[:, None], dtype=np.float32)


@torch.inference_mode()
def _fit_projections(model: GeneralStudent, targets: TeacherTargets, seed: int) -> None:
    """Fit both projections to the teacher by ridge regression on a sample of texts."""
    rng = np.random.default_rng([seed, 2])
    sample = rng.choice(len(targets.encoded), min(FITTED_TEXTS, len(targets.encoded)), replace=False)
    sample = sample[np.argsort(targets.encoded.lengths[sample], kind="stable")]
    batches = [_states_of_batch(model, targets, batch) for batch in np.array_split(sample, max(1, len(sample) // 64))]
    sentence, pooled, token, states = (torch.cat(parts) for parts in zip(*batches, strict=True))
    _ridge(model.sentence_projection, sentence, pooled)
    _ridge(model.token_projection, token, states)


def _states_of_batch(
    model: GeneralStudent, targets: TeacherTargets, batch: Indices
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    device = next(model.parameters()).device
    with mixed_precision(device):
        sentence, hidden = (part.float().cpu() for part in model.states(targets.encoded.padded(batch, device)))
    rows = [torch.from_numpy(targets.states(int(index))).float() for index in batch]
    # One text in eight is enough for the tokens: there are many more of them.
    token = torch.cat([hidden[row, : len(states)] for row, states in enumerate(rows) if row % 8 == 0])
    return sentence, torch.stack([states.mean(0) for states in rows]), token, torch.cat(rows[::8])


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
    classifier = model.classifier
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
    positions = int(classifier.config.max_position_embeddings)
    fit_tokenizer(tokenizer, classifier.config, positions).save_pretrained(folder)


def write_card(folder: Path, config: PretrainConfig, model: GeneralStudent, targets: TeacherTargets) -> None:
    """Write README.md: what the model is and how it was made.

    Args:
        folder: The model's folder.
        config: Settings of the run.
        model: The student.
        targets: The labelled corpus.
    """
    words = ["l2a", "pretrain"]
    for name, value in (vars(config) | {"output_dir": config.output_dir.name}).items():
        flag = f"--{name.replace('_', '-')}"
        for item in value if isinstance(value, tuple) else (value,):
            words += [] if item is None or item is False else [flag] if item is True else [flag, str(item)]
    parameters = sum(parameter.numel() for parameter in model.classifier.parameters())
    card = _CARD.format(command=shlex.join(words), parameters=parameters, texts=len(targets.encoded))
    atomic_write_text(folder / "README.md", card)


_CARD = """---
library_name: transformers
pipeline_tag: text-classification
---
# General student

A small sequence classifier without a task: its body was distilled, on unlabelled text, from the teacher's hidden states
(sentence embeddings, the batch's similarity matrix, token states). Its output layer is not part of the checkpoint;
`AutoModelForSequenceClassification.from_pretrained(folder, num_labels=...)` draws a fresh one to be trained.

    {command}

With a head of two classes it has {parameters} parameters. It read {texts} texts and variants of them.
"""
