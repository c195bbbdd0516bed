"""The parts of one run: its data, its teachers and a student in training."""

import itertools
from collections.abc import Callable, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedKFold

from l2a.config import DistillConfig
from l2a.data import Bank, Doubles, Examples, Ints, TextInput, encoding, normalised_hash
from l2a.generator.chain import BACKGROUND, Embed, choose_texts, fit_word_average
from l2a.generator.operators import check_operators
from l2a.kd.data import DistillationSet, join, refuse_constant_targets
from l2a.kd.losses import fit_subclasses, teacher_output_weight
from l2a.kd.trainer import CLEARLY, KDTrainer, calibrated_log_likelihoods, fit_output_layer, standard_error
from l2a.pipeline.data import RunData, load_run_data
from l2a.student.student import Student, build_student, check_student, wants_small_rate
from l2a.teacher.finetune import RECIPE, fine_tune, fine_tuned, frozen_layers
from l2a.teacher.labelling import Labeller, cached_labeller, predict, refuse_useless_teacher
from l2a.teacher.model import Teacher, check_teacher, load_encoder, load_fine_tuned
from l2a.util import SILENT, Progress, cached_folder, fingerprint, training

# Texts that a teacher reads in a stage on the target, repeated ones counted, unless one pass takes more.
MOST_TARGET_TEXTS = 32_000


# Held-out labels below which the choice between teachers would be one by chance: it is cross-fitted then, so often.
FEWEST_TO_CHOOSE, MOST_FOLDS = 16, 4


def apart_from(hashes: Set[str], texts: Sequence[TextInput]) -> Ints:
    """Find the texts, by their positions, int64 (K,), whose normalised hashes are not among some."""
    return np.flatnonzero([normalised_hash(text) not in hashes for text in texts])


def _passes(epochs: float, examples: Examples) -> float:
    """Keep the many passes that a few labels need from costing hours where there are thousands."""
    return min(epochs, max(1.0, MOST_TARGET_TEXTS / len(examples)))


