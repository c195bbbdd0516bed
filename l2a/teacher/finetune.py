"""Fine-tunes a teacher, full sentences, few shots, no tricks that need a validation split; its frozen layers run once.

Training that leaves the lower layers as they are reads only what these give out, so that the source stage, the target
stages of all seeds and the labelling of the same texts pay for the upper layers alone.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from l2a.config import TeacherConfig
from l2a.data import Examples, Ints, TextInput, encoding
from l2a.teacher.model import Teacher
from l2a.util import SILENT, Progress, RunError, cache_root, cached_folder, fingerprint, training

# Raise it whenever ``fine_tune`` gives other weights than before: cached teachers are then trained again.
RECIPE = 4


def fine_tuned(
    base: Teacher, examples: Examples, config: TeacherConfig, epochs: float, max_length: int, seed: int, stage: str,
    progress: Progress = SILENT,
) -> Teacher:  # fmt: skip
    """Fine-tune a teacher by ``fine_tune``, or read the result of the same training from the cache.

    Args:
        base: Where training starts; changed in place, and returned in eval mode.
        examples: Labelled texts.
        config: Rates, batch size and frozen layers.
        epochs: Passes over the examples; more where these are fewer than 16 updates.
        max_length: Longest sequence in tokens.
        seed: Order of the examples and dropout.
        stage: Name shown to the user.
        progress: Shows the steps.

    Raises:
        RunError: If the loss is not finite or the disk is full.
    """
    settings = [config.frozen_layers, config.learning_rate, config.head_learning_rate, config.batch_size]
    how = [RECIPE, training.arithmetic(next(base.parameters()).device)]
    key = fingerprint(base.fingerprint(), examples.inputs, examples.labels, settings, epochs, max_length, seed, how)

    def build(folder: Path) -> None:
        before = {name: value.clone() for name, value in base.state_dict().items()}
        fine_tune(base, examples, config, epochs, max_length, seed, stage, progress, key)
        changed = {name: v.contiguous() for name, v in base.state_dict().items() if not torch.equal(v, before[name])}
        save_file(changed, folder / "trained.safetensors")

    folder = cached_folder("teachers", key, build)
    if progress.checkpoint is not None:
        progress.checkpoint.drop(key)
    base.load_state_dict(load_file(folder / "trained.safetensors"), strict=False)
    return base.eval()


def fine_tune(
    teacher: Teacher, examples: Examples, config: TeacherConfig, epochs: float, max_length: int, seed: int,
    stage: str, progress: Progress = SILENT, key: str = "",
) -> Teacher:  # fmt: skip
    """Train encoder and head in place with cross-entropy; the arguments are those of ``fine_tuned``, and its key.

    Bias-corrected AdamW, a linear schedule with warm-up and enough steps are what make few-shot fine-tuning stable
    (Mosbach et al., 2021; Zhang et al., 2021).

    Raises:
        RunError: If the loss is not finite; the batch is named.
    """
    frozen = frozen_layers(teacher, config.frozen_layers)
    if frozen is not None:
        # All that layers share is frozen too: the relative positions of MPNet and DeBERTa-v2 change what all give.
        teacher.encoder.requires_grad_(False)
        for module in list(encoder_layers(teacher.encoder))[frozen:] or [teacher.encoder]:
            module.requires_grad_(True)
        teacher.encoder.get_input_embeddings().requires_grad_(False)
    states = lower_states(teacher, frozen or 0, examples.inputs, max_length, progress)
    model = upper_layers(teacher, frozen or 0) if states else teacher
    read = states or encoding.encode(teacher.tokenizer, examples.inputs, max_length)
    total = max(16, round(epochs * len(range(0, len(examples), config.batch_size))))
    head = list(teacher.head.parameters()) if teacher.head is not None else []
    groups = [(list(teacher.encoder.parameters()), config.learning_rate), (head, config.head_learning_rate)]
    schedule, rng = training.linear_schedule(training.adamw(groups), total), np.random.default_rng(seed)
    batches = chain.from_iterable(encoding.training_batches(read.lengths, config.batch_size, rng) for _ in count())
    labels, device = torch.from_numpy(examples.labels), next(teacher.parameters()).device
    teacher.train()
    model.train()
    with training.seeded(seed), progress.stage(stage, total) as advance:  # dropout
        loop = training.Loop(progress.checkpoint, key, schedule, total)
        for indices in loop.left(batches, advance):
            with training.mixed_precision(device):
                logits = model(read.padded(indices, device))[0]
            loss = torch.nn.functional.cross_entropy(logits.float(), labels[indices].to(device))
            if not torch.isfinite(loss):
                texts = ", ".join(repr(examples.inputs[i][0][:80]) for i in indices[:3])
                where = f"at step {loop.done}, in the batch that begins with {texts}"
                raise RunError(f"{stage}: the loss is {loss.item()} {where}; lower teacher.learning_rate")
            loop.update(loss, teacher.parameters())
    return teacher.eval()


Halves = np.typing.NDArray[np.float16]
# Raise it whenever ``lower_states`` gives other numbers than before.
STATES_RECIPE = 1
# Batches between two looks at the checkpoint: seconds of a large teacher.
TOGETHER = 16
# Of logits and embeddings computed from kept states, which are rounded to float16, beside the whole model's.
TOLERANCE = 0.02


@dataclass(frozen=True)
class LowerStates:
    """What the frozen layers give out for N texts.

    Attributes:
        states: float16 (total, d), one row a token, mapped from the disk.
        starts: int64 (N,), the row of each text's first token.
        lengths: int64 (N,), tokens in each text.
    """

    states: Halves
    starts: Ints
    lengths: Ints

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.lengths)

    def padded(self, indices: Ints, device: torch.device = training.CPU) -> dict[str, torch.Tensor]:
        """Build the inputs of the upper layers for the texts at B positions, int64 (B,), padded to the nearest bucket.

        Returns:
            inputs_embeds, float32 (B, L, d), and attention_mask, int64 (B, L), on the device.
        """
        lengths = self.lengths[indices]
        columns = np.arange(encoding.bucket_of(int(lengths.max())))
        mask = columns < lengths[:, None]
        states = np.zeros((*mask.shape, self.states.shape[1]), np.float32)
        states[mask] = self.states[(self.starts[indices][:, None] + columns)[mask]]
        arrays = {"inputs_embeds": states, "attention_mask": mask.astype(np.int64)}
        return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


class _Given(torch.nn.Module):
    """Stands where the embeddings were and hands on the states of the frozen layers."""

    def forward(self, *arguments: Any, **named: Any) -> torch.Tensor:
        """Models name this argument alike, but some give it by its place."""
        given = (value for value in (*arguments, *named.values()) if isinstance(value, torch.Tensor))
        return next(value for value in given if value.ndim == 3)


def encoder_layers(encoder: torch.nn.Module) -> torch.nn.ModuleList:
    """Find the stack of an encoder's layers; an empty one where there is none."""
    named = (module for name, module in encoder.named_modules() if name.split(".")[-1] in ("layer", "layers"))
    return next((module for module in named if isinstance(module, torch.nn.ModuleList)), torch.nn.ModuleList())


