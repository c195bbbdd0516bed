"""What all contenders share: texts, teacher, start of the student, optimiser and the held-out split."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from l2a.config import KDConfig, StudentConfig, TeacherConfig
from l2a.data.domains import load_domain
from l2a.data.encoding import EncodedTexts, encode
from l2a.data.examples import Examples
from l2a.kd.trainer import run_student
from l2a.student.student import Student, build_student
from l2a.teacher.finetune import fine_tuned
from l2a.teacher.labelling import TeacherOutputs, predict
from l2a.teacher.model import Teacher, load_encoder
from l2a.util.training import adamw, linear_schedule

DOMAIN = "movies"
TEACHER = "mpnet-base"
MAX_LENGTH = 128
SEED = 0


@dataclass(frozen=True)
class Sizes:
    """How much is done.

    Attributes:
        texts: Texts that the students learn from.
        teacher_texts: Other texts, that the teacher is fine-tuned on.
        choice: Other texts, that choose l2a's best state.
        repeats: Timings of each contender; also epochs of a whole training.
        batch_size: Texts in an update.
        memory_texts: The two sizes that memory is compared at.
        memory_steps: Updates in each of the two.
        matmul: Side of the square matrices whose product gives the machine's rate.
    """

    texts: int = 1024
    teacher_texts: int = 2048
    choice: int = 64
    repeats: int = 3
    batch_size: int = 32
    memory_texts: tuple[int, int] = (20_000, 200_000)
    memory_steps: int = 20
    matmul: int = 1024

    @property
    def updates(self) -> int:
        """Updates of a whole training, the same for every contender."""
        return self.repeats * (self.texts // self.batch_size)


SMOKE = Sizes(texts=64, teacher_texts=64, repeats=2, memory_texts=(200, 2000), memory_steps=2, matmul=256)


@dataclass(frozen=True)
class Material:
    """What all contenders share.

    Attributes:
        sizes: How much is done.
        teacher: Fine-tuned on texts of the same domain that no student sees.
        texts: What the students learn from.
        validation: Chooses l2a's best state; no other contender reads it.
        held_out: The domain's validation split, which no training reads.
    """

    sizes: Sizes
    teacher: Teacher
    texts: Examples
    validation: Examples
    held_out: Examples

    @cached_property
    def encoded(self) -> EncodedTexts:
        """The texts in the student's tokens."""
        return encode(self.new_student().tokenizer, self.texts.inputs, MAX_LENGTH)

    @cached_property
    def outputs(self) -> TeacherOutputs:
        """What the teacher says of the texts."""
        return predict(self.teacher, self.texts.inputs, MAX_LENGTH)

    @cached_property
    def kd(self) -> KDConfig:
        """The default configuration at this budget: one look at the validation split, at the end."""
        updates, batch_size = self.sizes.updates, self.sizes.batch_size
        steps = {"warmup_steps": updates - 1, "rounds": 1, "round_steps": 1, "evaluate_every": updates}
        return KDConfig(batch_size=batch_size, learning_rate=1e-4, **steps)  # the rate of wide pretrained students

    def new_student(self) -> Student:
        """Build the default student, of 14.5 M parameters; every call gives the same weights."""
        return build_student(StudentConfig(), self.teacher, self.texts.label_names, self.texts.inputs, SEED)

    def new_optimiser(self, student: Student) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
        """Give a peer the optimiser and the schedule that l2a uses."""
        optimizer = adamw([(list(student.model.parameters()), self.kd.peak_rate)])
        return optimizer, linear_schedule(optimizer, self.sizes.updates)

    def accuracy(self, student: Student) -> float:
        """Share of the held-out split that a student gets right."""
        logits, _ = run_student(student, encode(student.tokenizer, self.held_out.inputs, MAX_LENGTH))
        return share_right(logits, self.held_out.labels)

    def teacher_accuracy(self) -> float:
        """Share of the held-out split that the teacher gets right."""
        return share_right(predict(self.teacher, self.held_out.inputs, MAX_LENGTH).logits, self.held_out.labels)


def share_right(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Accuracy of the largest logits."""
    return float(np.mean(logits.argmax(axis=1) == labels))


def prepare(sizes: Sizes) -> Material:
    """Draw the texts and fine-tune the teacher (once: it is kept in l2a's cache)."""
    domain = load_domain(DOMAIN)
    order = np.random.default_rng(SEED).permutation(len(domain.train))
    bounds = np.cumsum([sizes.teacher_texts, sizes.texts, sizes.choice])
    of_teacher, texts, choice, _ = (domain.train.take(part) for part in np.split(order, bounds))
    base = load_encoder(TEACHER, domain.label_names, SEED)
    teacher = fine_tuned(base, of_teacher, TeacherConfig(), 1.0, MAX_LENGTH, SEED, "teacher")
    return Material(sizes, teacher, texts, choice, domain.dev)
