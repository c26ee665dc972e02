"""fastgen: few-step distillation of diffusion pipelines. ``fastgen.load(path)`` opens a distilled one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .export import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from .export import load

        return load
    raise AttributeError(f"module 'fastgen' has no attribute {name!r}")
