"""The configuration of a run: frozen data, validated once, read from presets, files and flags."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from l2a.cards import build, find_card, load_yaml
from l2a.domains.domain import Columns
from l2a.errors import UsageError
from l2a.generator.config import GeneratorConfig
from l2a.kd.config import KDConfig
from l2a.selector.config import SelectorConfig
from l2a.students.config import StudentConfig
from l2a.teacher.config import TeacherConfig


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
