"""YAML cards (agents, domains, configs): shipped ones and those of the working directory, checked strictly."""

import contextlib
import dataclasses
import re
import types
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml

from l2a.util.errors import UsageError, did_you_mean, logger, os_error_sentence

PACKAGE = Path(__file__).parent.parent
T = TypeVar("T")
NO_TEXT = re.compile("[\0\ud800-\udfff]")


def shipped_folder(kind: str) -> Path:
    """Locate the cards that come with the package: inside an installed package, or beside it in a checkout."""
    shipped = PACKAGE / "shipped"
    return (shipped if shipped.is_dir() else PACKAGE.parent) / kind


def list_cards(kind: str) -> dict[str, Path]:
    """Find every card of a kind by name; files of the working directory add names and never hide a shipped one.

    Args:
        kind: "agents", "domains", "configs" or "configs/experiments".
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
        fix = f"known: {', '.join(cards)}; add your own as {kind}/{name}.yaml"
        raise UsageError(f"{kind}: there is no card {name!r}{did_you_mean(name, cards)}; {fix}")
    own = Path.cwd() / kind / f"{name}.yaml"
    with contextlib.suppress(OSError):  # in a checkout the shipped cards lie in the working directory too
        if name == "default" or not own.is_file() or own.read_bytes() == cards[name].read_bytes():
            return cards[name]
    logger.warning("%s/%s.yaml is not used, because a shipped card has that name; rename it", kind, name)
    return cards[name]


class _PlainLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, which YAML readers take in silence, and aliases, which make bombs."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(problem=f"an alias (*) by line {self.line + 1}; write the value itself")
        if self.flow_level > 20:  # PyYAML takes minutes for what is nested a thousand times
            raise yaml.composer.ComposerError(problem=f"line {self.line + 1} is nested too deeply; write it flat")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
        if twice is not None:
            line = node.start_mark.line + 1
            raise yaml.constructor.ConstructorError(problem=f"the key {twice!r} is given twice after line {line}")
        return super().construct_mapping(node, deep)


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; an empty file gives an empty one.

    Raises:
        UsageError: If the file is missing, is not YAML or is not a mapping.
    """
    try:
        content = yaml.load(path.read_text("utf-8-sig"), _PlainLoader)
    except OSError as error:
        raise UsageError(f"config file {os_error_sentence(OSError(error.errno, error.strerror, str(path)))}") from error
    except Exception as error:  # PyYAML raises almost any for a wrong tag, date or number
        raise UsageError(f"config file {path}: not YAML ({' '.join(str(error).split())}); correct it there") from error
    if content is not None and not isinstance(content, dict):
        raise UsageError(f"config file {path}: it holds a {type(content).__name__}; write a mapping of keys to values")
    return content or {}


class Allowed(NamedTuple):
    """Which numbers or texts an annotated field takes."""

    words: str  # what stands in messages after "give "
    holds: Callable[[Any], object]  # true for these and for no NaN; it need not think of other types


class Checked:
    """Base of dataclasses whose fields are held against their annotations when they are made."""

    _section = ""

    def __init_subclass__(cls, section: str = "") -> None:
        """Note what stands before the fields' names in messages, such as "kd."."""
        cls._section = section

    def __post_init__(self) -> None:
        """Raise a UsageError for the first value of another type, out of range or not finite."""
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            if problem := _misfit(getattr(self, name), hint, self._section + name):
                raise UsageError(problem)


def build(cls: type[T], mapping: Mapping[str, Any], where: str) -> T:
    """Build a frozen dataclass, nested ones included, from plain data.

    Args:
        cls: The dataclass.
        mapping: Keys are field names; nested dataclasses are mappings, tuples are lists.
        where: Named in errors, such as the file.

    Raises:
        UsageError: For all unknown keys (each with "did you mean"), missing keys and wrong values at once.
    """
    problems: list[str] = []
    value = _build(cls, mapping, "", problems)
    if problems:
        more = f"; and {len(problems) - 9} more" if len(problems) > 9 else ""
        raise UsageError(f"{where}: " + "; ".join(problems[:9]) + more)
    return cast(T, value)


def _build(cls: Any, mapping: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    hints = get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in mapping:
        if key not in fields:
            hint = did_you_mean(str(key), fields) or f" (allowed: {', '.join(fields)})"
            problems.append(f"unknown key {prefix}{key!s:.100}{hint}")
    for name, field in fields.items():
        if name not in mapping and field.default is field.default_factory is dataclasses.MISSING:
            problems.append(f"missing key {prefix}{name}")
    values = {key: _convert(mapping[key], hints[key], prefix + key, problems) for key in mapping if key in fields}
    return None if problems else cls(**values)


def _convert(value: Any, hint: Any, where: str, problems: list[str]) -> Any:
    """Give plain data the form of an annotation, and note what does not fit it."""
    for kind in _kinds(hint):
        origin, arguments = get_origin(kind), get_args(kind)
        if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
            return _build(kind, value, f"{where}.", problems)
        if origin is tuple and isinstance(value, list | tuple):
            return tuple(_convert(item, arguments[0], f"{where}[{i}]", problems) for i, item in enumerate(value))
        if origin is Mapping and isinstance(value, Mapping):
            return {str(key): _convert(item, arguments[1], f"{where}.{key}", problems) for key, item in value.items()}
        if float in (kind, *arguments[:1]) and isinstance(value, int | str) and not isinstance(value, bool):
            with contextlib.suppress(ValueError, OverflowError):  # YAML 1.1 reads 1e-4, without a dot, as a string
                value = float(value)
    if problem := _misfit(value, hint, where):
        problems.append(problem)
    return value


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _misfit(value: Any, hint: Any, where: str) -> str | None:
    """Say what is wrong with a value and what is allowed, or None when it fits its annotation."""
    if any(_fits(value, kind) for kind in _kinds(hint)):
        return None
    allowed = [option for kind in _kinds(hint) for option in _in_words(kind)]
    suggestion = did_you_mean(value, allowed) if isinstance(value, str) else ""
    return f"{where} is {value!r:.200}{suggestion}; give {' or '.join(allowed)}"


def _fits(value: Any, kind: Any) -> bool:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any or origin is Literal:
        return kind is Any or value in arguments
    if origin is Annotated:
        return _fits(value, arguments[0]) and all(limit.holds(value) for limit in arguments[1:])
    if origin is Mapping:
        return isinstance(value, Mapping) and all(_fits(item, arguments[1]) for item in value.values())
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    # NUL characters and lone surrogates can stand in no path and no file.
    return isinstance(value, origin or kind) and not (kind is str and NO_TEXT.search(value))


def _in_words(kind: Any) -> list[str]:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return [str(option) for option in arguments]
    if origin is Annotated:
        return [arguments[1].words]
    if origin is Mapping:
        return [f"a mapping of names to {_in_words(arguments[1])[0]}"]
    if dataclasses.is_dataclass(kind):
        return ["a mapping of its keys to values"]
    words = {str: "printable text", bool: "true or false", int: "a whole number", float: "a number", tuple: "a list"}
    return [words.get(origin or kind) or ("null" if kind is types.NoneType else f"a {kind.__name__}")]
