"""The order of training: batches of a token budget, a pure function of seed and step, so that a resume is exact."""

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn

import l2a
from l2a.data.encoding import bucket_of
from l2a.pretrain.corpus import Corpus, PretrainConfig, read_corpus
from l2a.pretrain.student import (
    GeneralStudent,
    TeacherTargets,
    average_word_states,
    build_student,
    fit_projections,
    isolated_word_states,
    label_texts,
    save_student,
    write_card,
)
from l2a.student.initialisation import principal_word_vectors
from l2a.teacher.load import load_encoder
from l2a.teacher.model import Teacher, mean_pool
from l2a.util.cache import fingerprint
from l2a.util.errors import RunError, UsageError
from l2a.util.files import atomic_folder, atomic_write_text, restore_folder
from l2a.util.progress import SILENT, Progress
from l2a.util.training import best_device, mixed_precision

WINDOW = 64
"""Batches' worth of tokens that are sorted by length together."""


def epoch_batches(
    lengths: NDArray[np.int64], tokens_per_batch: int, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Shuffle one epoch into batches of texts of similar length.

    Args:
        lengths: int64 (N,), tokens in each text.
        tokens_per_batch: Padded tokens in a batch, at most (a single longer text is a batch of its own).
        rng: Source of the order.

    Returns:
        int64 positions of each batch; every text occurs once.
    """
    order = rng.permutation(len(lengths))
    windows = max(1, int(lengths.sum()) // (WINDOW * tokens_per_batch))
    batches: list[NDArray[np.int64]] = []
    for chunk in np.array_split(order, windows):
        batches.extend(_split_sorted(chunk[np.argsort(lengths[chunk], kind="stable")], lengths, tokens_per_batch))
    return [batches[position] for position in rng.permutation(len(batches))]


def _split_sorted(
    chunk: NDArray[np.int64], lengths: NDArray[np.int64], tokens_per_batch: int
) -> Iterator[NDArray[np.int64]]:
    start = 0
    while start < len(chunk):
        end = start + 1
        while end < len(chunk) and bucket_of(int(lengths[chunk[end]])) * (end - start + 1) <= tokens_per_batch:
            end += 1
        yield chunk[start:end]
        start = end


def batch_stream(
    lengths: NDArray[np.int64], tokens_per_batch: int, seed: int, first_step: int, last_step: int
) -> Iterator[NDArray[np.int64]]:
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


FOLDER = "checkpoint"
STATES = "states.safetensors"
STEP = "step.json"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def save_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, settings: str) -> None:
    """Write a checkpoint that takes the place of the last one in one move.

    Args:
        folder: The checkpoint's folder.
        model: Its parameters and their AdamW moments are saved.
        optimizer: AdamW over the model's parameters.
        step: Steps done.
        settings: Fingerprint of everything that decides the run.

    Raises:
        RunError: If the disk is full.
    """
    tensors = {f"model.{name}": value.detach().contiguous() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        tensors |= {f"{moment}.{name}": state[moment] for moment in MOMENTS if moment in state}
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / STATES)
        atomic_write_text(temporary / STEP, json.dumps({"step": step, "settings": settings}))


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, settings: str) -> int:
    """Continue where a checkpoint left off.

    Args:
        folder: The checkpoint's folder.
        model: Filled in place.
        optimizer: Filled in place.
        settings: Fingerprint of this run, which must equal the checkpoint's.

    Returns:
        Steps done; 0 if there is no checkpoint.

    Raises:
        UsageError: If the checkpoint belongs to a run with other settings.
    """
    restore_folder(folder)
    if not folder.is_dir():
        return 0
    saved = json.loads((folder / STEP).read_text("utf-8"))
    if saved["settings"] != settings:
        raise UsageError(
            f"output_dir: the checkpoint in {folder} belongs to a run with other text, seed or settings; "
            "repeat that run's options to resume it, or give another --output-dir"
        )
    tensors = load_file(folder / STATES)
    model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
    for name, parameter in model.named_parameters():
        state = {moment: tensors[f"{moment}.{name}"] for moment in MOMENTS if f"{moment}.{name}" in tensors}
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
    return int(saved["step"])


def sentence_loss(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean of 1 - cos between projected sentence representations and the teacher's embeddings.

    The cosine term of DistilBERT (Sanh et al., 2019), here on pooled states.

    Args:
        predicted: float (B, d), the student's representation after its projection.
        target: float (B, d), the teacher's mean-pooled last hidden states.

    Returns:
        A scalar in [0, 2].
    """
    return (1.0 - F.cosine_similarity(predicted, target, dim=-1)).mean()


def token_loss(predicted: torch.Tensor, target: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
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


def similarity_loss(predicted: torch.Tensor, target: torch.Tensor, temperature: float = 0.05) -> torch.Tensor:
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
    student, teacher = (_log_neighbours(states, temperature) for states in (predicted, target))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _log_neighbours(states: torch.Tensor, temperature: float) -> torch.Tensor:
    normalised = F.normalize(states.float(), dim=-1)
    count = len(states)
    others = ~torch.eye(count, dtype=torch.bool, device=states.device)
    cosines = (normalised @ normalised.T)[others].view(count, count - 1)
    return torch.log_softmax(cosines / temperature, dim=-1)


WARM_UP = 0.05
LOG_EVERY = 50
SIMILARITY_WEIGHT = 0.05
WORD_RATE = 3.0
"""Rate of the word vectors relative to the rest: most words are seen in few steps."""


@dataclass(frozen=True)
class StepLosses:
    """The three losses of a step.

    Attributes:
        sentence: Scalar.
        similarity: Scalar.
        token: Scalar.
    """

    sentence: torch.Tensor
    similarity: torch.Tensor
    token: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        """Their weighted sum; the similarity's gradient is the largest by far at equal weights."""
        return self.sentence + SIMILARITY_WEIGHT * self.similarity + self.token


def train(
    model: GeneralStudent,
    targets: TeacherTargets,
    config: PretrainConfig,
    checkpoint: Path,
    progress: Progress = SILENT,
) -> None:
    """Train in place, from the checkpoint if there is one.

    Args:
        model: On the device to train on.
        targets: The labelled corpus.
        config: Steps, rate, batch and seed.
        checkpoint: Folder of the checkpoint.
        progress: Shows the steps and records the losses.

    Raises:
        RunError: If a loss is not finite.
        UsageError: If the checkpoint belongs to another run.
    """
    optimizer, settings = _optimizer(model, config), _settings(config, targets)
    first = load_checkpoint(checkpoint, model, optimizer, settings)
    stream = batch_stream(targets.encoded.lengths, config.tokens_per_batch, config.seed, first, config.steps)
    with progress.stage("general stage", config.steps) as advance:
        advance(first)
        for step, batch in enumerate(stream, start=first):
            inputs = targets.encoded.padded(batch)
            hidden = targets.padded_hidden(batch, inputs["input_ids"].shape[1])
            losses = _step(model, optimizer, inputs, hidden, learning_rate(step, config))
            _check_and_log(losses, step, progress)
            advance(1)
            if (step + 1) % config.checkpoint_every == 0:
                save_checkpoint(checkpoint, model, optimizer, step + 1, settings)


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


def _settings(config: PretrainConfig, targets: TeacherTargets) -> str:
    choices = dataclasses.asdict(config)
    # Neither changes the student, so a resumed run may change them.
    del choices["output_dir"], choices["checkpoint_every"]
    encoded = targets.encoded
    return fingerprint(choices, encoded.ids, encoded.types, encoded.offsets, targets.states(0))


def _optimizer(model: GeneralStudent, config: PretrainConfig) -> torch.optim.AdamW:
    words = model.classifier.get_input_embeddings().weight  # type: ignore[operator]
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1 and parameter is not words]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [
        {"params": [words], "weight_decay": 0.0, "relative_rate": WORD_RATE},
        {"params": matrices, "weight_decay": 0.01, "relative_rate": 1.0},
        {"params": vectors, "weight_decay": 0.0, "relative_rate": 1.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)


def _step(
    model: GeneralStudent,
    optimizer: torch.optim.Optimizer,
    inputs: dict[str, torch.Tensor],
    hidden: torch.Tensor,
    rate: float,
) -> StepLosses:
    device = next(model.parameters()).device
    inputs = {name: value.to(device, non_blocking=True) for name, value in inputs.items()}
    for group in optimizer.param_groups:
        group["lr"] = rate * group["relative_rate"]
    losses = step_losses(model, inputs, hidden.to(device, non_blocking=True))
    optimizer.zero_grad()
    losses.total.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return losses


def step_losses(model: GeneralStudent, inputs: dict[str, torch.Tensor], hidden: torch.Tensor) -> StepLosses:
    """Compare the student's states with the teacher's.

    Args:
        model: The student.
        inputs: input_ids, attention_mask and token_type_ids, int64 (B, L).
        hidden: float (B, L, d), the teacher's last hidden states.

    Returns:
        The three losses.
    """
    mask = inputs["attention_mask"]
    with mixed_precision(mask.device):
        states = model(inputs)
    sentence, tokens, pooled = states.sentence.float(), states.tokens.float(), mean_pool(hidden.float(), mask)
    return StepLosses(
        sentence_loss(sentence, pooled), similarity_loss(sentence, pooled), token_loss(tokens, hidden.float(), mask)
    )


def _check_and_log(losses: StepLosses, step: int, progress: Progress) -> None:
    finite = bool(losses.total.isfinite())
    if finite and step % LOG_EVERY:
        return
    values = {name: getattr(losses, name).item() for name in ("sentence", "similarity", "token")}
    if not finite:
        raise RunError(f"general stage: the loss of step {step} is not finite {values}; lower --learning-rate")
    progress.event("general stage", step=step, **values)


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
    _check_output(config.output_dir)
    device = best_device()
    corpus = read_corpus(config, progress)
    teacher = load_encoder(config.teacher, ("0", "1"), seed=0, progress=progress)
    targets = label_texts(teacher, corpus, config, device, progress)
    model = start_student(teacher, targets, config).to(device)
    train(model, targets, config, config.output_dir / FOLDER, progress)
    with atomic_folder(config.output_dir) as folder:
        save_student(model, teacher.tokenizer, folder)
        write_card(folder, config, _facts(teacher, model, targets, corpus))
    return config.output_dir


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
    states = average_word_states(targets, isolated_word_states(teacher.encoder, teacher.tokenizer))
    vectors = principal_word_vectors(states, config.student.embedding_size)
    student = build_student(vectors, int(teacher.tokenizer.pad_token_id), config.student, config.seed)
    model = GeneralStudent(student, teacher.hidden_size, config.seed)
    fit_projections(model, targets, config.seed)
    return model


def _check_output(folder: Path) -> None:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    # What a killed run has left of a checkpoint begins with a dot.
    present = sorted(name for name in names if name != FOLDER and not name.startswith(f".{FOLDER}."))
    if present:
        raise UsageError(
            f"output_dir: {folder} already holds {', '.join(present[:3])}; give a new folder, or remove this one"
        )


def _facts(teacher: Teacher, model: GeneralStudent, targets: TeacherTargets, corpus: Corpus) -> dict[str, Any]:
    body = sum(parameter.numel() for parameter in model.classifier.parameters())
    return {
        "parameters (with a head of 2 classes)": body,
        "share of the teacher": f"{body / teacher.parameters_count:.1%}",
        "texts": len(corpus.texts),
        "variants": len(corpus.variants),
        "tokens": int(targets.encoded.offsets[-1]),
        **{f"sha256 of {name}": digest for name, digest in corpus.files.items()},
        "versions": f"l2a {l2a.__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
    }
