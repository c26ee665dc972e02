"""Several students with a router in one component, for a stock pipeline to call as its one network.

Each row of a batch goes to the student of its own condition. This file is saved beside the weights, so that Diffusers
opens such a pipeline without fastgen, by ``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)``. So it
imports nothing but torch and Diffusers.
"""

from __future__ import annotations

import functools
import inspect
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


def which(condition: torch.Tensor, axes: torch.Tensor, cuts: torch.Tensor) -> torch.Tensor:
    """The student of each row, by a search whose every comparison has its own axis -> [B].

    condition: text [B, L, D], of which the mean over the tokens counts, or numbers of classes [B]; axes: [K - 1, D];
    cuts: [K - 1], each between the students up to its number and those after.
    """
    points = condition.float().mean(1) if condition.ndim == 3 else condition.float()[:, None]
    axes, cuts = axes.to(points.device), cuts.to(points.device)
    above = (points[:, None] * axes).sum(2) > cuts
    low = torch.zeros(len(points), dtype=torch.long, device=points.device)
    high = torch.full_like(low, len(cuts))
    for _ in range(len(cuts).bit_length()):
        middle = (low + high) // 2
        up = above.gather(1, middle.clamp(max=len(cuts) - 1)[:, None])[:, 0] & (low < high)
        low, high = torch.where(up, middle + 1, low), torch.where(up, high, middle)
    return low


def of_rows(value: Any, rows: torch.Tensor, count: int) -> Any:
    """An argument of a call for these rows of its batch of ``count``; what has no such rows as it is."""
    if isinstance(value, torch.Tensor):
        return value[rows.to(value.device)] if value.ndim and len(value) == count else value
    if isinstance(value, dict):
        return {name: of_rows(part, rows, count) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(of_rows(part, rows, count) for part in value)
    return value


class Students:
    """What is the same for each class of network; it stands before that class among the bases.

    Attributes:
        kind: the class.
        condition: the argument of its call by which rows are routed.
    """

    kind: Any
    condition: str

    @register_to_config
    def __init__(self, network: dict[str, Any], axes: Sequence[Sequence[float]], cuts: Sequence[float]) -> None:
        """network: the config of each; axes, cuts: of the router, as ``which`` takes them."""
        model: Any = self
        ModelMixin.__init__(model)  # the class's own would build a network besides
        self.students = nn.ModuleList(self.kind.from_config(network) for _ in range(len(cuts) + 1))
        # no buffers, and not of the default dtype, so that the router is float32 whatever the weights are
        self.axes, self.cuts = (torch.tensor(x, dtype=torch.float32, device="cpu") for x in (axes, cuts))

    @classmethod
    def of(cls, networks: Sequence[nn.Module], axes: torch.Tensor, cuts: torch.Tensor) -> Any:
        """Around networks that are there already."""
        first: Any = networks[0]
        config = {key: value for key, value in first.config.items() if not key.startswith("_")}
        with torch.device("meta"):  # in the place of these
            made: Any = cls(network=config, axes=axes.tolist(), cuts=cuts.tolist())
        made.students = nn.ModuleList(networks)
        return made.eval()

    @property
    def config(self) -> Any:
        """That of the networks, where pipelines look up their sizes."""
        student: Any = self.students[0]
        return student.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What each row's student gives for it, in the order of the batch; no other student is called."""
        given = inspect.signature(self.kind.forward).bind(self, *args, **kwargs).arguments
        del given["self"]
        return_dict = given.pop("return_dict", True)
        found = which(given[self.condition], self.axes, self.cuts)
        parts, places = [], []
        for k in found.unique().tolist():
            rows = (found == k).nonzero()[:, 0]
            some = {name: of_rows(value, rows, len(found)) for name, value in given.items()}
            parts.append(self.students[k](**some))
            places.append(rows)
        sample = torch.cat([part.sample for part in parts])[torch.cat(places).argsort()]
        return type(parts[0])(sample=sample) if return_dict else (sample,)

    @functools.wraps(ModelMixin.save_pretrained)
    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As any model, with this file beside it."""
        self.kind.save_pretrained(self, save_directory, *args, **kwargs)
        shutil.copyfile(__file__, Path(save_directory) / f"{self.__module__}.py")


class UNetStudents(Students, UNet2DConditionModel):
    """U-Nets of one shape, routed by the prompt's embedding."""

    __module__ = "fastgen_students"  # in model_index.json, and the name of this file beside the weights
    kind, condition = UNet2DConditionModel, "encoder_hidden_states"

    @property
    def add_embedding(self) -> Any:
        """That of the first U-Net, where SDXL's pipeline looks up a width."""
        student: Any = self.students[0]
        return student.add_embedding


class DiTStudents(Students, DiTTransformer2DModel):
    """Transformers of one shape, routed by the class's number."""

    __module__ = "fastgen_students"
    kind, condition = DiTTransformer2DModel, "class_labels"
