"""The conditional U-Net of Stable Diffusion and SDXL as a student: copies, guidance as an input, several in one.

A student has a guidance embedding (``time_cond_proj_dim``), which makes the stock pipelines skip classifier-free
guidance whatever ``guidance_scale`` says. The embedding is zero, so that the scale does nothing, or learnt, so that it
does what guidance by it would.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from fastgen import sharding
from fastgen.denoiser import Call, Cond, Denoiser
from fastgen.experts import Experts
from fastgen.family import Block, Family
from fastgen.sampling import Sampler
from fastgen.students import Students
from fastgen.transfer import to_device

from . import stock, vp
from .experts import UNetExperts
from .students import UNetStudents

GUIDANCE_EMBEDDING = 32
"""Width of the guidance embedding. Where its projection is zero it only tells the pipeline to skip guidance."""


def embedded(network: nn.Module, cond: Cond) -> Tensor | None:
    """The guidance scale of ``cond`` as the U-Net takes it: [B, width]; None if there is none."""
    config: Any = network.config
    return guidance_embedding(cond["guidance"], config.time_cond_proj_dim) if "guidance" in cond else None


def guidance_embedding(scale: Tensor, width: int) -> Tensor:
    """What the stock pipelines make of guidance_scale: [B] -> [B, width]: sinusoids of 1000 (scale - 1)."""
    half = width // 2
    # in float32 step by step as they do, since a phase of thousands shows the last bit
    rates = torch.exp(torch.arange(half, dtype=torch.float32) * -(torch.tensor(10000.0).log() / (half - 1)))
    phase = (1000 * (scale.double() - 1).float())[:, None] * to_device(rates, scale.device)
    return nn.functional.pad(torch.cat([phase.sin(), phase.cos()], 1), (0, width % 2))


def one_unet(network: nn.Module) -> nn.Module:
    """What a pipeline has as its U-Net: experts or students in one component, where there is more than one."""
    if isinstance(network, Students):
        return UNetStudents.of(list(network), network.router.axes, network.router.cuts)
    if not isinstance(network, Experts):
        return network
    return UNetExperts.of(list(network), network.starts) if len(network) > 1 else network[0]


def takes_guidance(unet: UNet2DConditionModel) -> bool:
    """Whether what it gives depends on the guidance scale: students have the input, too, but with weights of 0."""
    return unet.config.time_cond_proj_dim is not None and bool(unet.time_embedding.cond_proj.weight.any())


@torch.no_grad()
def fix_guidance(unet: UNet2DConditionModel, scale: float) -> None:
    """Let a U-Net that takes the guidance scale as an input always do what it does at this one.

    The input's projection is added to what the first layer of the time embedding reads, so at one scale it is a
    constant that goes into that layer's bias.
    """
    embedding = unet.time_embedding
    given = guidance_embedding(torch.tensor([scale], device=unet.device), unet.config.time_cond_proj_dim)
    embedding.linear_1.bias += nn.functional.linear(embedding.cond_proj(given), embedding.linear_1.weight)[0]
    nn.init.zeros_(embedding.cond_proj.weight)


def student(unet: UNet2DConditionModel, embed_guidance: bool = False) -> UNet2DConditionModel:
    """A trainable copy whose guidance embedding is zero, frozen or to be learnt, even where the teacher's is not."""
    if unet.config.time_cond_proj_dim is not None:
        result = copy.deepcopy(unet)
    elif sharding.is_outlined(unet):
        with init_empty_weights():
            result = UNet2DConditionModel.from_config(unet.config, time_cond_proj_dim=GUIDANCE_EMBEDDING)
        [missing] = sharding.copy_outline(result, unet)
        weight = result.get_parameter(missing)
        result.time_embedding.cond_proj.weight = nn.Parameter(torch.zeros_like(weight, device=unet.device))
    else:
        # an override: what the teacher's config left at its default, from_config would take for unset
        made = UNet2DConditionModel.from_config(unet.config, time_cond_proj_dim=GUIDANCE_EMBEDDING)
        result = made.to(unet.device, unet.dtype)
        missing, unexpected = result.load_state_dict(unet.state_dict(), strict=False)
        if missing != ["time_embedding.cond_proj.weight"] or unexpected:
            raise ValueError(
                f"the student's U-Net does not match the teacher's: missing {missing}, extra {unexpected}"
            )
    result.requires_grad_(True)
    projection = result.time_embedding.cond_proj
    nn.init.zeros_(projection.weight)
    projection.requires_grad_(embed_guidance)
    return result


def blocks(unet: UNet2DConditionModel, size: int) -> list[Block]:
    """The down blocks and the middle: DMD2's discriminator reads the encoder."""
    found = []
    channels = unet.config.block_out_channels
    for i, c in enumerate(channels):
        size = size if i == len(channels) - 1 else (size + 1) // 2
        found.append(Block(f"down_blocks.{i}", c, size))
    return [*found, Block("mid_block", channels[-1], size)]


def family(
    pipeline: Any,
    call: Call,
    encode_prompts: Callable[[Sequence[str]], Cond],
    uncond: Callable[[], Cond],
    autocast: torch.dtype | None,
    start: float,
    image_size: tuple[int, int] | None,
    **settings: Any,
) -> Family:
    """The family of a pipeline round such a U-Net, whose conditions are its own. settings: of pipelines made of it.

    Raises ValueError if its scheduler is not understood.
    """
    schedule, kind = vp.schedule_of(pipeline.scheduler), vp.kind_of(pipeline.scheduler)
    network, factor = pipeline.unet, pipeline.vae_scale_factor
    height, width = stock.latents_of(network, network.config.sample_size, factor, image_size)
    encode, decode = stock.autoencoder(pipeline.vae)

    def with_network(made: nn.Module, num_steps: int | None, sampler: Sampler = "renoise") -> Any:
        parts = {"unet": one_unet(made), **settings}
        if num_steps is not None:
            parts["scheduler"] = vp.student_scheduler(pipeline.scheduler, num_steps, sampler, start)
        return stock.rebuilt(pipeline, **parts)

    return Family(
        denoiser=Denoiser(network, schedule, kind, call, autocast),
        latent_shape=(network.config.in_channels, height, width),
        encode_prompts=encode_prompts,
        uncond=uncond,
        encode=encode,
        decode=decode,
        student=lambda embed_guidance=False: student(network, embed_guidance),
        student_times=lambda n: vp.times(vp.student_scheduler(pipeline.scheduler, n, start=start), n),
        blocks=blocks(network, min(height, width)),
        pipeline=with_network,
        image_size=(height * factor, width * factor),
        run=stock.caller(height=height * factor, width=width * factor),
        unguided=None,
        stock_guidance=inspect.signature(type(pipeline).__call__).parameters["guidance_scale"].default,
        fix_guidance=(lambda scale: fix_guidance(network, scale)) if takes_guidance(network) else None,
        component="unet",
        routed_by="text",
    )
