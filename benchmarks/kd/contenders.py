"""The contenders: each trains the same student on the same texts with the same number of updates."""

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from material import MAX_LENGTH, SEED, Material
from numpy.typing import NDArray
from timing import Seconds, timed
from torch import nn
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments

from l2a.data.encoding import EncodedTexts, encode
from l2a.kd.data import Batch, DistillationSet, read_tokens
from l2a.kd.losses import distillation_loss
from l2a.kd.trainer import KDTrainer
from l2a.student.student import Student
from l2a.teacher.labelling import TeacherOutputs
from l2a.teacher.model import Teacher
from l2a.util.training import CPU, has_fast_bfloat16, mixed_precision

NOWHERE = tempfile.gettempdir()
"""A folder that peers insist on; with saving off they write nothing into it."""

logging.getLogger("Distillation").setLevel(logging.ERROR)


class Contender(Protocol):
    """One way to distil.

    Attributes:
        student: As trained so far.
        updates: Updates in each timed piece.
    """

    student: Student
    updates: int

    def train(self) -> Seconds:
        """Train a piece, a whole training or the next epoch of one, and return how long it took."""


class L2A:
    """l2a's trainer on cached teacher outputs; every piece is a whole training."""

    def __init__(self, material: Material) -> None:
        """Keep what is needed."""
        self._material = material
        self._data = DistillationSet(material.encoded, material.outputs, material.texts.labels)
        self.updates = material.sizes.updates
        self.shapes: list[tuple[int, int]] = []

    def train(self) -> Seconds:
        """Train a fresh student."""
        self.shapes.clear()
        return timed(self.training())

    def training(self) -> Callable[[], None]:
        """Prepare a whole training of a fresh student, still to be started."""
        self.student, width = self._material.new_student(), self._material.teacher.hidden_size
        trainer = KDTrainer(self.student, self._material.kd, self._material.validation, width, MAX_LENGTH, SEED)
        trainer.read_batch = self._read

        def train() -> None:
            trainer.train([self._data], [1.0], self.updates)
            trainer.restore_best()

        return train

    def _read(
        self, student: Student, data: DistillationSet, indices: NDArray[np.int64]
    ) -> tuple[Batch, TeacherOutputs]:
        batch, taught = read_tokens(student, data, indices)
        self.shapes.append(tuple(batch["input_ids"].shape))
        return batch, taught


OF_TEACHER = "teacher_"
"""Stands before the names of what the teacher reads of a batch: its tokens are not the student's."""


class TeacherLogits(nn.Module):
    """The teacher as TextBrewer calls it: keywords in, logits out; labels are not read."""

    def __init__(self, teacher: Teacher) -> None:
        """Wrap a teacher."""
        super().__init__()
        self.teacher = teacher

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        """Classify a batch."""
        own = {name.removeprefix(OF_TEACHER): value for name, value in batch.items() if name.startswith(OF_TEACHER)}
        with mixed_precision(CPU):  # as our labelling runs it
            return self.teacher(own)[0].float()


class StudentOutputs(nn.Module):
    """The student as TextBrewer calls it, in the arithmetic in which l2a trains it."""

    def __init__(self, student: Student) -> None:
        """Wrap a student."""
        super().__init__()
        self.model = student.model

    def forward(self, **batch: torch.Tensor) -> Any:
        """Classify a batch, with the loss of its labels."""
        with mixed_precision(CPU, self.model.config.hidden_size):
            return self.model(**{name: value for name, value in batch.items() if not name.startswith(OF_TEACHER)})


class TextBrewer:
    """GeneralDistiller as TextBrewer's README shows it, the teacher in the loop; every piece is one more epoch.

    Its losses are those of l2a's labels: T^2 alpha cross-entropy with the teacher and 1 - alpha with the real label.
    No hidden states are matched. Saving, logging and progress bars are off.
    """

    def __init__(self, material: Material, padded: bool) -> None:
        """Build the distiller.

        Args:
            material: What all contenders share.
            padded: Pad every text to the maximum length, else to the longest of its batch.
        """
        self.updates = material.sizes.texts // material.sizes.batch_size
        self.student = material.new_student()
        self._optimizer, self._schedule = material.new_optimiser(self.student)
        self._loader = _loader(material, "max_length" if padded else True)
        self._distiller = _distiller(material, self.student)
        torch.manual_seed(SEED)

    def train(self) -> Seconds:
        """Train the student for one more epoch."""
        return timed(self._epoch)

    def _epoch(self) -> None:
        with self._distiller:
            self._distiller.train(
                self._optimizer, self._loader, num_epochs=1, scheduler=self._schedule, max_grad_norm=1.0
            )


