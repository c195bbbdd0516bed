"""All settings of a run, as frozen dataclasses that check themselves."""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from l2a.util.cards import build, find_card, load_yaml, shipped_folder
from l2a.util.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class Allowed:
    """Which numbers a setting takes.

    Attributes:
        words: The same for people, after "give ".
        holds: Whether a number is allowed; it need not think of NaN and infinity.
        infinite: Whether infinity is a value.
    """

    words: str
    holds: Callable[[Any], bool]
    infinite: bool = False


LARGEST_SEED = 2**31 - 1
Positive = Annotated[float, Allowed("a number above 0", lambda value: value > 0)]
Temperature = Annotated[float, Allowed("a number above 0, or inf", lambda value: value > 0, infinite=True)]
NotNegative = Annotated[float, Allowed("a number of 0 or more", lambda value: value >= 0)]
Weight = Annotated[float, Allowed("a number from 0 to 1", lambda value: 0 <= value <= 1)]
Share = Annotated[float, Allowed("a share above 0 and at most 1", lambda value: 0 < value <= 1)]
Decay = Annotated[float, Allowed("a number from 0 to below 1", lambda value: 0 <= value < 1)]
Correlation = Annotated[float, Allowed("a number from -1 to 1", lambda value: -1 <= value <= 1)]
Count = Annotated[int, Allowed("a whole number of at least 1", lambda value: value >= 1)]
CountFromZero = Annotated[int, Allowed("a whole number of at least 0", lambda value: value >= 0)]
AtLeastTwo = Annotated[int, Allowed("a whole number of at least 2", lambda value: value >= 2)]
Length = Annotated[int, Allowed("a whole number of at least 8", lambda value: value >= 8)]
Seed = Annotated[int, Allowed(f"a whole number from 0 to {LARGEST_SEED}", lambda value: 0 <= value <= LARGEST_SEED)]


def check_settings(settings: Any, section: str = "") -> None:
    """Hold every field of a dataclass against its annotation.

    Args:
        settings: An instance whose numbers are annotated with ``Allowed``.
        section: Stands before the field's name in messages, such as "kd.".

    Raises:
        UsageError: For the first value that is of another type, out of range or not finite.
    """
    for name, hint in typing.get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        kinds = typing.get_args(hint) if is_union else (hint,)
        if not any(_fits(value, kind) for kind in kinds):
            allowed = [option for kind in kinds for option in _in_words(kind)]
            hints = did_you_mean(value, allowed) if isinstance(value, str) else ""
            raise UsageError(f"{section}{name} is {value!r}{hints}; give {' or '.join(allowed)}")


def _fits(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) is Mapping:
        return isinstance(value, Mapping) and all(_fits(item, typing.get_args(kind)[1]) for item in value.values())
    if typing.get_origin(kind) is not Annotated:
        return isinstance(value, typing.get_origin(kind) or kind)
    number, allowed = typing.get_args(kind)
    is_number = isinstance(value, Integral if number is int else Real) and not isinstance(value, bool)
    return is_number and (allowed.infinite or math.isfinite(value)) and allowed.holds(value)


def _in_words(kind: Any) -> list[str]:
    if typing.get_origin(kind) is Literal:
        return [str(option) for option in typing.get_args(kind)]
    if typing.get_origin(kind) is Annotated:
        return [typing.get_args(kind)[1].words]
    if typing.get_origin(kind) is Mapping:
        return [f"each name {_in_words(typing.get_args(kind)[1])[0]}"]
    return [{str: "text", bool: "true or false", types.NoneType: "null"}.get(kind, f"a {kind.__name__}")]


