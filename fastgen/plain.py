"""Text that others wrote -> plain values: JSON and YAML, read so that whatever is wrong with it is a ValueError."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml

DEPTH = 100
"""How deep YAML may be nested, aliases written out."""
VALUES = 100_000
"""How many values YAML may hold, aliases written out: a few lines of them can stand for billions."""
SECRET = re.compile(r"\b(?:hf_|sk-|ghp_)\w{16,}")
"""What tokens look like."""
_LOGIN = re.compile(r"(\w{2,}:/+)[^/\s@]+@")  # a Path has one slash of them
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def from_json(text: str, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """What JSON says. parse_constant: what NaN, Infinity and -Infinity are read as; None: as floats.

    Raises ValueError, also where it is nested too deeply for Python, escapes half a character, or has a whole number
    that no float could be made of.
    """
    try:
        value = json.loads(text, parse_constant=parse_constant, parse_int=_integer)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if _HALF.search(text):
        _whole(json.dumps(value, ensure_ascii=False))
    return value


def _integer(digits: str) -> int:
    if len(digits) > 300:
        raise ValueError(f"{digits[:20]}... is a number of {len(digits)} digits")
    return int(digits)


def from_yaml(text: str) -> Any:
    """What YAML of plain values says. Raises ValueError, saying the line where that is known.

    Also if a key stands twice, an alias within what it names, or if aliases unfold to too much.
    """
    try:
        value = _Loader(text).get_single_data()
        _unfolded(value, {})
        return value
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1} " if mark else ""
        raise ValueError(f"{line}is not valid YAML: {getattr(error, 'problem', None) or error}") from None
    except RecursionError:
        raise ValueError("is not valid YAML: it is nested too deeply") from None
    except ValueError as error:  # of Python's own dates and numbers, and ours
        raise ValueError(f"is not valid YAML: {error}") from None


class _Loader(yaml.SafeLoader):
    """PyYAML's own, to which ``_once`` is added."""


def _once(loader: _Loader, node: yaml.Node) -> Iterator[Any]:
    """A mapping, made as PyYAML makes it, none of whose keys stands there twice."""
    seen = set()
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
        if name in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
        seen.add(name)
    yield from loader.construct_yaml_map(node)


_Loader.add_constructor("tag:yaml.org,2002:map", _once)


def _unfolded(value: Any, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """How many values there are in a value, itself among them, and how deep they lie. Raises ValueError.

    known: of containers seen before, by ``id``; 0, 0 while one is gone through.
    """
    if isinstance(value, str):
        _whole(value)
    if not isinstance(value, dict | list | tuple | set):
        return 1, 1
    if id(value) not in known:
        known[id(value)] = 0, 0
        inner = [*value, *value.values()] if isinstance(value, dict) else [*value]
        found = [_unfolded(part, known) for part in inner]
        known[id(value)] = 1 + sum(count for count, _ in found), 1 + max((depth for _, depth in found), default=0)
    count, depth = known[id(value)]
    if not count:
        raise ValueError("an alias stands within what it names")
    if depth > DEPTH:
        raise ValueError(f"it is nested {depth} deep, more than {DEPTH}")
    if count > VALUES:
        raise ValueError(f"its aliases unfold to {count} values, more than {VALUES}")
    return count, depth


def hidden(text: str) -> str:
    """Text without tokens, logins in addresses, and what the environment keeps under names of secrets."""
    for name, value in os.environ.items():
        if re.search("(TOKEN|SECRET|PASSWORD|_KEY)$", name.upper()) and len(value) >= 8:
            text = text.replace(value, "(left out)")
    return _LOGIN.sub(r"\1", SECRET.sub("(left out)", text))


def shown(value: Any) -> str:
    """A value as a message has it, cut if it is long."""
    try:
        text = repr(value)
    except ValueError:  # a number of more digits than Python prints
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _whole(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{text[error.start : error.end]!a} is half a character") from None
