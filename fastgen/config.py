"""YAML into frozen, typed dataclasses. Whatever is unknown, mistyped or out of range is an error that names its place.

A config file may name others under ``base:`` (paths relative to it); later ones win, mappings merge key by key.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from .plain import from_yaml, hidden, shown

T = TypeVar("T")
Tree = dict[str, Any]


class ConfigError(ValueError):
    """A config that cannot be used; the message names file, key, value and a remedy."""


@dataclass(frozen=True)
class _Limits:
    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def broken_by(self, value: float) -> str | None:
        for bound, bad, words in (
            (self.low, value < self.low, "at least"),
            (self.high, value > self.high, "at most"),
            (self.above, value <= self.above, "above"),
            (self.below, value >= self.below, "below"),
        ):
            if bad and math.isfinite(bound):
                return f"must be {words} {bound:g}"
        return None


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> Any:
    """A config field with its meaning and limits. Lists and mappings are copied for each instance."""
    metadata = {"help": help, "limits": _Limits(low, high, above, below)}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(default: Any, help: str = "") -> Any:
    """A config field that is a dataclass of its own; what a config does not name is taken from ``default``."""
    return field(default_factory=lambda: default, metadata={"help": help})


def read(path: str | Path, seen: tuple[Path, ...] = ()) -> Tree:
    """Load a YAML file and the files under its ``base:``, merged. Raises ConfigError."""
    path = Path(path)
    if path.resolve() in seen:
        raise ConfigError(f"{path}: base files include each other: {' -> '.join(p.name for p in seen)}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file; `fastgen list configs` shows the ones shipped") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        tree = from_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping of sections, got {type(tree).__name__}")
    bases = tree.pop("base", [])
    if isinstance(bases, str):
        bases = [bases]
    if not isinstance(bases, list) or not all(isinstance(b, str) and "\0" not in b for b in bases):
        raise ConfigError(f"{path}: base must be a list of paths, got {shown(bases)}")
    check_secrets(tree, str(path))
    merged: Tree = {}
    for base in bases:
        merged = merge(merged, read(path.parent / base, (*seen, path.resolve())))
    return merge(merged, tree)


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """``over`` on top of ``under``, mapping by mapping; any other value is replaced."""
    result = dict(under)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def override(tree: Tree, assignments: Sequence[str]) -> Tree:
    """Apply ``a.b=value`` assignments, values read as YAML. Raises ConfigError if one is not of that form."""
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"override {text!r} is not of the form key.key=value")
        try:
            patch: Any = from_yaml(value)
        except ValueError as error:
            raise ConfigError(f"override {text!r}: {value!r} {str(error).removeprefix('line 1 ')}") from None
        check_secrets(patch, "override", key)
        for part in reversed(key.split(".")):
            patch = {part: patch}
        tree = merge(tree, patch)
    return tree


def check_secrets(tree: Any, where: str, key: str = "") -> None:
    """Raise ConfigError, naming the key and not the value, if a text in a tree has a token or a login in it.

    A run's config is copied into its folder, report and model card.
    """
    if isinstance(tree, str) and hidden(tree) != tree:
        raise ConfigError(
            f"{where}: {key} holds a token or a login, which would be copied with the config; leave it out and log in "
            "by the environment, as HF_TOKEN"
        )
    inner = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    for name, value in inner:
        check_secrets(value, where, _join(key, str(name)))


def decode(cls: type[T], tree: Any, where: str, key: str = "", defaults: T | None = None) -> T:
    """A dataclass from a mapping. ``where`` and ``key`` say where it stands, for messages. Raises ConfigError.

    defaults: what the mapping does not name is taken from here; None: from the class.
    """
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where}: {key or 'the config'} must be a mapping, got {shown(tree)}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for name in tree:
        if name not in fields:
            raise ConfigError(f"{where}: unknown key {_join(key, str(name))!r}{suggest(str(name), fields)}")
    values = {}
    for name, f in fields.items():
        full = _join(key, name)
        if name in tree:
            hint, own = hints[name], f.default_factory
            if dataclasses.is_dataclass(hint) and own is not MISSING:  # a section: its own defaults, not its class's
                values[name] = decode(typing.cast(type, hint), tree[name], where, full, own())
            else:
                values[name] = _value(hint, tree[name], where, full)
            _check_limits(f.metadata.get("limits"), values[name], where, full)
        elif defaults is not None:
            values[name] = getattr(defaults, name)
        elif f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"{where}: {full} is missing; {f.metadata.get('help') or 'it has no default'}")
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {key or 'the config'}: {error}") from None


def encode(value: Any) -> Any:
    """The plain tree that ``decode`` reads back to an equal value."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {k: encode(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [encode(v) for v in value]
    return value


def suggest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """``; did you mean 'x'?``, or the list of what is known."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known)) or 'none'}"


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _check_limits(limits: _Limits | None, value: Any, where: str, key: str) -> None:
    for number in value if isinstance(value, list | tuple) else [value]:
        if limits and isinstance(number, int | float) and not isinstance(number, bool):
            broken = limits.broken_by(number)
            if broken:
                raise ConfigError(f"{where}: {key} {broken}, got {shown(number)}")


def _value(hint: Any, value: Any, where: str, key: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return decode(typing.cast(type, hint), value, where, key)
    if origin is Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
        raise ConfigError(f"{where}: {key} is {value!r}{suggest(str(value), [str(a) for a in args])}")
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        errors = []
        for arm in (a for a in args if a is not type(None)):
            try:
                return _value(arm, value, where, key)
            except ConfigError as error:
                errors.append(error)
        raise errors[0]
    if origin in (list, Sequence, typing.Sequence, tuple) or hint is list:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise ConfigError(f"{where}: {key} must be a list, got {shown(value)}")
        if origin is tuple and args and args[-1] is not Ellipsis:
            if len(value) != len(args):
                raise ConfigError(f"{where}: {key} must hold {len(args)} values, got {len(value)}")
            return tuple(_value(a, v, where, f"{key}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
        items = [_value(args[0] if args else Any, v, where, f"{key}[{i}]") for i, v in enumerate(value)]
        return tuple(items) if origin is tuple else items
    if origin in (dict, Mapping) or hint is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: {key} must be a mapping, got {shown(value)}")
        arm = args[1] if args else Any
        return {str(k): _value(arm, v, where, _join(key, str(k))) for k, v in value.items()}
    return _scalar(hint, value, where, key)


def _scalar(hint: type, value: Any, where: str, key: str) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        return value
    if hint is float and not isinstance(value, bool):
        # PyYAML reads 1e-5, without a dot, as a string
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    if hint is str and isinstance(value, str) and "\0" not in value:
        return value
    names = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        names[int] = "a whole number of 64 bits"
    if hint is str and isinstance(value, str):
        names[str] = "text without NUL"
    raise ConfigError(f"{where}: {key} must be {names.get(hint, hint.__name__)}, got {shown(value)}")
