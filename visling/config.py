"""Frozen dataclasses <-> plain dictionaries and TOML, with errors that name the nearest valid key; modules by name."""

from __future__ import annotations

import dataclasses
import importlib
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from visling.errors import ConfigError, Conflicts, nearest

T = TypeVar("T")


def to_dict(config: Any) -> Any:
    """A config as dictionaries, lists and scalars, ready for JSON."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    if isinstance(config, Path):
        return str(config)
    return config


def from_dict(kind: type[T], values: Mapping[str, Any], *, where: str = "") -> T:
    """Build a config of class `kind` from plain values.

    Raises:
        ConfigError: unknown keys (names the nearest valid ones), missing ones, and values of the wrong type.
    """
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}  # type: ignore[arg-type]
    conflicts = Conflicts()
    given = {}
    for key, value in values.items():
        with conflicts.collect():
            if key not in fields:
                raise ConfigError(
                    f"{_dotted(where, key)!r} is not a setting of {kind.__name__}. {nearest(key, fields)}"
                )
            given[key] = _convert(hints[key], value, _dotted(where, key))
    conflicts.refuse()
    missing = [
        name
        for name, f in fields.items()
        if name not in given and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(
            f"{kind.__name__} needs {', '.join(repr(_dotted(where, m)) for m in missing)}: no value was given."
        )
    return kind(**given)


def override(config: T, settings: Iterable[str]) -> T:
    """A copy of `config` with dotted settings replaced, all at once: settings that check each other may come in any
    order.

    Args:
        settings: `a.b=value` strings; the value is read as TOML (`true`, `3`, `0.5`, `[1, 2]`), else as a plain string;
            `none` is None where the setting allows that. The last one of a name wins. In a mapping, a name that it
            lacks is added.
    Raises:
        ConfigError: settings without `=`, unknown keys (names the nearest valid ones), values of the wrong type; or,
            if there are none, values that the config refuses.
    """
    conflicts = Conflicts()
    changes = []
    for setting in settings:
        path, equals, text = setting.partition("=")
        if equals:
            changes.append((path.strip().split("."), text.strip(), path.strip()))
        else:
            conflicts.errors.append(
                ConfigError(f"cannot read setting {setting!r}: expected name=value, for example train.epochs=3.")
            )
    read = _read_changes(config, type(config), changes, conflicts)
    conflicts.refuse()
    replaced: T = _replace(read, conflicts) if changes else config
    conflicts.refuse()
    return replaced


def difference(config: Any, base: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (value in base, value in config) of every setting in which two configs differ."""
    return dict(_differences(to_dict(config), to_dict(base), ""))


def load_toml(path: Path) -> dict[str, Any]:
    """Contents of a TOML file.

    Raises:
        ConfigError: the file is missing or is not TOML.
    """
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(f"no configuration file {path}. Check the path.") from error
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, a number of thousands of digits
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error


def _differences(new: Any, old: Any, where: str) -> Iterable[tuple[str, tuple[Any, Any]]]:
    if isinstance(new, dict) and isinstance(old, dict):
        for key in sorted(new.keys() | old.keys()):
            yield from _differences(new.get(key), old.get(key), _dotted(where, key))
    elif new != old:
        yield where, (old, new)


@dataclasses.dataclass(frozen=True)
class _Changed:
    """A config, or a mapping in one, whose settings are to be replaced in one step."""

    value: Any
    """As it was, or as another setting gives it as a whole."""
    hint: Any
    """Annotation of its place."""
    where: str
    """Its dotted name."""
    changes: Mapping[str, Any]
    """Name -> new value, itself a `_Changed` where settings below it are."""