def frozen_layers(teacher: Teacher, wanted: Literal["auto"] | int | None) -> int | None:
    """Decide how many of the lowest layers keep their weights.

    Args:
        teacher: The model.
        wanted: A number; "auto" for two thirds of 12 layers or more and a third of fewer; None to train everything.

    Returns:
        The number, which leaves at least one layer to train; None for everything, embeddings included.
    """
    depth = len(encoder_layers(teacher.encoder))
    if wanted == "auto":
        wanted = 2 * depth // 3 if depth >= 12 else depth // 3
    return None if wanted is None else max(0, min(wanted, depth - 1))


def _without(teacher: Teacher, layers: slice) -> Teacher:
    """View a teacher without some of its layers; the weights are the same, not copies."""
    shared = (teacher.tokenizer, *teacher.parameters(), *teacher.buffers())
    view = copy.deepcopy(teacher, {id(one): one for one in shared})
    del encoder_layers(view.encoder)[layers]
    return view


def upper_layers(teacher: Teacher, frozen: int) -> Teacher:
    """View an encoder with a head without its embeddings and ``frozen`` lowest layers, to read ``LowerStates``.

    The weights are the same, not copies.
    """
    upper = _without(teacher, slice(frozen))
    upper.encoder.embeddings = _Given()
    if hasattr(upper.encoder, "embeddings_project"):  # ELECTRA widens narrow embeddings
        upper.encoder.embeddings_project = torch.nn.Identity()
    return upper


