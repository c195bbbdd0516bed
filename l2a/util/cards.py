"""YAML cards (agents, domains, configs): shipped ones and those of the working directory, checked strictly."""

import contextlib
import dataclasses
import logging
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from l2a.util.errors import UsageError, did_you_mean, os_error_sentence

PACKAGE = Path(__file__).parent.parent
T = typing.TypeVar("T")
logger = logging.getLogger(__name__)


def shipped_folder(kind: str) -> Path:
    """Locate the cards that come with the package: inside an installed package, or beside it in a checkout."""
    shipped = PACKAGE / "shipped"
    return (shipped if shipped.is_dir() else PACKAGE.parent) / kind


def list_cards(kind: str) -> dict[str, Path]:
    """Find every card of a kind by name; files of the working directory add names and never hide a shipped one.

    Args:
        kind: "agents", "domains", "configs" or "configs/experiments".

    Returns:
        Card names, sorted, with their files.
    """
    own = {path.stem: path for path in sorted((Path.cwd() / kind).glob("*.yaml"))}
    return dict(sorted((own | {path.stem: path for path in shipped_folder(kind).glob("*.yaml")}).items()))


def find_card(kind: str, name: str) -> Path:
    """Find the file of one card by the name that it has without ``.yaml``.

    Raises:
        UsageError: If there is no such card; the names that exist are listed.
    """
    cards = list_cards(kind)
    if name not in cards:
        raise UsageError(
            f"{kind}: there is no card {name!r}{did_you_mean(name, cards)}; "
            f"known: {', '.join(cards)}; add your own as {kind}/{name}.yaml"
        )
    own = Path.cwd() / kind / f"{name}.yaml"
    if name != "default" and own.is_file() and not own.samefile(cards[name]):
        logger.warning("%s/%s.yaml is not used, because a shipped card has that name; rename it", kind, name)
    return cards[name]


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a mapping that holds a key twice, which YAML readers take in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for number, key in enumerate(keys) if key in keys[:number] and key != "<<"), None)
        if twice is not None:
            line = node.start_mark.line + 1
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} is given twice after line {line}")
        return super().construct_mapping(node, deep)


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; an empty file gives an empty one.

    Raises:
        UsageError: If the file is missing, is not YAML or is not a mapping.
    """
    try:
        content = yaml.load(path.read_text("utf-8-sig"), _UniqueKeys)
    except OSError as error:
        raise UsageError(f"config file {os_error_sentence(OSError(error.errno, error.strerror, str(path)))}") from error
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"config file {path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"config file {path}: it holds a {type(content).__name__}; write a mapping of keys to values")
    return content


def build(cls: type[T], mapping: Mapping[str, Any], where: str) -> T:
    """Build a frozen dataclass, nested ones included, from plain data.

    Args:
        cls: The dataclass.
        mapping: Keys are field names; nested dataclasses are mappings, tuples are lists.
        where: Named in errors, such as the file.

    Returns:
        The validated instance.

    Raises:
        UsageError: For unknown keys (all of them at once, each with "did you mean"), missing keys and wrong types.
    """
    problems: list[str] = []
    value = _build(cls, mapping, "", problems)
    if problems:
        raise UsageError(f"{where}: " + "; ".join(problems))
    return typing.cast(T, value)


def _build(cls: Any, mapping: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in mapping:
        if key not in fields:
            hint = did_you_mean(str(key), fields) or f" (allowed: {', '.join(fields)})"
            problems.append(f"unknown key {prefix}{key}{hint}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in mapping:
            problems.append(f"missing key {prefix}{name}")
    known = {key: value for key, value in mapping.items() if key in fields}
    values = {key: _convert(hints[key], value, f"{prefix}{key}", problems) for key, value in known.items()}
    return None if problems else cls(**values)


def _convert(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return _build(hint, value, f"{where}.", problems)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        trials: list[list[str]] = [[] for _ in arguments]
        for argument, trial in zip(arguments, trials, strict=True):
            converted = _convert(argument, value, where, trial)
            if not trial:
                return converted
        problems.append(min(trials, key=len)[0])
        return None
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(arguments[0], item, f"{where}[{i}]", problems) for i, item in enumerate(value))
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {str(key): _convert(arguments[1], item, f"{where}.{key}", problems) for key, item in value.items()}
    if origin is typing.Literal:
        if value not in arguments:
            names = [str(argument) for argument in arguments]
            hint = did_you_mean(str(value), names)
            problems.append(f"{where} is {value!r}{hint}; give one of {', '.join(names)}")
        return value
    return _convert_scalar(hint, value, where, problems)


def _convert_scalar(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-4, without a dot, as a string
        with contextlib.suppress(ValueError):
            return float(value)
    wrong_bool = isinstance(value, bool) and hint is not bool
    if not isinstance(hint, type) or not isinstance(value, hint) or wrong_bool:
        name = hint.__name__ if isinstance(hint, type) else str(hint)
        problems.append(f"{where} is {value!r}, a {type(value).__name__}; give a value of type {name}")
    return value
