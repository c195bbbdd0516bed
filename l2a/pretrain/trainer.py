"""General distillation: the student and its closed-form start, losses against the teacher's states, exact resuming."""

import dataclasses
import json
import math
import shlex
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from l2a.data.encoding import bucket_of, fit_tokenizer
from l2a.kd.data import Indices
from l2a.pretrain.corpus import PretrainConfig, TeacherTargets, label_texts, read_corpus
from l2a.student.student import principal_word_vectors, start_by_averaging
from l2a.teacher.model import Teacher, load_encoder, mean_pool
from l2a.util.errors import RunError
from l2a.util.files import (
    atomic_folder,
    atomic_write_bytes,
    atomic_write_text,
    cache_root,
    fingerprint,
    output_folder,
    restore_folder,
)
from l2a.util.progress import SILENT, Progress
from l2a.util.training import best_device, mixed_precision, seeded


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

    def states(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Compute what the output layer reads, gelu(dense(first token)), and the last hidden states.

        Args:
            batch: input_ids, attention_mask and token_type_ids, int64 (B, L).

        Returns:
            float (B, h) and float (B, L, h).
        """
        hidden = self.classifier.electra(**batch).last_hidden_state
        return nn.functional.gelu(self.classifier.classifier.dense(hidden[:, 0])), hidden

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Project the student's states into the teacher's space.

        Args:
            batch: As for ``states``.

        Returns:
            float32 (B, d), sentences, and float32 (B, L, d), tokens.
        """
        sentence, hidden = self.states(batch)
        return self.sentence_projection(sentence).float(), self.token_projection(hidden).float()


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
    vectors = principal_word_vectors(_word_states(teacher, targets), config.embedding_size)
    student = _build_student(vectors, int(teacher.tokenizer.pad_token_id), config)
    model = GeneralStudent(student, teacher.hidden_size, config.seed)
    _fit_projections(model, targets, config.seed)
    return model


def _build_student(vectors: Tensor, pad_token_id: int, settings: PretrainConfig) -> Any:
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
def _word_states(teacher: Teacher, targets: TeacherTargets) -> NDArray[np.float32]:
    """Average each word's last hidden state over the corpus, (V, d); that of the word alone counts as two places."""
    ids = torch.arange(teacher.encoder.get_input_embeddings().num_embeddings)
    special = (teacher.tokenizer.cls_token_id, teacher.tokenizer.sep_token_id)
    first, last = (torch.full_like(ids, token) for token in special)
    parts = torch.split(torch.stack([first, ids, last], dim=1), WORDS_PER_CHUNK)
    sums = 2.0 * torch.cat([teacher.encoder(part).last_hidden_state[:, 1].float() for part in parts])
    counts = torch.full((len(sums), 1), 2.0)
    for start in range(0, len(targets.hidden), WORDS_PER_CHUNK * 16):
        states = torch.from_numpy(np.array(targets.hidden[start : start + WORDS_PER_CHUNK * 16])).float()
        words = torch.from_numpy(targets.encoded.ids[start : start + len(states)].astype(np.int64))
        sums.index_add_(0, words, states)
        counts += torch.bincount(words, minlength=len(sums))[:, None]
    averages: NDArray[np.float32] = (sums / counts).numpy()
    return averages


@torch.inference_mode()
def _fit_projections(model: GeneralStudent, targets: TeacherTargets, seed: int) -> None:
    """Fit both projections to the teacher by ridge regression on a sample of texts."""
    texts, device = len(targets.encoded), next(model.parameters()).device
    sample = np.random.default_rng([seed, 2]).choice(texts, min(FITTED_TEXTS, texts), replace=False)
    sample = sample[np.argsort(targets.encoded.lengths[sample], kind="stable")]
    sentences, pooled, tokens, states = [], [], [], []
    for batch in np.array_split(sample, max(1, len(sample) // 64)):
        with mixed_precision(device):
            sentence, hidden = (part.float().cpu() for part in model.states(targets.encoded.padded(batch, device)))
        taught = [torch.from_numpy(targets.states(int(index))).float() for index in batch]
        sentences.append(sentence)
        pooled.append(torch.stack([row.mean(0) for row in taught]))
        # One text in eight is enough for the tokens: there are many more of them.
        states.append(torch.cat(taught[::8]))
        tokens.append(torch.cat([row[: len(few)] for row, few in zip(hidden[::8], taught[::8], strict=True)]))
    _ridge(model.sentence_projection, torch.cat(sentences), torch.cat(pooled))
    _ridge(model.token_projection, torch.cat(tokens), torch.cat(states))


def _ridge(layer: nn.Linear, features: Tensor, targets: Tensor) -> None:
    extended = torch.cat([features, torch.ones(len(features), 1)], dim=1).double()
    gram = extended.T @ extended
    gram += 1e-5 * gram.trace() / len(gram) * torch.eye(len(gram), dtype=torch.float64)
    weights = torch.linalg.solve(gram, extended.T @ targets.double()).to(layer.weight)
    layer.weight.copy_(weights[:-1].T)
    layer.bias.copy_(weights[-1])


WINDOW = 64
"""Batches' worth of tokens that are sorted by length together."""


def epoch_batches(lengths: Indices, tokens_per_batch: int, rng: np.random.Generator) -> list[Indices]:
    """Shuffle one epoch into batches of texts of similar length.

    Args:
        lengths: int64 (N,), tokens in each text.
        tokens_per_batch: Padded tokens in a batch, at most (a single longer text is a batch of its own).
        rng: Source of the order.

    Returns:
        int64 positions of each batch; every text occurs once.
    """
    order = rng.permutation(len(lengths))
    batches: list[list[int]] = []
    for chunk in np.array_split(order, max(1, int(lengths.sum()) // (WINDOW * tokens_per_batch))):
        batches.append([])
        for text in chunk[np.argsort(lengths[chunk], kind="stable")].tolist():
            if bucket_of(int(lengths[text])) * (len(batches[-1]) + 1) > tokens_per_batch and batches[-1]:
                batches.append([])
            batches[-1].append(text)
    return [np.array(batches[position]) for position in rng.permutation(len(batches))]


def batch_stream(
    lengths: Indices, tokens_per_batch: int, seed: int, first_step: int, last_step: int
) -> Iterator[Indices]:
    """Give the batches of a range of steps.

    Args:
        lengths: int64 (N,), tokens in each text.
        tokens_per_batch: Padded tokens in a batch.
        seed: Of the order; epoch e is drawn from (seed, e).
        first_step: The first step wanted.
        last_step: One past the last.

    Yields:
        int64 positions of one batch a step.
    """
    step, epoch = 0, 0
    while step < last_step:
        batches = epoch_batches(lengths, tokens_per_batch, np.random.default_rng([seed, epoch]))
        yield from batches[max(0, first_step - step) : last_step - step]
        step, epoch = step + len(batches), epoch + 1


STATES = "states.safetensors"
STEP = "step.json"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def save_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write a checkpoint that takes the place of the last one in one move.

    Args:
        folder: The checkpoint's folder.
        model: Its parameters and their AdamW moments are saved.
        optimizer: AdamW over the model's parameters.
        step: Steps done.

    Raises:
        RunError: If the disk is full.
    """
    tensors = {f"model.{name}": value.detach().contiguous() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"{moment}.{name}": value for moment, value in optimizer.state.get(parameter, {}).items()}
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / STATES)
        atomic_write_text(temporary / STEP, json.dumps({"step": step}))


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Continue where a checkpoint left off.

    Args:
        folder: The checkpoint's folder.
        model: Filled in place.
        optimizer: Filled in place.

    Returns:
        Steps done; 0 if there is no checkpoint.
    """
    restore_folder(folder)
    if not folder.is_dir():
        return 0
    tensors = load_file(folder / STATES)
    model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
    for name, parameter in model.named_parameters():
        state = {moment: tensors[f"{moment}.{name}"] for moment in MOMENTS if f"{moment}.{name}" in tensors}
        optimizer.state[parameter] = {moment: value.to(parameter.device) for moment, value in state.items()}
    return int(json.loads((folder / STEP).read_text("utf-8"))["step"])


def checkpoint_folder(config: PretrainConfig, targets: TeacherTargets) -> Path:
    """Name the checkpoint of a run: it lies in the cache, under everything that decides the student.

    Args:
        config: Settings of the run.
        targets: The labelled corpus.

    Returns:
        The folder, which may not exist yet.
    """
    choices = dataclasses.asdict(config) | {"output_dir": str(config.output_dir.resolve())}
    del choices["checkpoint_every"], choices["overwrite"]  # a resumed run may change these
    encoded = targets.encoded
    key = fingerprint(choices, encoded.ids, encoded.types, encoded.offsets, targets.states(0))
    return cache_root() / "checkpoints" / key


def sentence_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean of 1 - cos between projected sentence representations and the teacher's embeddings.

    The cosine term of DistilBERT (Sanh et al., 2019), here on pooled states.

    Args:
        predicted: float (B, d), the student's representation after its projection.
        target: float (B, d), the teacher's mean-pooled last hidden states.

    Returns:
        A scalar in [0, 2].
    """
    return (1.0 - F.cosine_similarity(predicted, target, dim=-1)).mean()


def token_loss(predicted: Tensor, target: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean of 1 - cos between projected hidden states and the teacher's, over the real tokens of the batch.

    The cosine term of DistilBERT (Sanh et al., 2019), after a projection as TinyBERT's hidden-state loss has (Jiao et
    al., 2020, equation 8).

    Args:
        predicted: float (B, L, d).
        target: float (B, L, d).
        attention_mask: int64 (B, L), 1 for real tokens.

    Returns:
        A scalar in [0, 2].
    """
    distances = 1.0 - F.cosine_similarity(predicted, target, dim=-1)
    mask = attention_mask.to(distances.dtype)
    return (distances * mask).sum() / mask.sum()


def similarity_loss(predicted: Tensor, target: Tensor, temperature: float = 0.05) -> Tensor:
    """Match who is near whom in the batch (our derivation, in the manner of relational distillation).

    Every text's cosines to the others, divided by the temperature, are softmaxed; the loss is the mean over texts of
    KL(teacher || student).

    Args:
        predicted: float (B, d), B >= 1.
        target: float (B, d).
        temperature: Lower looks at nearer neighbours only; 0.05 is the scale that sentence encoders are trained with.

    Returns:
        A scalar >= 0, and 0 when there is no other text in the batch.
    """
    if len(predicted) < 2:
        return predicted.sum() * 0.0
    others = ~torch.eye(len(predicted), dtype=torch.bool, device=predicted.device)
    states = (F.normalize(part.float(), dim=-1) for part in (predicted, target))
    cosines = ((part @ part.T)[others].view(len(others), -1) for part in states)
    student, teacher = (torch.log_softmax(part / temperature, dim=-1) for part in cosines)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


WARM_UP = 0.05
LOG_EVERY = 50
SIMILARITY_WEIGHT = 0.05
WORD_RATE = 3.0
"""Rate of the word vectors relative to the rest: most words are seen in few steps."""


def train(
    model: GeneralStudent, targets: TeacherTargets, config: PretrainConfig, folder: Path, progress: Progress = SILENT
) -> None:
    """Train in place, from the checkpoint if there is one.

    Args:
        model: On the device to train on.
        targets: The labelled corpus.
        config: Steps, rate, batch and seed.
        folder: Of the checkpoint.
        progress: Shows the steps and records the losses.

    Raises:
        RunError: If a loss is not finite.
    """
    optimizer = _optimizer(model, config)
    first = load_checkpoint(folder, model, optimizer)
    stream = batch_stream(targets.encoded.lengths, config.tokens_per_batch, config.seed, first, config.steps)
    with progress.stage("general stage", config.steps) as advance:
        advance(first)
        for step, batch in enumerate(stream, start=first):
            losses = _step(model, optimizer, targets, batch, learning_rate(step, config))
            _check_and_log(losses, step, progress)
            advance(1)
            if (step + 1) % config.checkpoint_every == 0:
                save_checkpoint(folder, model, optimizer, step + 1)


def learning_rate(step: int, config: PretrainConfig) -> float:
    """Rate of a step: linear warm-up over 5 % of the steps, then linear decay to zero.

    Args:
        step: Steps done before it.
        config: Steps and peak rate.

    Returns:
        The rate.
    """
    warm_up = max(1, math.ceil(WARM_UP * config.steps))
    rising = (step + 1) / warm_up
    falling = (config.steps - step) / max(1, config.steps - warm_up)
    return config.learning_rate * min(rising, falling, 1.0)


def _optimizer(model: GeneralStudent, config: PretrainConfig) -> torch.optim.AdamW:
    words = model.classifier.get_input_embeddings().weight
    others = [parameter for parameter in model.parameters() if parameter is not words]
    groups = [
        {"params": [words], "weight_decay": 0.0, "relative_rate": WORD_RATE},
        {"params": [p for p in others if p.ndim > 1], "weight_decay": 0.01, "relative_rate": 1.0},
        {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0, "relative_rate": 1.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)


def _step(
    model: GeneralStudent, optimizer: torch.optim.Optimizer, targets: TeacherTargets, batch: Indices, rate: float
) -> dict[str, Tensor]:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["relative_rate"]
    losses = step_losses(model, targets, batch)
    optimizer.zero_grad()
    losses["total"].backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return losses


def step_losses(model: GeneralStudent, targets: TeacherTargets, batch: Indices) -> dict[str, Tensor]:
    """Compare the student's states with the teacher's.

    Args:
        model: The student.
        targets: The labelled corpus.
        batch: int64 (B,), positions of the texts.

    Returns:
        The three losses and their weighted sum as "total"; the similarity's gradient is the largest by far at equal
        weights.
    """
    device = next(model.parameters()).device
    inputs = targets.encoded.padded(batch, device)
    mask = inputs["attention_mask"]
    hidden = targets.padded_hidden(batch, mask.shape[1]).to(device).float()
    with mixed_precision(device):
        sentence, tokens = model(inputs)
    pooled = mean_pool(hidden, mask)
    losses = {
        "sentence": sentence_loss(sentence, pooled),
        "similarity": similarity_loss(sentence, pooled),
        "token": token_loss(tokens, hidden, mask),
    }
    total = losses["sentence"] + SIMILARITY_WEIGHT * losses["similarity"] + losses["token"]
    return losses | {"total": total}


def _check_and_log(losses: dict[str, Tensor], step: int, progress: Progress) -> None:
    if not losses["total"].isfinite():
        values = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
        raise RunError(f"the loss of step {step} is not finite ({values}); lower --learning-rate")
    if step % LOG_EVERY == 0:
        progress.event("general stage", step=step, **{name: value.item() for name, value in losses.items()})


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


def _write_card(folder: Path, config: PretrainConfig, model: GeneralStudent, targets: TeacherTargets) -> None:
    """Write README.md: what the model is and how it was made."""
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


def pretrain(config: PretrainConfig, progress: Progress = SILENT) -> Path:
    """Distil a general student and write it; an interrupted run with the same settings continues exactly.

    Args:
        config: Settings of the run.
        progress: Shows the stages.

    Returns:
        The model's folder, ``config.output_dir``.

    Raises:
        RunError: If the run fails: a full disk, no network, a loss that is not finite.
        UsageError: If a text, a domain or the output folder cannot be used.
    """
    with output_folder(config.output_dir, "general student", config.overwrite) as folder:
        device, corpus = best_device(), read_corpus(config, progress)
        teacher = load_encoder(config.teacher, ("0", "1"), seed=0, progress=progress)
        targets = label_texts(teacher, corpus, config.max_length, device, progress)
        model, checkpoint = start_student(teacher, targets, config).to(device), checkpoint_folder(config, targets)
        train(model, targets, config, checkpoint, progress)
        save_student(model, teacher.tokenizer, folder)
        _write_card(folder, config, model, targets)
    shutil.rmtree(checkpoint, ignore_errors=True)
    return config.output_dir
