"""DDPM in pixel space: ``UNet2DModel`` without conditions, or with classes by number; its latents are the pixels.

``DDPMPipeline`` and ``DDIMPipeline`` take no condition and ignore prompts. A U-Net with classes is only called by
``ConsistencyModelPipeline``, which runs any scheduler of this sort: so its students are that, and a teacher that was
saved as one of the others is saved as that again. These calls have no guidance, and classes no null class. They make
one size only, and may clip each step's x0 to [-1, 1], as their schedulers say, which our samplers do not; an image is
clamped at the end.

Students leave with an LCM scheduler, or DDIM's where they keep their noise. ``DDIMPipeline`` makes a DDIMScheduler of
any scheduler, so a student of one that renoises leaves as a ``DDPMPipeline``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from diffusers import ConsistencyModelPipeline, DDIMPipeline, DDPMPipeline
from torch import Tensor, nn

from fastgen import calls
from fastgen.denoiser import Cond, Denoiser
from fastgen.family import About, Family
from fastgen.sampling import Sampler

from . import stock, unet, vp

ABOUT = About(
    pipelines=("DDPMPipeline", "DDIMPipeline", "ConsistencyModelPipeline"),
    kinds=("eps", "v", "x0"),
    schedulers={"renoise": "LCMScheduler", "ddim": "DDIMScheduler"},
    lora=False,
)
DDPM: TypeAlias = DDPMPipeline | DDIMPipeline | ConsistencyModelPipeline


def call(network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """x_t: [B, 3, H, W]; t: [B] timesteps; cond: perhaps label [B], integers -> y: [B, 3, H, W]."""
    found: Tensor = network(x_t, t.float(), class_labels=cond.get("label"), return_dict=False)[0]
    return found


def wrap(
    pipeline: DDPM,
    autocast: torch.dtype | None = None,
    start: float = 1.0,
    image_size: tuple[int, int] | None = None,
) -> Family:
    """The family of a pipeline that is already in memory.

    Raises ValueError if its scheduler is not understood, or its U-Net is not one that these pipelines can run.
    """
    schedule, kind = vp.schedule_of(pipeline.scheduler), vp.kind_of(pipeline.scheduler)
    network, device = pipeline.unet, pipeline.device
    check(network)
    side, labelled = network.config.sample_size, calls.count(pipeline) > 0
    own = (side, side) if isinstance(side, int) else (side[0], side[1])
    height, width = stock.fixed_size(pipeline, image_size, own)
    stock.prepared(pipeline, "unet")

    def encode_prompts(prompts: Sequence[str]) -> Cond:
        return {"label": torch.tensor(calls.labels(pipeline, prompts), device=device)} if labelled else {}

    def with_network(made: nn.Module, num_steps: int | None, sampler: Sampler = "renoise") -> DDPM:
        kept = num_steps is None or sampler == "ddim"
        unlabelled = type(pipeline) if kept else DDPMPipeline
        scheduler = pipeline.scheduler
        if num_steps is not None:
            scheduler = vp.plain_student_scheduler(scheduler, num_steps, sampler, start)
        result = (ConsistencyModelPipeline if labelled else unlabelled)(unet=made, scheduler=scheduler)
        result.set_progress_bar_config(disable=True)
        return result

    return Family(
        denoiser=Denoiser(network, schedule, kind, call, autocast),
        latent_shape=(network.config.in_channels, height, width),
        encode_prompts=encode_prompts,
        uncond=dict,
        encode=lambda pixels: pixels.to(device),
        decode=lambda latents: latents,
        student=lambda embed_guidance=False: copy.deepcopy(network).requires_grad_(True),
        student_times=lambda n: vp.times(vp.student_scheduler(pipeline.scheduler, n, start=start), n),
        blocks=[b for b in unet.blocks(network, min(height, width)) if network.mid_block or b.name != "mid_block"],
        pipeline=with_network,
        image_size=(height, width),
        run=stock.caller_for_images(with_network(network, None)),
        unguided=None,
    )


def check(network: nn.Module) -> None:
    """Raise ValueError if no stock pipeline runs this U-Net, or no method could."""
    config: Any = network.config
    side, channels = config.sample_size, (config.in_channels, config.out_channels)
    if channels != (3, 3):
        raise ValueError(f"a U-Net of {channels[0]} channels in and {channels[1]} out; this family takes 3 and 3")
    if config.time_embedding_type == "learned":
        raise ValueError("a U-Net with a table of timesteps is none between them; time_embedding_type must be another")
    if config.class_embed_type is not None:
        raise ValueError(
            f"no stock pipeline runs a U-Net of class_embed_type {config.class_embed_type!r}; use num_class_embeds"
        )
    if side is None or (config.num_class_embeds and not isinstance(side, int)):
        raise ValueError(f"no stock pipeline runs this U-Net at its sample_size {side}; a number of pixels would do")


load = stock.loader(wrap)
