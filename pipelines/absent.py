"""Pipelines opened without some of their parts, which stay out of memory until they are asked for.

In a part's place stands a shell: of its class and config, with weights that take no memory. What a family reads of a
part when it wraps a pipeline is there, and what it computes with it is a ValueError.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import safe_open
from torch import nn

from fastgen import sharding
from fastgen.data.cached import kind_of


class Pipeline:
    """A stock pipeline with shells.

    Attributes:
        pipeline: of its own class.
    """

    def __init__(
        self, path: str | Path, device: torch.device | str, without: Sequence[str], given: dict[str, Any]
    ) -> None:
        """without: kinds; given: further arguments of ``from_pretrained``.

        "blocks" is what a network repeats, which is read when it has been split over processes; a network whose files
        have other names for its weights is loaded.
        """
        self._folder, self._device, self._shells = folder_of(path), torch.device(device), dict[str, nn.Module]()
        for name, entry in DiffusionPipeline.load_config(self._folder).items():
            if name not in given and isinstance(entry, list) and kind_of(name) in without:
                cls = getattr(importlib.import_module(entry[0]), entry[1]) if entry[0] in LIBRARIES else None
                if isinstance(cls, type) and issubclass(cls, nn.Module):
                    self._shells[name] = shell(cls, self._folder / name, self._device)
        outlines = self._outlines() if "blocks" in without else {}
        parts = {**given, **self._shells, **outlines}
        self.pipeline = DiffusionPipeline.from_pretrained(
            self._folder, dtype=torch.float32, use_safetensors=True, **parts
        )
        for name, part in self.pipeline.components.items():
            if name in outlines:
                sharding.move(part, self._device)
            elif isinstance(part, nn.Module):
                part.to(self._device)

    def _outlines(self) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {}
        for name in NETWORKS:
            entry = DiffusionPipeline.load_config(self._folder).get(name)
            if isinstance(entry, list) and entry[0] == "diffusers" and name not in self._shells:
                cls: Any = getattr(importlib.import_module(entry[0]), entry[1])
                with init_empty_weights():
                    made = cls.from_config(cls.load_config(self._folder / name))
                if sharding.outlined(made, self._folder / name, self._device):
                    _read_buffers(made, self._folder / name, self._device)
                    found[name] = made.eval()
        return found

    def fill(self) -> None:
        """Load what was left out, one part after the other, into the shells, whoever holds them."""
        while self._shells:
            name, part = self._shells.popitem()
            cls: Any = type(part).__mro__[1]
            real = cls.from_pretrained(self._folder / name, dtype=torch.float32, use_safetensors=True)
            real = real.to(self._device)
            real.requires_grad_(False).eval()
            part.__class__ = cls
            vars(part).clear()
            vars(part).update(vars(real))


NETWORKS = ("unet", "transformer", "transformer_2")
"""What pipelines call the networks that denoise."""
LIBRARIES = ("diffusers", "transformers")
"""Whose parts may be left out; others are loaded."""


def folder_of(path: str | Path) -> Path:
    """A pipeline's folder; of a Hub id, the one that it is downloaded to."""
    return Path(path) if Path(path).is_dir() else Path(DiffusionPipeline.download(path))


def shell(cls: Any, folder: Path, device: torch.device) -> nn.Module:
    """A model of this class and the config in ``folder``, without weights; it says that it is on ``device``."""
    if issubclass(cls, ModelMixin):
        with init_empty_weights():
            made = cls.from_config(cls.load_config(folder))
    else:
        config = cls.config_class.from_pretrained(folder)
        with torch.device("meta"):
            made = cls(config)

    _read_buffers(made, folder, device)

    def refuse(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            f"{folder}: was left out of memory, as data.source cached does; data.decoder: true keeps a VAE, and what "
            "prompts are used must be in the cache"
        )

    if kind_of(folder.name) == "network":  # of which families look whether weights are zero
        for module in made.modules():
            for name, value in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.zeros(()).expand(value.shape), requires_grad=False))
    own = dict.fromkeys(("forward", "encode", "decode"), refuse)
    itself = {"to": lambda self, *args, **kwargs: self, "device": property(lambda self: device)}
    made.__class__ = type(cls.__name__, (cls,), {"__module__": cls.__module__, **own, **itself})
    return made


def _read_buffers(made: nn.Module, folder: Path, device: torch.device) -> None:
    """Load what is no weight but part of a model, such as its latents' mean, which families keep when they wrap it."""
    stored: dict[str, torch.Tensor] = {}
    names = dict(made.named_buffers()).keys()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            stored |= {name: opened.get_tensor(name) for name in names & set(opened.keys())}
    for prefix, module in made.named_modules():
        for name, value in module.named_buffers(recurse=False):
            found = stored.get(f"{prefix}.{name}" if prefix else name, value)
            if not found.is_meta:
                setattr(module, name, found.to(device, value.dtype))
