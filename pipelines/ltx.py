"""LTX-Video: ``LTXPipeline``, text to video by one transformer on rectified flow, with T5.

Latents are packed for the network alone. The scheduler shifts its times by the size of the video, and a student keeps
the shift of the size it was trained at. Positions are told to the network in seconds, at the stock call's frame rate.
An autoencoder that is told a timestep decodes at the stock call's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import LTXPipeline
from torch import Tensor, nn

from fastgen.denoiser import Cond, Denoiser
from fastgen.family import About, Block, Family

from . import flow, stock

ABOUT = About(
    pipelines=("LTXPipeline",),
    kinds=("flow",),
    schedulers={"renoise": flow.SCHEDULER, "ddim": flow.SCHEDULER},
    lora=True,
)


def packed(x_t: Tensor) -> Tensor:
    """Latents as tokens, frame by frame and row by row: [B, C, F, H, W] -> [B, F H W, C]."""
    return x_t.flatten(2).transpose(1, 2)


def wrap(
    pipeline: LTXPipeline,
    autocast: torch.dtype | None = None,
    start: float = 1.0,
    image_size: tuple[int, int] | None = None,
    num_frames: int | None = None,
) -> Family:
    """The family of a pipeline that is already in memory. Raises ValueError if its scheduler is not understood."""
    network, device, vae = pipeline.transformer, pipeline.device, pipeline.vae
    stock.prepared(pipeline, "transformer", "vae", "text_encoder")
    factor, ratio = pipeline.vae_spatial_compression_ratio, pipeline.vae_temporal_compression_ratio
    size = image_size or (stock.own(pipeline, "height"), stock.own(pipeline, "width"))
    height, width = stock.latents_of(pipeline, 0, factor, size)
    frames, depth = stock.frames_of(pipeline, num_frames or stock.own(pipeline, "num_frames"), ratio)
    schedule = flow.schedule_of(pipeline.scheduler, flow.mu_of(pipeline.scheduler, depth * height * width))
    mean, std = (values.to(device).reshape(-1, 1, 1, 1) for values in (vae.latents_mean, vae.latents_std))
    told = torch.tensor([float(stock.own(pipeline, "decode_timestep"))], device=device)
    when = [told] if vae.config.timestep_conditioning else []
    encode, decode = stock.clip_autoencoder(vae, frames, mean, std / vae.config.scaling_factor, *when)
    scale = (ratio / stock.own(pipeline, "frame_rate"), factor, factor)

    def call(network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t: [B, C, F, H, W]; t: [B] in [0, 1]; cond: text [B, L, D], mask [B, L] -> y: [B, C, F, H, W]."""
        size = x_t.shape[2:]
        found: Tensor = network(
            hidden_states=packed(x_t),
            encoder_hidden_states=cond["text"],
            timestep=(1000 * t).float(),
            encoder_attention_mask=cond["mask"],
            num_frames=size[0],
            height=size[1],
            width=size[2],
            rope_interpolation_scale=scale,
            return_dict=False,
        )[0]
        return unpacked(found, size)

    def unpacked(tokens: Tensor, size: Sequence[int] = (depth, height, width)) -> Tensor:
        return tokens.transpose(1, 2).unflatten(2, tuple(size))

    @torch.no_grad()
    def encode_prompts(prompts: Sequence[str]) -> Cond:
        text, mask, _, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False, device=device)
        return {"text": text.float(), "mask": mask.float()}

    config: Any = network.config
    found = flow.family(
        pipeline,
        Denoiser(network, schedule, "flow", call, autocast, lambda output, x_t: stock.tokens_as_map(output, x_t, 1)),
        encode_prompts,
        encode,
        decode,
        latent_shape=(config.in_channels, depth, height, width),
        size={"height": height * factor, "width": width * factor, "num_frames": frames},
        blocks=[
            Block(
                f"transformer_blocks.{i}",
                config.num_attention_heads * config.attention_head_dim,
                min(depth * height, width),
            )
            for i in stock.some(config.num_layers)
        ],
        ask=flow.by_sigmas,
        start=start,
        unpack=unpacked,
    )
    return replace(found, global_noise=lambda x_t: unpacked(torch.randn(packed(x_t).shape, device=x_t.device)))


load = stock.loader(wrap)
