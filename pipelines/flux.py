"""FLUX.1 dev and schnell: ``FluxPipeline``, double- and single-stream blocks on rectified flow, T5 and CLIP.

Latents are packed for the network alone. Where the scheduler shifts its times by the image size, a student keeps the
shift of the size it was trained at.

Dev takes a guidance scale as an input and is called at the stock call's default, 3.5, unless ``fix_guidance`` fixes
another; schnell takes none. Our guidance is the stock call's ``true_cfg_scale`` with the negative prompt "", on top
of dev's own. Students take no scale: dev's embedding is folded at 3.5, schnell's may be added to be learnt.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from fastgen import sharding
from fastgen.denoiser import Cond, Denoiser
from fastgen.family import About, Block, Family

from . import flow, stock

ABOUT = About(
    pipelines=("FluxPipeline",),
    kinds=("flow",),
    schedulers={"renoise": flow.SCHEDULER, "ddim": flow.SCHEDULER},
    lora=True,
)
GUIDANCE = inspect.signature(FluxPipeline.__call__).parameters["guidance_scale"].default
"""Of a stock call that names none."""


def call(network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """x_t: [B, C, H, W]; t: [B] in [0, 1]; cond: text [B, L, D], pooled [B, P], perhaps guidance [B]."""
    config: Any = network.config
    batch, _, height, width = x_t.shape
    scale = cond["guidance"] if "guidance" in cond else torch.full((batch,), GUIDANCE, device=x_t.device)
    found: Tensor = network(
        hidden_states=stock.packed(x_t),
        timestep=t.float(),
        guidance=scale.float() if config.guidance_embeds else None,
        pooled_projections=cond["pooled"],
        encoder_hidden_states=cond["text"],
        txt_ids=torch.zeros(cond["text"].shape[1], 3, device=x_t.device),
        img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, x_t.device, torch.float32),
        return_dict=False,
    )[0]
    return stock.unpacked(found, height, width)


@torch.no_grad()
def fix_guidance(network: nn.Module, scale: float) -> None:
    """Let a network that takes the guidance scale as an input always do what it does at this one."""
    embedding: Any = network.time_text_embed
    last = embedding.guidance_embedder.linear_2
    given = embedding.time_proj(torch.tensor([1000 * scale], device=last.weight.device)).to(last.weight.dtype)
    last.bias.copy_(embedding.guidance_embedder(given)[0])
    nn.init.zeros_(last.weight)


def takes_guidance(network: FluxTransformer2DModel) -> bool:
    """Whether what it gives depends on the guidance scale: students of dev have the input, too, but folded."""
    embeds: bool = network.config.guidance_embeds
    return embeds and bool(network.time_text_embed.guidance_embedder.linear_2.weight.any())


def student(network: FluxTransformer2DModel, embed_guidance: bool = False) -> FluxTransformer2DModel:
    """A trainable copy that ignores the guidance scale, or is to learn it in an embedding that does nothing yet."""
    embeds = network.config.guidance_embeds
    if not embeds and embed_guidance:
        if sharding.is_outlined(network):
            raise ValueError(
                "guidance.embed: this network's weights are read only when it is split; set run.shard none"
            )
        made = FluxTransformer2DModel.from_config(network.config, guidance_embeds=True)
        made = made.to(network.device, network.dtype).requires_grad_(True)
        made.load_state_dict(network.state_dict(), strict=False)
        last = made.time_text_embed.guidance_embedder.linear_2
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        return made
    made = copy.deepcopy(network).requires_grad_(True)
    if embeds:
        fix_guidance(made, GUIDANCE)
        made.time_text_embed.guidance_embedder.requires_grad_(embed_guidance)
    return made


def wrap(
    pipeline: FluxPipeline,
    autocast: torch.dtype | None = None,
    start: float = 1.0,
    image_size: tuple[int, int] | None = None,
) -> Family:
    """The family of a pipeline that is already in memory. Raises ValueError if its scheduler is not understood."""
    network, device, factor = pipeline.transformer, pipeline.device, pipeline.vae_scale_factor
    stock.prepared(pipeline, "transformer", "vae", "text_encoder", "text_encoder_2", "image_encoder")
    rows, columns = stock.latents_of(network, pipeline.default_sample_size // 2, 2 * factor, image_size)
    schedule = flow.schedule_of(pipeline.scheduler, flow.mu_of(pipeline.scheduler, rows * columns))
    height, width = 2 * rows, 2 * columns
    encode, decode = stock.autoencoder(pipeline.vae)
    takes = takes_guidance(network)
    names = [f"transformer_blocks.{i}" for i in range(network.config.num_layers)]
    names += [f"single_transformer_blocks.{i}" for i in range(network.config.num_single_layers)]

    @torch.no_grad()
    def encode_prompts(prompts: Sequence[str]) -> Cond:
        text, pooled, _ = pipeline.encode_prompt(list(prompts), device=device)
        return {"text": text.float(), "pooled": pooled.float()}

    found = flow.family(
        pipeline,
        Denoiser(network, schedule, "flow", call, autocast, stock.image_tokens),
        encode_prompts,
        encode,
        decode,
        latent_shape=(network.config.in_channels // 4, height, width),
        size={"height": height * factor, "width": width * factor},
        blocks=[Block(names[i], network.inner_dim, min(rows, columns)) for i in stock.some(len(names))],
        ask=flow.by_sigmas,
        start=start,
        unpack=lambda tokens: stock.unpacked(tokens, height, width),
    )
    return replace(
        found,
        student=lambda embed_guidance=False: student(network, embed_guidance),
        global_noise=stock.packed_noise,
        unguided=GUIDANCE if takes else None,
        stock_guidance=GUIDANCE,
        fix_guidance=(lambda scale: fix_guidance(network, scale)) if takes else None,
    )


load = stock.loader(wrap)
