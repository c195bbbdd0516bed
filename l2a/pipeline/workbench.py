"""A student in training, with the labelled texts that it learns from and what its batches are made of."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from l2a.encoding import encode
from l2a.examples import Examples, TextInput
from l2a.kd.data import DistillationSet, Renewal, join, refuse_constant_targets
from l2a.kd.head import fit_output_layer
from l2a.kd.lelp import fit_subclasses, teacher_output_weight
from l2a.kd.trainer import KDTrainer
from l2a.pipeline.context import RunContext
from l2a.students.student import Student


@dataclass(frozen=True)
class Workbench:
    """A student in training with the labelled texts of both domains.

    Attributes:
        context: The run.
        student: Trained in place.
        trainer: Its optimiser, schedule and best state.
    """

    context: RunContext
    student: Student
    trainer: KDTrainer

    def labelled(self, inputs: tuple[TextInput, ...], labels: NDArray[np.int64] | None = None) -> DistillationSet:
        """Label texts with the teacher and tokenise them for the student.

        Args:
            inputs: N texts.
            labels: int64 (N,), their real labels, or None.

        Returns:
            The set to distil on.
        """
        real = np.full(len(inputs), -1, np.int64) if labels is None else labels
        length = self.context.config.max_length
        return DistillationSet(encode(self.student.tokenizer, inputs, length), self.context.labeller(inputs), real)

    def examples(self, examples: Examples) -> DistillationSet:
        """Label examples with the teacher and keep their real labels beside.

        Args:
            examples: Labelled texts.

        Returns:
            The set to distil on.
        """
        return self.labelled(examples.inputs, examples.labels)

    @cached_property
    def target(self) -> DistillationSet:
        """The target's training shots."""
        return self.examples(self.context.data.splits.train)

    @cached_property
    def source(self) -> DistillationSet:
        """The source domain."""
        return self.examples(self.context.data.source)

    @cached_property
    def unlabelled(self) -> DistillationSet | None:
        """The text without labels, where the run was given some."""
        inputs = self.context.data.unlabelled
        return self.labelled(inputs) if inputs else None

    @property
    def known(self) -> DistillationSet:
        """Everything that the student learns from before any candidate is drawn; joined anew, not kept twice."""
        return join([part for part in (self.source, self.target, self.unlabelled) if part is not None])

    def distil(self, kept: DistillationSet | None, steps: int, stage: str, renewal: Renewal | None = None) -> None:
        """Train the student on a mixture of everything at hand.

        Args:
            kept: Candidates, or None.
            steps: Updates.
            stage: Name shown to the user.
            renewal: Which of the candidates are used, chosen anew every so many updates; None for all of them.
        """
        sets, shares = mixture(self, kept)
        self.trainer.train(sets, shares, steps, self.context.progress, stage, renewal)

    @cached_property
    def reward(self) -> DistillationSet:
        """The reward split; it is never trained on."""
        return self.examples(self.context.data.splits.reward)


def mixture(bench: Workbench, kept: DistillationSet | None) -> tuple[list[DistillationSet], list[float]]:
    """Choose what each batch is made of: the configured shares, and source text for the rest.

    Args:
        bench: Holds the sets.
        kept: Candidates, or None.

    Returns:
        The sets and their shares.
    """
    kd, optional = bench.context.config.kd, bench.unlabelled
    parts = [(bench.target, kd.target_share)]
    parts += [(optional, kd.unlabelled_share)] if optional is not None else []
    parts += [(kept, kd.augmented_share)] if kept is not None else []
    parts.append((bench.source, 1 - sum(share for _, share in parts)))
    return [part for part, _ in parts], [share for _, share in parts]


def open_workbench(context: RunContext) -> Workbench:
    """Build the student and everything that its training needs.

    Args:
        context: The run.

    Returns:
        The workbench, its student not yet trained but for the output layer.

    Raises:
        RunError: If the teacher's outputs are constant.
    """
    student, config = context.new_student(), context.config
    choice, width = context.data.splits.choice, context.teacher.hidden_size
    trainer = KDTrainer(student, config.kd, choice, width, config.max_length, config.seed)
    if config.kd.attention_weight:
        trainer.learn_attention(context.teacher)
    bench = Workbench(context, student, trainer)
    known = bench.known
    refuse_constant_targets(known)
    fit_output_layer(student, known)
    if config.kd.objective != "soft_labels":
        weight = teacher_output_weight(context.teacher, known.teacher)
        rng = np.random.default_rng([config.seed, 4])
        trainer.learn_subclasses(fit_subclasses(known.teacher, weight, config.kd.objective, config.kd.subclasses, rng))
    return bench