@dataclass(frozen=True)
class RunContext:
    """The parts of one run.

    Attributes:
        config: The settings.
        progress: Shows how far the run is.
        loaded: Its data where they are already read; else they are read when they are needed.
        client: Of a Dask cluster, which labels texts with the teacher; None for this process.
    """

    config: DistillConfig
    progress: Progress = field(default=SILENT)
    loaded: RunData | None = None
    client: Any = None

    def __post_init__(self) -> None:
        training.keep_freed_memory()
        check_operators(self.config.generator)

    @cached_property
    def data(self) -> RunData:
        """Both domains and the few labels."""
        return self.loaded or load_run_data(self.config, self.progress)

    @cached_property
    def without_unlabelled(self) -> "RunContext":
        """The same run without its unlabelled text, for all methods that read none; teachers come from the cache."""
        return replace(self, config=replace(self.config, unlabelled=()), loaded=replace(self.data, unlabelled=()))

    def check_models(self) -> None:
        """Refuse models that cannot be used, before anything is trained.

        Raises:
            UsageError: If teacher or student is broken, does not fit the other or reads shorter texts.
            RunError: If a model cannot be fetched.
        """
        config, names = self.config, self.data.label_names
        teacher = check_teacher(config.teacher, names, config.max_length, self.progress)
        texts = (*self.data.source.inputs, *self.data.splits.train.inputs)
        check_student(config.student, teacher, names, texts, config.max_length)

    @cached_property
    def embed(self) -> Embed:
        """Cheap embeddings of texts, out of the word embeddings of the teacher's encoder."""
        unlabelled = self.data.unlabelled
        few = [unlabelled[i] for i in range(0, len(unlabelled), 1 + len(unlabelled) // BACKGROUND)]
        texts = (*self.data.source.inputs, *self.data.splits.train.inputs, *few)
        return fit_word_average(self.teacher.tokenizer, self.teacher.word_embeddings(), texts, self.config.max_length)

    @cached_property
    def near_texts(self) -> dict[TextInput, str]:
        """The unlabelled texts that are used, by their nearness to the target: those set apart too, its shots not.

        Beside each stands where it comes from, such as "reviews.txt:17".
        """
        config, rng = self.config.generator, np.random.default_rng([self.config.seed, 5])
        target, many = self.data.splits.train.inputs, self.data.unlabelled
        size, choice = config.unlabelled_size, config.unlabelled_choice
        chosen = choose_texts(many, target, size, choice, self.embed, rng, self.progress).tolist()
        shots = set(map(normalised_hash, target))
        origin_of = many.origin_of if isinstance(many, Bank) else "unlabelled:{}".format
        return {text: origin_of(i) for i in chosen if normalised_hash(text := many[i]) not in shots}

    @cached_property
    def set_apart(self) -> tuple[tuple[TextInput, ...], ...]:
        """Texts near the target that no student is trained on: those that choose its state, those that give the reward.

        They are unlabelled texts where there are enough, else a fifth of the source at most, out of its nearest half.
        """
        target, wanted = self.data.splits.train.inputs, 2 * self.config.kd.divergence_size
        rng, near = np.random.default_rng([self.config.seed, 7]), tuple(self.near_texts)
        if len(near) < 4 * wanted:
            shots = set(map(normalised_hash, target))  # which are trained on, also where the source holds one
            source = [text for text in self.data.source.inputs if normalised_hash(text) not in shots]
            nearest = choose_texts(source, target, len(source) // 2, "near", self.embed, rng)
            near, wanted = tuple(source[i] for i in nearest), min(wanted, len(source) // 5)
        drawn = rng.choice(len(near), wanted, replace=False)
        return tuple(tuple(near[i] for i in np.sort(part)) for part in np.array_split(drawn, 2))

    @cached_property
    def source(self) -> Examples:
        """The source that students learn from: without what is set apart."""
        return self.data.source.take(apart_from(self.never_trained_on, self.data.source.inputs))

    @cached_property
    def never_trained_on(self) -> frozenset[str]:
        """Normalised hashes of all texts that are set apart."""
        return frozenset(map(normalised_hash, itertools.chain(*self.set_apart)))

    def pretrained(self) -> Teacher:
        """Load the teacher's encoder as it is before any fine-tuning."""
        config = self.config.teacher
        return self._placed(load_encoder(config.model, self.data.label_names, config.source_seed, self.progress))

    def _placed(self, teacher: Teacher) -> Teacher:
        """Put a teacher where it computes, unless it reads less of a text than the run."""
        encoding.refuse_long_sequences("the teacher", teacher.positions, self.config.max_length)
        return teacher.to(training.best_device())

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher that the student learns from: source first, then the target's training shots, or these alone."""
        config = self.config.teacher
        if config.fine_tuned:
            return self._placed(load_fine_tuned(config.model, self.data.label_names, self.progress))
        ways, few = {"both": self._after_source, "target": self._without_source}, self.data.splits.train
        if config.learns_from != "auto":
            return ways[config.learns_from](few)
        held_out, classes = self.data.held_out_labels, len(self.data.label_names)
        folds = min(MOST_FOLDS, int(np.bincount(few.labels, minlength=classes).min()))
        if len(held_out) >= FEWEST_TO_CHOOSE:
            parts, judges = [(few, held_out)], "held-out labels"
        elif folds < 2:
            return self._after_source(few)
        else:
            split = StratifiedKFold(folds, shuffle=True, random_state=self.config.seed).split(few.labels, few.labels)
            parts, judges = [(few.take(rest), few.take(out)) for rest, out in split], "each label, learned without it,"
        both, alone = (self._judge(name, fit, parts) for name, fit in ways.items())
        gains = alone - both
        noise = standard_error(gains)  # a few labels often prefer the wrong one, and a source mostly helps
        better = "target" if gains.mean() > CLEARLY * noise else "both"
        said = "both domains" if better == "both" else "the target alone"
        found = f"{both.mean():.3f} from both domains, {alone.mean():.3f} from the target alone"
        known = f"standard error of the difference {noise:.3f}"
        self.progress.say(f"the teacher learns from {said}: log-likelihood on {judges} {found} ({known})")
        return ways[better](few)

    def _judge(self, name: str, fit: Callable[..., Teacher], parts: Sequence[tuple[Examples, Examples]]) -> Doubles:
        """Log-likelihood of labels under teachers that did not learn them; kept, since every method asks."""
        config, length, device = self.config, self.config.max_length, training.best_device()
        how = [name, asdict(config.teacher), length, config.seed, RECIPE, training.arithmetic(device)]
        texts = [[each.inputs, each.labels] for each in (self.data.source, *itertools.chain(*parts))]
        key = fingerprint(self.pretrained().fingerprint(), how, texts)

        def build(folder: Path) -> None:
            found = [predict(fit(learned, len(parts) == 1), asked.inputs, length).logits for learned, asked in parts]
            np.save(folder / "logits.npy", np.concatenate(found))

        logits = np.load(cached_folder("judged", key, build) / "logits.npy", allow_pickle=False)
        return calibrated_log_likelihoods(logits, np.concatenate([asked.labels for _, asked in parts]))

    def _after_source(self, few: Examples, keep: bool = True) -> Teacher:
        config, source = self.config.teacher, self.data.source
        first = self._fit(self.pretrained(), source, config.source_epochs, config.source_seed, "teacher: source")
        return self._fit(first, few, _passes(config.target_epochs, few), self.config.seed, "teacher: target", keep)

    def _without_source(self, few: Examples, keep: bool = True) -> Teacher:
        epochs = _passes(self.config.teacher.target_only_epochs, few)
        return self._fit(self.pretrained(), few, epochs, self.config.seed, "teacher: target alone", keep)

    @cached_property
    def target_only_teacher(self) -> Teacher:
        """The yardstick: the same encoder on all target labels and nothing else."""
        return self._without_source(self.data.target_labels)

    @cached_property
    def labeller(self) -> Labeller:
        """The teacher's soft labels, cached by content."""
        frozen = frozen_layers(self.teacher, self.config.teacher.frozen_layers)
        labeller = cached_labeller(self.teacher, self.config.max_length, self.progress, frozen, self.client)
        refuse_useless_teacher(labeller, self.data.splits.reward, self.progress)
        labeller(self.data.source.inputs)  # in one call, whose frozen states are kept; parts of it are known then
        return labeller

    def new_student(self) -> Student:
        """Build an untrained student; every call gives the same one."""
        config, data = self.config, self.data
        texts = (*data.source.inputs, *data.splits.train.inputs, *self.near_texts)
        student = build_student(config.student, self.teacher, data.label_names, texts, config.seed)
        encoding.refuse_long_sequences("the student", student.positions, config.max_length)
        student.model.to(training.best_device())
        return student

    def _fit(self, base: Teacher, texts: Examples, epochs: float, seed: int, stage: str, keep: bool = True) -> Teacher:
        train, progress = (fine_tuned, self.progress) if keep else (fine_tune, self.progress.keeping(None))
        return train(base, texts, self.config.teacher, epochs, self.config.max_length, seed, stage, progress)


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

    def labelled(self, inputs: tuple[TextInput, ...], labels: np.typing.ArrayLike | None = None) -> DistillationSet:
        """Label N texts with the teacher and tokenise them for the student; real labels, if any, are int64 (N,)."""
        real = np.full(len(inputs), -1, np.int64) if labels is None else np.asarray(labels, np.int64)
        encoded = encoding.encode(self.student.tokenizer, inputs, self.context.config.max_length)
        return DistillationSet(encoded, self.context.labeller(inputs), real)

    def _with_labels(self, examples: Examples) -> DistillationSet:
        return self.labelled(examples.inputs, examples.labels)

    @cached_property
    def target(self) -> DistillationSet:
        """The target's training shots."""
        return self._with_labels(self.context.data.splits.train)

    @cached_property
    def source(self) -> DistillationSet:
        """The source domain, less what is set apart."""
        return self._with_labels(self.context.source)

    @cached_property
    def unlabelled(self) -> tuple[TextInput, ...]:
        """Texts without labels, less what is set apart; the teacher has not read them."""
        apart = self.context.never_trained_on
        return tuple(text for text in self.context.near_texts if normalised_hash(text) not in apart)

    @property
    def known(self) -> DistillationSet:
        """Everything that the student learns from before any candidate is drawn; joined on each use, not kept twice."""
        return join([self.source, self.target])

    def distil(self, kept: DistillationSet | None, steps: int, stage: str) -> None:
        """Train the student on a mixture of everything at hand.

        Args:
            kept: Candidates, or None.
            steps: Updates.
            stage: Name shown to the user.
        """
        sets, shares = mixture(self, kept)
        self.trainer.train(sets, shares, steps, self.context.progress, stage)

    @cached_property
    def judges(self) -> DistillationSet:
        """The labelled reward split, which can refuse a selection; no student is trained on it, and it chooses none."""
        return self._with_labels(self.context.data.splits.reward)

    @cached_property
    def reward(self) -> DistillationSet:
        """Texts near the target that reward the selector; they are never trained on and choose no state."""
        return self.labelled(self.context.set_apart[1])


def mixture(session: TrainingSession, kept: DistillationSet | None) -> tuple[list[DistillationSet], list[float]]:
    """Choose the sets of each batch and their shares: the configured ones, and source text for the rest."""
    kd = session.context.config.kd
    parts = [(session.target, kd.target_share)]
    parts += [(kept, kd.augmented_share)] if kept is not None else []
    parts.append((session.source, 1 - sum(share for _, share in parts)))
    return [part for part, _ in parts], [share for _, share in parts]


def open_session(context: RunContext) -> TrainingSession:
    """Build the student, of which only the output layer is trained yet, and everything that its training needs.

    Raises:
        RunError: If the teacher's outputs are constant.
    """
    config, student = context.config, context.new_student()
    kd, width = config.kd, context.teacher.hidden_size
    if kd.learning_rate == "auto" and wants_small_rate(config.student, context.teacher, student.output.in_features):
        kd = replace(kd, learning_rate=1e-4)
    trainer = KDTrainer(student, kd, context.data.splits.validation, width, config.max_length, config.seed)
    session = TrainingSession(context, student, trainer)
    trainer.follow(session.labelled(context.set_apart[0]))
    known = session.known
    refuse_constant_targets(known)
    fit_output_layer(student, known)
    if kd.objective != "soft_labels":
        weight, rng = teacher_output_weight(context.teacher, known.teacher), np.random.default_rng([config.seed, 4])
        trainer.learn_subclasses(fit_subclasses(known.teacher, weight, kd.objective, kd.subclasses, rng))
    return session
