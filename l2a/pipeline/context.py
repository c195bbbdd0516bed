"""One run's parts, each made when it is first needed and shared by all rows."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from l2a.config import DistillConfig
from l2a.encoding import bucket_of
from l2a.errors import UsageError
from l2a.examples import Examples
from l2a.pipeline.data import RunData, load_run_data
from l2a.pipeline.teachers import fine_tuned, refuse_useless_teacher
from l2a.precision import best_device
from l2a.progress import SILENT, Progress
from l2a.students.build import build_student
from l2a.students.student import Student
from l2a.teacher.crossfit import cross_fitted_labeller
from l2a.teacher.labelling import cached_labeller
from l2a.teacher.load import load_encoder, load_fine_tuned
from l2a.teacher.model import Teacher
from l2a.teacher.outputs import Labeller


def refuse_long_sequences(readers: str, positions: int, max_length: int) -> None:
    """Stop before training when texts would be longer than a model can read.

    Args:
        readers: Which models, for the message.
        positions: Tokens that they read.
        max_length: Longest sequence in tokens.

    Raises:
        UsageError: If padded texts would not fit.
    """
    if bucket_of(max_length) > positions:
        raise UsageError(f"max_length: {max_length} came; {readers} read at most {positions} tokens; lower it")


def _refuse_long_for_teacher(teacher: Teacher, max_length: int) -> None:
    # A student made from the teacher reads as many positions, at most 512.
    positions = min(512, int(teacher.encoder.config.max_position_embeddings))
    refuse_long_sequences("teacher and student", positions, max_length)


@dataclass(frozen=True)
class RunContext:
    """The parts of one run.

    Attributes:
        config: What was asked for.
        progress: Shows how far the run is.
    """

    config: DistillConfig
    progress: Progress = field(default=SILENT)

    @cached_property
    def data(self) -> RunData:
        """Both domains and the few labels."""
        with self.progress.stage("read the domains"):
            return load_run_data(self.config, self.progress)

    def without_unlabelled(self) -> "RunContext":
        """Return the same run without its unlabelled text; teachers come from the cache."""
        if self.config.unlabelled is None:
            return self
        return RunContext(replace(self.config, unlabelled=None), self.progress)

    def pretrained(self) -> Teacher:
        """Load the teacher's encoder as it is before any fine-tuning."""
        config = self.config.teacher
        teacher = load_encoder(config.model, self.data.label_names, config.source_seed, self.progress)
        _refuse_long_for_teacher(teacher, self.config.max_length)
        return teacher.to(best_device())

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher that the student learns from: source first, then the target's training shots."""
        config = self.config.teacher
        if config.fine_tuned:
            teacher = load_fine_tuned(config.model, self.data.label_names, self.progress)
            _refuse_long_for_teacher(teacher, self.config.max_length)
            return teacher.to(best_device())
        return self._both_stages(self.data.source)

    def _both_stages(self, source: Examples) -> Teacher:
        config, few = self.config.teacher, self.data.splits.train
        first = self._fit(self.pretrained(), source, config.source_epochs, config.source_seed, "teacher: source")
        return self._fit(first, few, config.target_epochs, self.config.seed, "teacher: target")

    @cached_property
    def target_only_teacher(self) -> Teacher:
        """The yardstick: the same encoder on all target labels and nothing else."""
        epochs = self.config.teacher.target_only_epochs
        labels = self.data.target_labels
        return self._fit(self.pretrained(), labels, epochs, self.config.seed, "teacher: target only")

    @cached_property
    def labeller(self) -> Labeller:
        """The teacher's soft labels, cached by content."""
        labeller = cached_labeller(self.teacher, self.config.max_length, self.progress)
        refuse_useless_teacher(labeller, self.data.splits.reward, self.progress)
        folds = self.config.kd.folds
        if folds is None:
            return labeller
        if self.config.teacher.fine_tuned:
            raise UsageError(
                "kd.folds: with teacher.fine_tuned no teachers of folds can be trained; drop one of the two"
            )
        rng = np.random.default_rng([self.config.teacher.source_seed, 3])
        return cross_fitted_labeller(self.data.source, labeller, self._labeller_trained_on, folds, rng)

    def _labeller_trained_on(self, source: Examples) -> Labeller:
        return cached_labeller(self._both_stages(source), self.config.max_length, self.progress)

    def new_student(self) -> Student:
        """Build an untrained student; every call gives the same one."""
        config, data = self.config, self.data
        texts = (*data.source.inputs, *data.splits.train.inputs, *data.unlabelled)
        student = build_student(config.student, self.teacher, data.label_names, texts, config.seed)
        positions = getattr(student.model.config, "max_position_embeddings", None)  # some models have no limit
        if positions is not None:
            refuse_long_sequences("students of this student.model", positions, config.max_length)
        student.model.to(best_device())
        return student

    def _fit(self, base: Teacher, examples: Examples, epochs: float, seed: int, stage: str) -> Teacher:
        settings, length = self.config.teacher, self.config.max_length
        return fine_tuned(base, examples, settings, epochs, length, seed, stage, self.progress)