@dataclass(frozen=True)
class Columns:
    """Which columns to read; None means: find it by its usual names.

    Attributes:
        text: Column of the text, or of the first text of a pair.
        text_pair: Column of the second text of a pair; not searched for when ``text`` is given.
        label: Column of the label.
    """

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class TeacherConfig:
    """The teacher and its two stages of fine-tuning.

    Attributes:
        model: "minilm-l6" or "mpnet-base" (fetched from the package index), a folder, or a Hub id.
        fine_tuned: Use the model as it is: it already classifies the target's labels.
        frozen_layers: Encoder layers, from the bottom, that keep their weights, as the embeddings then do; "auto" for
            two thirds of 12 layers or more and a third of fewer; None trains everything.
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
    frozen_layers: Literal["auto"] | CountFromZero | None = "auto"
    source_epochs: Positive = 1.0
    target_epochs: Positive = 8.0
    target_only_epochs: Positive = 20.0
    learning_rate: Positive = 1e-4
    head_learning_rate: Positive = 1e-3
    batch_size: Count = 32
    source_seed: Seed = 0

    def __post_init__(self) -> None:
        check_settings(self, "teacher.")


Preset = Literal["auto", "narrow", "scratch", "pruned", "minilm-l6", "bert-tiny"]


@dataclass(frozen=True)
class StudentConfig:
    """The student.

    Attributes:
        preset: What is built. "minilm-l6" and "bert-tiny": these pretrained encoders over as many of their tokens as
            are allowed. "narrow": a fresh narrow BERT over word vectors read from the teacher. "scratch": the same with
            random weights, a control. "pruned": the teacher's first layers over the tokens that the domains use.
            "auto": what measures best for the teacher's size: "minilm-l6" beside one of base size, else "narrow".
        model: A folder or Hub id to start from instead of a preset.
        max_share: Largest allowed share of the teacher's parameters.
    """

    preset: Preset = "auto"
    model: str | None = None
    max_share: Share = 0.133

    def __post_init__(self) -> None:
        check_settings(self, "student.")


@dataclass(frozen=True)
class GeneratorConfig:
    """Settings of the generator.

    Attributes:
        tau: Temperature of the target density; small seeks the target's modes, infinity gives the plain proposals.
        beta: Cost of each unit of degree beyond ``max_degree``.
        degree: Share of the tokens that an operator changes, or "auto" to choose it by the amount of labelled data.
        max_degree: Realised share of changed tokens up to which ``beta`` costs nothing.
        operators: How often each operator of the chains is proposed: 0 never, 1 where it is not named; only the
            proportions count.
        target_share: Probability that an operator starts from a target text rather than a source text.
        chains: Chains that run side by side; the number of texts in one call of the teacher.
        burn_in: First steps of each chain that give no candidates.
        neighbours: Nearest neighbours kept for each token.
        operator: What the row "augmented_kd_student" augments by; None for the chain with all its operators. No other
            row reads it.
        copies: Augmented texts of that row in each round, as a multiple of ``kd.pool_size``. No other row reads it.
    """

    tau: Temperature = 1.0
    beta: NotNegative = 10.0
    degree: Literal["auto"] | Share = 0.15
    max_degree: Weight = 0.5
    operators: Mapping[str, NotNegative] = field(default_factory=dict)
    target_share: Weight = 0.5
    chains: Count = 64
    burn_in: CountFromZero = 5
    neighbours: Count = 16
    operator: str | None = None
    copies: Count = 1

    def __post_init__(self) -> None:
        check_settings(self, "generator.")


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


Objective = Literal["soft_labels", "lelp", "lelp_random_directions"]


@dataclass(frozen=True)
class KDConfig:
    """Loss, optimiser and budget of knowledge distillation.

    Attributes:
        temperature: T of the soft labels.
        alpha: Weight of the soft-label term on examples with a real label; the rest goes to cross-entropy. Subclasses
            are learned from the teacher alone.
        hidden_weight: Weight of the hidden-state term (pooled student state against the teacher's embedding).
        objective: What the student learns from: the teacher's soft labels, LELP's pseudo-subclasses or the control of
            LELP with random directions.
        subclasses: Pseudo-subclasses of each class, S.
        subclass_temperature: beta, the softness inside a class.
        learning_rate: Peak rate of the student; "auto" for 1e-4 where it starts from a whole pretrained encoder, and
            8e-4 otherwise.
        embedding_rate: Rate of the word embeddings as a share of it. Only rows whose tokens occur are ever changed; at
            0 none is, so that words which no text shows keep their place among those that do.
        average: Decay of the running average of the weights that is judged and kept; 0 for none.
        batch_size: Texts in a step, over all processes.
        warmup_steps: Steps on target and source before the first round.
        rounds: How often a pool is drawn and selected from.
        round_steps: Steps in each round.
        pool_size: Candidates drawn in each round.
        target_share: Share of the texts of a few batches that is target text.
        augmented_share: Share that is kept candidates.
        unlabelled_share: Share that is unlabelled text, where a run has some; the rest is source text.
        unlabelled_size: Unlabelled texts used at most; of more, as many are drawn by the seed.
        evaluate_every: Steps between evaluations on the validation split.
    """

    temperature: Positive = 2.0
    alpha: Weight = 0.9
    hidden_weight: NotNegative = 0.1
    objective: Objective = "soft_labels"
    subclasses: Count = 4
    subclass_temperature: Positive = 1.0
    learning_rate: Literal["auto"] | Positive = "auto"
    embedding_rate: NotNegative = 1.0
    average: Decay = 0.98
    batch_size: Count = 32
    warmup_steps: CountFromZero = 200
    rounds: Count = 2
    round_steps: Count = 200
    pool_size: Count = 1600
    target_share: Weight = 0.25
    augmented_share: Weight = 0.25
    unlabelled_share: Weight = 0.4
    unlabelled_size: Count = 20_000
    evaluate_every: Count = 20

    def __post_init__(self) -> None:
        check_settings(self, "kd.")
        shares = (self.target_share, self.augmented_share, self.unlabelled_share)
        if sum(shares) > 1:
            names = "kd.target_share, kd.augmented_share and kd.unlabelled_share"
            raise UsageError(f"{names} are {', '.join(map(str, shares))}; their sum must be at most 1")

    @property
    def peak_rate(self) -> float:
        """The peak rate; for "auto" that of a student that is built afresh."""
        return 8e-4 if self.learning_rate == "auto" else self.learning_rate

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
    keep_rate: Share = 0.5
    batch: Count = 32
    episode_steps: Count = 16
    training_steps: Count = 20_000
    snapshots: Count = 3
    real_evaluations: CountFromZero = 8
    tier_correlation: Correlation = 0.3
    tensorboard: str | None = None

    def __post_init__(self) -> None:
        check_settings(self, "selector.")


@dataclass(frozen=True)
class DistillConfig:
    """Everything that decides a run.

    Attributes:
        source: Source domain: a card name, a file, a folder or a Hub id. None is "movies" where the target is a shipped
            card, and no source otherwise.
        target: Target domain, likewise.
        unlabelled: Text near the target, or general text, without labels: a .txt file or a domain; None for none. The
            teacher labels it; it is distilled on and seeds the generator.
        shots: Labelled target examples per class for training. None is 32 where the target is a shipped card, and all
            there are otherwise.
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

    source: str | None = None
    target: str = "tweets"
    unlabelled: str | None = None
    shots: Count | None = None
    dev_shots: Count = 16
    source_size: AtLeastTwo | None = None
    seed: Seed = 0
    max_length: Length = 128
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
        check_settings(self)


DEFAULT_SOURCE, SIMULATED_SHOTS = "movies", 32
"""What a run on a shipped target takes when nothing is said: its labels are plentiful, so scarcity is simulated."""


def settle(config: DistillConfig) -> DistillConfig:
    """Fill in the source and the shots where they follow from the target.

    Args:
        config: The request.

    Returns:
        The request with a source; the shots of a user's own target stay None, which means all labels.

    Raises:
        UsageError: If there is no source and none can be assumed.
    """
    if (shipped_folder("domains") / f"{config.target}.yaml").is_file():
        shots = SIMULATED_SHOTS if config.shots is None else config.shots
        return dataclasses.replace(config, source=config.source or DEFAULT_SOURCE, shots=shots)
    if config.source is None:
        raise UsageError(
            f"source is not given, and none can be assumed for {config.target!r}; give --source, a domain with the "
            "same labels and plenty of texts (--unlabelled adds text without labels, but cannot replace it)"
        )
    return config


def load_config(preset: str, file: Path | None = None, flags: Mapping[str, Any] | None = None) -> DistillConfig:
    """Build a configuration: flags override the file, the file overrides the preset.

    Args:
        preset: A card in ``configs/``.
        file: A YAML file with any of the fields, or None.
        flags: Dotted field names with values; None values are ignored.

    Returns:
        The validated configuration.

    Raises:
        UsageError: For unknown keys, each with "did you mean", wrong values, and a source that is missing.
    """
    merged = load_yaml(find_card("configs", preset))
    if file is not None:
        merged = _merge(merged, load_yaml(file))
    for name, value in (flags or {}).items():
        if value is not None:
            merged = _merge(merged, _nest(name, value))
    return settle(build(DistillConfig, merged, str(file) if file is not None else f"preset {preset}"))


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
