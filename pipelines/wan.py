"""Wan 2.1 and 2.2: ``WanPipeline``, text to video by a transformer, or two of them, on rectified flow.

Wan 2.2 has two experts, ``transformer`` and ``transformer_2``, switched at ``boundary_ratio``. A teacher of two is
``Experts``, and so are its students, whose adapters leave as a LoRA file for each; a student of two phases of a
teacher of one leaves with two. The pipeline asks its scheduler for a number of steps and hands it no generator; UniPC,
its own, is read for its ``flow_shift`` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import WanPipeline
from torch import Tensor, nn

from fastgen.denoiser import Cond, Denoiser
from fastgen.experts import Experts, members
from fastgen.family import About, Block, Family

from . import flow, stock

ABOUT = About(
    pipelines=("WanPipeline",),
    kinds=("flow",),
    schedulers={"renoise": flow.SCHEDULER, "ddim": flow.SCHEDULER},
    lora=True,
)
EXPERTS: dict[str, dict[str, Any]] = {"transformer": {}, "transformer_2": {"load_into_transformer_2": True}}
"""What ``load_lora_weights`` is told for each; in a LoRA file both are called "transformer"."""
MARGIN = 1e-6
"""Between the first expert's last time and the second's first: the pipeline gives the boundary itself to the first."""


def call(network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """x_t: [B, C, F, H, W]; t: [B] in [0, 1]; cond: text [B, L, D] -> y: [B, C, F, H, W]."""
    found: Tensor = network(
        hidden_states=x_t, timestep=(1000 * t).float(), encoder_hidden_states=cond["text"], return_dict=False
    )[0]
    return found


def network_of(pipeline: WanPipeline) -> nn.Module:
    """The pipeline's transformer, or both. Raises ValueError if it has not what its ``boundary_ratio`` asks for."""
    boundary, parts = pipeline.config.boundary_ratio, [pipeline.transformer, pipeline.transformer_2]
    if any(part is None for part in parts[: 1 if boundary is None else 2]):
        raise ValueError(
            f"boundary_ratio {boundary} needs {'transformer' if boundary is None else 'transformer and transformer_2'}"
            ", which this pipeline lacks; save the whole pipeline again"
        )
    return parts[0] if boundary is None else Experts(parts, [1.0, boundary - MARGIN])


def parts_of(network: nn.Module) -> dict[str, Any]:
    """What a pipeline with this network is made of. Raises ValueError if it is of more experts than two."""
    found = members(network)
    if len(found) > 2:
        raise ValueError(f"WanPipeline has two transformers, not {len(found)}; set method.phases to 2 or 1")
    parts: dict[str, Any] = {"transformer": found[0], "transformer_2": None, "boundary_ratio": None}
    if isinstance(network, Experts) and len(found) == 2:
        parts |= {"transformer_2": found[1], "boundary_ratio": round(network.starts[1] + MARGIN, 9)}
    return parts


def wrap(
    pipeline: WanPipeline,
    autocast: torch.dtype | None = None,
    start: float = 1.0,
    image_size: tuple[int, int] | None = None,
    num_frames: int | None = None,
) -> Family:
    """The family of a pipeline that is already in memory. Raises ValueError if its scheduler is not understood."""
    schedule, network = flow.schedule_of(pipeline.scheduler), network_of(pipeline)
    stock.prepared(pipeline, "transformer", "transformer_2", "vae", "text_encoder")
    device, factor, vae = pipeline.device, pipeline.vae_scale_factor_spatial, pipeline.vae
    config: Any = members(network)[0].config
    patch = config.patch_size
    size = image_size or (stock.own(pipeline, "height"), stock.own(pipeline, "width"))
    height, width = (patch[1] * side for side in stock.latents_of(pipeline, 0, factor * patch[1], size))
    frames, depth = stock.frames_of(
        pipeline, num_frames or stock.own(pipeline, "num_frames"), pipeline.vae_scale_factor_temporal
    )
    mean, std = (
        torch.tensor(values, device=device).reshape(-1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    encode, decode = stock.clip_autoencoder(vae, frames, mean, std)

    @torch.no_grad()
    def encode_prompts(prompts: Sequence[str]) -> Cond:
        length = stock.own(pipeline, "max_sequence_length")
        stock.warn_if_cut(map(len, pipeline.tokenizer(list(prompts)).input_ids), length)
        text, _ = pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=length, device=device
        )
        return {"text": text.float()}

    def read(output: Any, x_t: Tensor) -> Tensor:
        return stock.tokens_as_map(output, x_t, patch[2])

    found = flow.family(
        pipeline,
        Denoiser(network, schedule, "flow", call, autocast, read),
        encode_prompts,
        encode,
        decode,
        latent_shape=(config.in_channels, depth, height, width),
        size={"height": height * factor, "width": width * factor, "num_frames": frames},
        blocks=[
            Block(
                f"blocks.{i}",
                config.num_attention_heads * config.attention_head_dim,
                min(depth // patch[0] * height // patch[1], width // patch[2]),
            )
            for i in stock.some(config.num_layers)
        ],
        ask=flow.by_number,
        start=start,
        parts=parts_of,
    )
    return replace(found, experts=EXPERTS) if isinstance(network, Experts) else found


load = stock.loader(wrap)
