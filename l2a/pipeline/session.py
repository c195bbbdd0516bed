"""The data of one run: both domains with their labels matched, and the target cut down to a few labels."""

from collections.abc import Iterator, Set
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from l2a.config import DistillConfig
from l2a.data.domains import load_domain, read_unlabelled
from l2a.data.encoding import bucket_of, encode
from l2a.data.examples import Domain, Examples, TextInput, concatenate, normalised_hash
from l2a.data.splits import TargetSplits, align_labels, few_shot_splits
from l2a.kd.data import DistillationSet, Renewal, join, refuse_constant_targets
from l2a.kd.inference import fit_output_layer
from l2a.kd.lelp import fit_subclasses, teacher_output_weight
from l2a.kd.trainer import KDTrainer
from l2a.student.presets import build_student
from l2a.student.student import Student
from l2a.teacher.finetune import fine_tuned, refuse_useless_teacher
from l2a.teacher.labelling import cached_labeller
from l2a.teacher.load import load_encoder, load_fine_tuned
from l2a.teacher.model import Teacher
from l2a.teacher.store import Labeller
from l2a.util.errors import UsageError
from l2a.util.progress import SILENT, Progress
from l2a.util.training import best_device


@dataclass(frozen=True)
class RunData:
    """What a run may read.

    Attributes:
        source: Labelled source examples, free of every held-out target text.
        target: The target domain; its test split is opened by the final evaluation alone.
        splits: The few labelled target examples.
        unlabelled: Texts without labels, free of every held-out target text; empty unless the run was given some.
        forbidden: Normalised hashes of the target's test, reward and validation texts: none may be trained on.
        files: Names of the files read, with their sha256.
    """

    source: Examples
    target: Domain
    splits: TargetSplits
    unlabelled: tuple[TextInput, ...]
    forbidden: frozenset[str]
    files: dict[str, str]

    @property
    def label_names(self) -> tuple[str, ...]:
        """The C class names."""
        return self.target.label_names

    @property
    def target_labels(self) -> Examples:
        """All labelled target examples, for methods that need no splits."""
        return concatenate(self.splits.train, self.splits.reward, self.splits.validation)


def load_run_data(config: DistillConfig, progress: Progress = SILENT) -> RunData:
    """Read both domains and draw the few labels.

    Args:
        config: Names the domains, the shots and the seed.
        progress: Shows downloads.

    Returns:
        The data.

    Raises:
        UsageError: If a domain cannot be read or the two do not fit together.
        RunError: If a domain cannot be fetched.
    """
    source = load_domain(config.source, config.source_columns, config.data_folder, progress)
    target = load_domain(config.target, config.target_columns, config.data_folder, progress)
    source, target = align_labels(source, target)
    splits = few_shot_splits(target, config.shots, config.dev_shots, np.random.default_rng([config.seed, 1]))
    held_out = (*splits.reward.inputs, *splits.validation.inputs)
    forbidden = target.test.hashes | {normalised_hash(text) for text in held_out}
    _refuse_same_texts(source, target)
    allowed = [i for i, text in enumerate(source.train.inputs) if normalised_hash(text) not in forbidden]
    unlabelled, unlabelled_files = _unlabelled(config, target, forbidden, progress)
    return RunData(
        source=source.train.take(_few_enough(allowed, config)),
        target=target,
        splits=splits,
        unlabelled=unlabelled,
        forbidden=frozenset(forbidden),
        files={f"{side}: {name}": digest for side, name, digest in _files(source, target)} | unlabelled_files,
    )


def _few_enough(allowed: list[int], config: DistillConfig) -> list[int]:
    """Draw as many source examples as are wanted, in their order."""
    if config.source_size is None or config.source_size >= len(allowed):
        return allowed
    chosen = np.random.default_rng([config.seed, 6]).choice(len(allowed), config.source_size, replace=False)
    return [allowed[i] for i in np.sort(chosen)]


def _unlabelled(
    config: DistillConfig, target: Domain, forbidden: Set[str], progress: Progress
) -> tuple[tuple[TextInput, ...], dict[str, str]]:
    """Read the unlabelled text, drop what is held out or double, and draw as much as is wanted."""
    if config.unlabelled is None:
        return (), {}
    inputs, files = read_unlabelled(config.unlabelled, config.data_folder, progress)
    sides = 2 if target.is_pair else 1
    distinct = {normalised_hash(text): text for text in inputs if len(text) == sides}
    usable = [text for digest, text in distinct.items() if digest not in forbidden]
    if not usable:
        kind = "pairs (two texts separated by a tab)" if target.is_pair else "single texts"
        raise UsageError(f"unlabelled {config.unlabelled!r}: no usable text; the target needs {kind}")
    order = np.random.default_rng([config.seed, 5]).permutation(len(usable))[: config.kd.unlabelled_size]
    return tuple(usable[i] for i in np.sort(order)), {f"unlabelled: {name}": digest for name, digest in files.items()}


def _refuse_same_texts(source: Domain, target: Domain) -> None:
    known = {normalised_hash(text) for text in source.train.inputs}
    shared = sum(normalised_hash(text) in known for text in target.train.inputs)
    if shared > len(target.train) / 2:
        raise UsageError(
            f"source {source.name!r}: it holds {shared} of the {len(target.train)} training texts of the target with "
            "their labels, so the labels would not be few; give another source"
        )


def _files(source: Domain, target: Domain) -> Iterator[tuple[str, str, str]]:
    for side, domain in (("source", source), ("target", target)):
        for name, digest in domain.files.items():
            yield side, name, digest


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
        source, few = self.data.source, self.data.splits.train
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
        return labeller

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


@dataclass(frozen=True)
class TrainingSession:
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


def mixture(session: TrainingSession, kept: DistillationSet | None) -> tuple[list[DistillationSet], list[float]]:
    """Choose what each batch is made of: the configured shares, and source text for the rest.

    Args:
        session: Holds the sets.
        kept: Candidates, or None.

    Returns:
        The sets and their shares.
    """
    kd, optional = session.context.config.kd, session.unlabelled
    parts = [(session.target, kd.target_share)]
    parts += [(optional, kd.unlabelled_share)] if optional is not None else []
    parts += [(kept, kd.augmented_share)] if kept is not None else []
    parts.append((session.source, 1 - sum(share for _, share in parts)))
    return [part for part, _ in parts], [share for _, share in parts]


def open_session(context: RunContext) -> TrainingSession:
    """Build the student and everything that its training needs.

    Args:
        context: The run.

    Returns:
        The session, its student not yet trained but for the output layer.

    Raises:
        RunError: If the teacher's outputs are constant.
    """
    student, config = context.new_student(), context.config
    validation, width = context.data.splits.validation, context.teacher.hidden_size
    trainer = KDTrainer(student, config.kd, validation, width, config.max_length, config.seed)
    if config.kd.attention_weight:
        trainer.learn_attention(context.teacher)
    session = TrainingSession(context, student, trainer)
    known = session.known
    refuse_constant_targets(known)
    fit_output_layer(student, known)
    if config.kd.objective != "soft_labels":
        weight = teacher_output_weight(context.teacher, known.teacher)
        rng = np.random.default_rng([config.seed, 4])
        trainer.learn_subclasses(fit_subclasses(known.teacher, weight, config.kd.objective, config.kd.subclasses, rng))
    return session
