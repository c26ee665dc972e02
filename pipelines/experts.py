"""A U-Net of several experts, each called at its own timesteps, for a stock pipeline to call as its one U-Net.

This file is saved beside the weights, so that Diffusers opens such a pipeline without fastgen, by
``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)``. So it imports nothing but torch and Diffusers.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


class UNetExperts(UNet2DConditionModel):
    """U-Nets of one shape; expert k is called from timestep ``starts[k]`` down to just above ``starts[k + 1]``.

    The first also takes all noisier ones. Diffusers' WanPipeline switches its two transformers so.
    """

    __module__ = "fastgen_experts"  # in model_index.json, and the name of this file beside the weights

    @register_to_config
    def __init__(self, unet: dict[str, Any], starts: Sequence[float]) -> None:
        """unet: the config of each; starts: falling timesteps, one for each."""
        ModelMixin.__init__(self)  # the parent's own would build a U-Net besides
        self.experts = nn.ModuleList(UNet2DConditionModel.from_config(unet) for _ in starts)
        self.starts = list(starts)

    @classmethod
    def of(cls, unets: Sequence[UNet2DConditionModel], starts: Sequence[float]) -> UNetExperts:
        """Around U-Nets that are there already."""
        config = {key: value for key, value in unets[0].config.items() if not key.startswith("_")}
        with torch.device("meta"):  # in the place of these
            made = cls(unet=config, starts=list(starts))
        made.experts = nn.ModuleList(unets)
        return made.eval()

    @property
    def config(self) -> Any:
        """That of the U-Nets, where pipelines look up their sizes."""
        expert: Any = self.experts[0]
        return expert.config

    @property
    def add_embedding(self) -> Any:
        """That of the first U-Net, where SDXL's pipeline looks up a width."""
        expert: Any = self.experts[0]
        return expert.add_embedding

    def forward(self, sample: torch.Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        """What the expert of this timestep gives, which is one for the whole batch. Raises ValueError if it is not."""
        t = torch.as_tensor(timestep).flatten().tolist()
        chosen = {sum(value <= start for start in self.starts[1:]) for value in t}
        if len(chosen) != 1:
            raise ValueError(f"timesteps {t} are of several experts, which start at {self.starts}; call each alone")
        return self.experts[chosen.pop()](sample, timestep, *args, **kwargs)

    @functools.wraps(UNet2DConditionModel.save_pretrained)
    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As any model, with this file beside it."""
        super().save_pretrained(save_directory, *args, **kwargs)
        shutil.copyfile(__file__, Path(save_directory) / f"{self.__module__}.py")