def _read_changes(
    value: Any, hint: Any, changes: Iterable[tuple[list[str], str, str]], conflicts: Conflicts, where: str = ""
) -> _Changed:
    """What changes (path from here, text of the value, whole name for messages) ask for; those that cannot be read are
    added to the conflicts.

    Args:
        hint: annotation of the place where `value` stands.
    """
    values: dict[str, Any] = {}
    below: dict[str, list[tuple[list[str], str, str]]] = {}
    hints: dict[str, Any] = {}
    for (name, *rest), text, whole in changes:
        with conflicts.collect():
            hints[name] = _hint(value, hint, name, whole, len(rest))
            if rest:
                below.setdefault(name, []).append((rest, text, whole))
            else:
                values[name] = _read(hints[name], text, whole)
                below.pop(name, None)
    for name, further in below.items():
        held = (
            values[name]
            if name in values
            else value.get(name, {})
            if isinstance(value, Mapping)
            else getattr(value, name)
        )
        values[name] = _read_changes(held, hints[name], further, conflicts, _dotted(where, name))
    return _Changed(value, hint, where, values)


def _replace(changed: _Changed, conflicts: Conflicts) -> Any:
    """The value with its changes made in one step; where a part of it refuses its own, that part stays as it was, and
    the error is added to the conflicts."""
    value, values = changed.value, {}
    for name, new in changed.changes.items():
        with conflicts.collect():
            values[name] = _convert(new.hint, _replace(new, conflicts), new.where) if isinstance(new, _Changed) else new
    with conflicts.collect():
        value = {**value, **values} if isinstance(value, Mapping) else dataclasses.replace(value, **values)
    return value  # noqa: RET504  (unchanged if the new value was refused)


def _hint(value: Any, hint: Any, name: str, whole: str, depth: int) -> Any:
    """Annotation of a setting of a config, which must have it, or of an entry of a mapping, which may lack it yet.

    Args:
        depth: how many names of `whole` follow `name`.
    """
    if isinstance(value, Mapping):
        arguments = typing.get_args(hint)
        return arguments[1] if len(arguments) == 2 else Any
    if value is None:
        holder = ".".join(whole.split(".")[: -1 - depth])
        raise ConfigError(
            f"cannot set {whole!r}: {holder!r} is None. Set {holder!r} first, for example {holder}={{{name} = value}}."
        )
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        raise ConfigError(f"cannot set {whole!r}: {type(value).__name__} has no settings of its own.")
    names = [f.name for f in dataclasses.fields(value)]
    if name not in names:
        raise ConfigError(f"{whole!r} is not a setting: {type(value).__name__} has no {name!r}. {nearest(name, names)}")
    return typing.get_type_hints(type(value))[name]


def _read(hint: Any, text: str, where: str) -> Any:
    """What the text of a setting means for its annotation."""
    if text == "none":
        try:
            return _convert(hint, None, where)
        except ConfigError:
            return _convert(hint, text, where)  # some choices are called "none"
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    return _convert(hint, value, where)


def _dotted(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Turn a plain value into what the annotation asks for, or raise ConfigError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        reasons = []
        for option in arguments:
            if option is not type(None):
                try:
                    return _convert(option, value, where)
                except ConfigError as error:
                    reasons.append(str(error))
        raise ConfigError(reasons[0])
    if origin is typing.Literal:
        # By type as well: True == 1
        if not any(value == option and type(value) is type(option) for option in arguments):
            raise ConfigError(f"{where!r} is {value!r}; {nearest(str(value), [str(a) for a in arguments])}")
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return from_dict(hint, value, where=where)
    elif origin is tuple and isinstance(value, (list, tuple)):
        inner = arguments[0] if len(arguments) == 2 and arguments[1] is Ellipsis else None
        if inner is None and len(arguments) != len(value):
            raise ConfigError(f"{where!r} must hold {len(arguments)} values; found {len(value)}.")
        kinds = [inner] * len(value) if inner is not None else list(arguments)
        return tuple(
            _convert(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
        )
    elif origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        if isinstance(value, Mapping):
            return {key: _convert(arguments[1], item, _dotted(where, str(key))) for key, item in value.items()}
    elif hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    elif hint in (bool, str) and isinstance(value, hint):
        return value
    name = getattr(hint, "__name__", str(hint))
    raise ConfigError(f"{where!r} must be of type {name}; found {value!r} ({type(value).__name__}).")


def load_module(path: str) -> types.ModuleType | None:
    """A module by its dotted path, for what is named in a setting; None if there is none. A module that exists but
    cannot import something else raises as usual."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise
        return None
