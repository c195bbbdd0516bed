"""YAML cards (agents, domains, configs): found in the working directory first, checked strictly."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from l2a.util.errors import UsageError

PACKAGE = Path(__file__).parent.parent
T = typing.TypeVar("T")


def card_folders(kind: str) -> tuple[Path, ...]:
    """List the folders that hold cards of one kind, in the order of precedence.

    Args:
        kind: "agents", "domains" or "configs".

    Returns:
        The working directory's folder, then the one shipped in the package or beside it in a checkout.
    """
    return (Path.cwd() / kind, PACKAGE / "shipped" / kind, PACKAGE.parent / kind)


def list_cards(kind: str) -> dict[str, Path]:
    """Find every card of a kind by name; a user's card hides a shipped one of the same name.

    Args:
        kind: "agents", "domains" or "configs".

    Returns:
        Card names, sorted, with their files.
    """
    found: dict[str, Path] = {}
    for folder in card_folders(kind):
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def find_card(kind: str, name: str) -> Path:
    """Find one card by name.

    Args:
        kind: "agents", "domains" or "configs".
        name: The file's name without ``.yaml``.

    Returns:
        The card's file.

    Raises:
        UsageError: If there is no such card; the names that exist are listed.
    """
    cards = list_cards(kind)
    if name not in cards:
        raise UsageError(
            f"{kind}: there is no card named {name!r}{did_you_mean(name, cards)}; "
            f"known: {', '.join(cards)}; add your own as {kind}/{name}.yaml"
        )
    return cards[name]


def did_you_mean(word: str, allowed: typing.Iterable[str]) -> str:
    """Suggest the nearest allowed word.

    Args:
        word: What the user wrote.
        allowed: What can be written.

    Returns:
        "; did you mean 'x'?" or an empty string.
    """
    close = difflib.get_close_matches(word, list(allowed), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Args:
        path: The file.

    Returns:
        The mapping; an empty file gives an empty one.

    Raises:
        UsageError: If the file is missing, is not YAML or is not a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"config file {path}: no such file; check the path") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"config file {path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"config file {path}: a mapping of keys to values is needed, not a {type(content).__name__}")
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
        return _convert_union(arguments, value, where, problems)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(arguments[0], item, f"{where}[{i}]", problems) for i, item in enumerate(value))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {str(key): _convert(arguments[1], item, f"{where}.{key}", problems) for key, item in value.items()}
    if origin is typing.Literal:
        if value not in arguments:
            hint_text = did_you_mean(str(value), [str(a) for a in arguments])
            problems.append(f"{where}: {value!r} is not allowed{hint_text}; allowed: {', '.join(map(str, arguments))}")
        return value
    return _convert_scalar(hint, value, where, problems)


def _convert_union(arguments: tuple[Any, ...], value: Any, where: str, problems: list[str]) -> Any:
    trials: list[list[str]] = []
    for argument in arguments:
        trial: list[str] = []
        converted = _convert(argument, value, where, trial)
        if not trial:
            return converted
        trials.append(trial)
    problems.append(min(trials, key=len)[0])
    return None


def _convert_scalar(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads 1e-4 (without a dot) as a string.
        try:
            return float(value)
        except ValueError:
            pass
    wrong_bool = isinstance(value, bool) and hint is not bool
    if not isinstance(hint, type) or not isinstance(value, hint) or wrong_bool:
        name = hint.__name__ if isinstance(hint, type) else str(hint)
        problems.append(f"{where}: {value!r} is a {type(value).__name__}, {name} is needed")
    return value
