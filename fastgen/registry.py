"""The doors for extension: methods, families, metrics and data sources are modules found by name."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from types import ModuleType

from .config import suggest

ROOMS = {
    "method": ("fastgen.trainers", "Method"),
    "family": ("fastgen.pipelines", "load"),
    "metric": ("fastgen.evaluation", "Metric"),
    "source": ("fastgen.data", "open"),
}
"""Kind -> (package, the attribute that makes one of its modules such a kind)."""


def names(kind: str) -> list[str]:
    """The names of all modules of a kind, sorted."""
    package, attribute = ROOMS[kind]
    found = []
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if attribute in vars(importlib.import_module(f"{package}.{info.name}")):
            found.append(info.name)
    return sorted(found)


def find(kind: str, name: str) -> ModuleType:
    """The module of a kind by its name, or by a dotted path to one elsewhere. Raises ValueError."""
    package, attribute = ROOMS[kind]
    path = name if "." in name else f"{package}.{name}"
    spec = None
    if all(part.isidentifier() for part in name.split(".")):
        try:
            spec = importlib.util.find_spec(path)
        except (ModuleNotFoundError, ValueError):
            pass
    module = importlib.import_module(path) if spec else None
    if module is None or attribute not in vars(module):
        raise ValueError(f"unknown {kind} {name!r}{suggest(name, names(kind))}")
    return module


def name_of(module: ModuleType) -> str:
    """What a config calls a module."""
    return module.__name__.rpartition(".")[2] if module.__name__.startswith("fastgen.") else module.__name__


def summary(module: ModuleType) -> str:
    """The first line of a module's docstring."""
    return (module.__doc__ or "").strip().split("\n")[0]