def lower_states(
    teacher: Teacher, frozen: int, inputs: Sequence[TextInput], max_length: int, progress: Progress = SILENT,
    only_kept: bool = False,
) -> LowerStates | None:  # fmt: skip
    """Run the frozen layers over texts, or read what they gave from the cache.

    Args:
        teacher: Before or after its upper layers were trained: the frozen ones are the same.
        frozen: Number of lowest layers that keep their weights, as the embeddings do.
        inputs: N texts.
        max_length: Longest sequence in tokens.
        progress: Shows how many texts are done.
        only_kept: Run nothing; None where the cache has no states of these texts.

    Returns:
        The states; None where this model cannot be cut, or computes something else from them.

    Raises:
        RunError: If the disk is full; nothing half-written stays.
    """
    is_inside = 0 < frozen < len(encoder_layers(teacher.encoder))
    if not inputs or not is_inside or teacher.head is None or not hasattr(teacher.encoder, "embeddings"):
        return None
    places = {text: place for place, text in enumerate(dict.fromkeys(inputs))}
    how = [STATES_RECIPE, training.arithmetic(next(teacher.parameters()).device), max_length]
    key = fingerprint(frozen_fingerprint(teacher, frozen), how, list(places))
    if only_kept and not (cache_root() / "states" / key).exists():
        return None

    def build(folder: Path) -> None:
        encoded = encoding.encode(teacher.tokenizer, list(places), max_length)
        shape = int(encoded.offsets[-1]), teacher.hidden_size
        states = np.lib.format.open_memmap(folder / "states.npy", "w+", np.float16, shape)
        batches = list(encoding.inference_batches(encoded))
        with progress.stage("frozen layers of the teacher", len(places)) as advance:
            for number in range(0, len(batches), TOGETHER):
                some = batches[number : number + TOGETHER]
                run = partial(_run_frozen, teacher, frozen, encoded, some)
                rows, texts = training.remembered(progress.checkpoint, f"{key}-{number}", run), np.concatenate(some)
                states[np.concatenate([np.arange(*encoded.offsets[i : i + 2]) for i in texts])] = rows
                advance(len(texts))
        states.flush()
        np.save(folder / "offsets.npy", encoded.offsets)

    folder = cached_folder("states", key, build)
    if progress.checkpoint is not None:
        progress.checkpoint.drop(f"{key}-*")
    states = np.load(folder / "states.npy", mmap_mode="r", allow_pickle=False)
    offsets, order = np.load(folder / "offsets.npy", allow_pickle=False), [places[text] for text in inputs]
    kept = LowerStates(states, offsets[:-1][order], np.diff(offsets)[order])
    return kept if _agree(teacher, frozen, inputs[:8], max_length, kept) else None


def frozen_fingerprint(teacher: Teacher, frozen: int) -> str:
    """Hash what the frozen layers' states depend on: their weights, the embeddings, tokenizer and settings."""
    return _without(teacher, slice(frozen, None)).fingerprint(lambda weight: weight.startswith("encoder."))


def _run_frozen(teacher: Teacher, frozen: int, encoded: encoding.EncodedTexts, batches: Sequence[Ints]) -> Halves:
    """Give the states of some batches, a row a token, (total, d), one text behind another."""
    lower, device = _without(teacher, slice(frozen, None)).eval(), next(teacher.parameters()).device
    reached, rows = list[torch.Tensor](), list[Halves]()

    def keep(_: torch.nn.Module, __: Any, output: Any) -> None:
        reached.append(output[0] if isinstance(output, tuple) else output)

    encoder_layers(lower.encoder)[-1].register_forward_hook(keep)  # some encoders normalise what it gives
    with torch.inference_mode(), training.mixed_precision(device):
        for indices in batches:
            batch = encoded.padded(indices, device)
            lower(batch)
            rows.append(reached.pop()[batch["attention_mask"].bool()].to(torch.float16).cpu().numpy())
    return np.concatenate(rows)


def _agree(teacher: Teacher, frozen: int, inputs: Sequence[TextInput], max_length: int, states: LowerStates) -> bool:
    """Compare the upper layers over kept states with the whole model on a few texts."""
    device, indices = next(teacher.parameters()).device, np.arange(len(inputs))
    with training.evaluating(teacher), torch.inference_mode(), training.mixed_precision(device):
        whole = teacher(encoding.encode(teacher.tokenizer, inputs, max_length).padded(indices, device))[1].float()
        parts = upper_layers(teacher, frozen)(states.padded(indices, device))[1].float()
    return bool((whole - parts).norm() <= TOLERANCE * whole.norm())