def _distiller(material: Material, student: Student) -> Any:
    from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig

    class Distiller(GeneralDistiller):
        def save_and_callback(self, *args: Any) -> None:
            """Save nothing."""

        def initialize_training(self, *args: Any) -> tuple[Any, Any, bool]:
            return (*super().initialize_training(*args)[:2], True)  # True: no progress bars

    kd = material.kd
    weights = {"kd_loss_weight": kd.alpha * kd.temperature**2, "hard_label_weight": 1 - kd.alpha}
    return Distiller(
        train_config=TrainingConfig(device="cpu", output_dir=NOWHERE),
        distill_config=DistillationConfig(temperature=kd.temperature, **weights),
        model_T=TeacherLogits(material.teacher),
        model_S=StudentOutputs(student),
        adaptor_T=lambda batch, logits: {"logits": logits},
        adaptor_S=lambda batch, outputs: {"logits": outputs.logits.float(), "losses": outputs.loss},
    )


def _loader(material: Material, padding: str | bool) -> DataLoader[Any]:
    longest = MAX_LENGTH if padding == "max_length" else None
    of_student, of_teacher = (
        DataCollatorWithPadding(tokenizer, padding=padding, max_length=longest)
        for tokenizer in (material.new_student().tokenizer, material.teacher.tokenizer)
    )
    read_by_teacher = tokens(encode(material.teacher.tokenizer, material.texts.inputs, MAX_LENGTH))

    def collate(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
        # A plain dict: TextBrewer takes any other mapping for a sequence of positional arguments.
        own, taught = zip(*pairs, strict=True)
        padded = of_teacher(list(taught))
        return {**of_student(list(own)), **{f"{OF_TEACHER}{name}": value for name, value in padded.items()}}

    return DataLoader(
        list(zip(rows(material), read_by_teacher, strict=True)),
        batch_size=material.sizes.batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(SEED),
        collate_fn=collate,
    )


class CachedLogitsTrainer(Trainer):
    """The loop that is usually written: Trainer with the cached logits as a column of the data."""

    def compute_loss(self, model: Any, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Distil on cached logits."""
        labels, taught = inputs.pop("labels"), inputs.pop("teacher_logits")
        return distillation_loss(model(**inputs).logits, taught, labels, self.kd.temperature, self.kd.alpha).mean()


class HuggingFace:
    """Trainer of transformers with its default collator; every piece is a whole training."""

    def __init__(self, material: Material) -> None:
        """Keep what is needed."""
        self._material = material
        logits = material.outputs.logits
        self._rows = [row | {"teacher_logits": logits[i]} for i, row in enumerate(rows(material))]
        self.updates = material.sizes.updates

    def train(self) -> Seconds:
        """Train a fresh student."""
        self.student = self._material.new_student()
        trainer = CachedLogitsTrainer(
            model=self.student.model,
            args=_arguments(self._material),
            train_dataset=self._rows,
            processing_class=self.student.tokenizer,
            optimizers=self._material.new_optimiser(self.student),
        )
        trainer.kd = self._material.kd
        trainer.remove_callback(PrinterCallback)
        return timed(trainer.train)


def _arguments(material: Material) -> TrainingArguments:
    return TrainingArguments(
        output_dir=NOWHERE,
        per_device_train_batch_size=material.sizes.batch_size,
        num_train_epochs=material.sizes.repeats,
        max_grad_norm=1.0,
        seed=SEED,
        use_cpu=True,
        bf16=has_fast_bfloat16(CPU),  # l2a trains this student in bfloat16 where the processor is fast at it
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
    )


def rows(material: Material) -> list[dict[str, Any]]:
    """List the texts as peers read them, tokenised once for the student."""
    labelled = zip(tokens(material.encoded), material.texts.labels, strict=True)
    return [row | {"token_type_ids": [0] * len(row["input_ids"]), "labels": int(label)} for row, label in labelled]


def tokens(encoded: EncodedTexts) -> list[dict[str, Any]]:
    """List encoded texts as collators of transformers take them."""
    parts = np.split(encoded.ids, encoded.offsets[1:-1])
    return [{"input_ids": part.tolist(), "attention_mask": [1] * len(part)} for part in parts]
