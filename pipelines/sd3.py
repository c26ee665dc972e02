"""Stable Diffusion 3 and 3.5: ``StableDiffusion3Pipeline``, an MM-DiT on rectified flow with three text encoders.

The pipeline asks its scheduler for a number of steps, so a student's scheduler yields its times for its own number
alone; noise between its steps comes from torch's global generator. It is called at guidance_scale 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from fastgen.denoiser import Cond, Denoiser
from fastgen.family import About, Block, Family

from . import flow, stock

ABOUT = About(
    pipelines=("StableDiffusion3Pipeline",),
    kinds=("flow",),
    schedulers={"renoise": flow.SCHEDULER, "ddim": flow.SCHEDULER},
    lora=True,
)


def call(network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """x_t: [B, C, H, W]; t: [B] in [0, 1]; cond: text [B, L, D], pooled [B, P] -> y: [B, C, H, W]."""
    found: Tensor = network(
        hidden_states=x_t,
        timestep=(1000 * t).float(),
        encoder_hidden_states=cond["text"],
        pooled_projections=cond["pooled"],
        return_dict=False,
    )[0]
    return found


def wrap(
    pipeline: StableDiffusion3Pipeline,
    autocast: torch.dtype | None = None,
    start: float = 1.0,
    image_size: tuple[int, int] | None = None,
) -> Family:
    """The family of a pipeline that is already in memory. Raises ValueError if its scheduler is not understood."""
    schedule = flow.schedule_of(pipeline.scheduler)
    network, device, factor = pipeline.transformer, pipeline.device, pipeline.vae_scale_factor
    stock.prepared(pipeline, "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    height, width = stock.latents_of(network, network.config.sample_size, factor, image_size)
    encode, decode = stock.autoencoder(pipeline.vae)
    patch = network.config.patch_size

    @torch.no_grad()
    def encode_prompts(prompts: Sequence[str]) -> Cond:
        text, _, pooled, _ = pipeline.encode_prompt(
            list(prompts), None, None, device=device, do_classifier_free_guidance=False
        )
        return {"text": text.float(), "pooled": pooled.float()}

    def read(output: Any, x_t: Tensor) -> Tensor:
        return stock.tokens_as_map(output[1], x_t, patch)  # (text, image)

    return flow.family(
        pipeline,
        Denoiser(network, schedule, "flow", call, autocast, read),
        encode_prompts,
        encode,
        decode,
        latent_shape=(network.config.in_channels, height, width),
        size={"height": height * factor, "width": width * factor},
        blocks=[
            Block(f"transformer_blocks.{i}", network.inner_dim, min(height, width) // patch)
            for i in stock.some(network.config.num_layers - 1)  # the last one gives no text, and is close to pixels
        ],
        ask=flow.by_number,
        start=start,
    )


load = stock.loader(wrap)
