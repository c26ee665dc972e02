"""Sana: ``SanaPipeline``, linear attention on rectified flow, Gemma text behind an instruction, a deep autoencoder.

The pipeline asks its scheduler for a number of steps, so a student's scheduler yields its times for its own number
alone; it hands its generator on. It is called at guidance_scale 1. The stock call rounds sizes to a table of aspect
ratios unless told ``use_resolution_binning=False``, which ``run`` tells it. Students that take the guidance scale as
an input leave as another class: ``sana_sprint``.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderDC, SanaPipeline, SanaSprintPipeline
from torch import Tensor, nn

from fastgen.denoiser import Cond, Denoiser
from fastgen.family import About, Block, Family

from . import flow, stock

ABOUT = About(
    pipelines=("SanaPipeline",),
    kinds=("flow",),
    schedulers={"renoise": flow.SCHEDULER, "ddim": flow.SCHEDULER},
    lora=True,
)


def wrap(
    pipeline: SanaPipeline,
    autocast: torch.dtype | None = None,
    start: float = 1.0,
    image_size: tuple[int, int] | None = None,
) -> Family:
    """The family of a pipeline that is already in memory. Raises ValueError if its scheduler is not understood."""
    schedule = flow.schedule_of(pipeline.scheduler)
    network, factor = pipeline.transformer, pipeline.vae_scale_factor
    stock.prepared(pipeline, "transformer", "vae", "text_encoder")
    height, width = stock.latents_of(network, network.config.sample_size, factor, image_size)
    encode_prompts, uncond = text(pipeline)
    encode, decode = autoencoder(pipeline.vae)
    unit = 1000 * network.config.timestep_scale

    def call(network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t: [B, C, H, W]; t: [B] in [0, 1]; cond: text [B, L, D], mask [B, L] -> y: [B, C, H, W]."""
        found: Tensor = network(
            x_t,
            encoder_hidden_states=cond["text"],
            encoder_attention_mask=cond["mask"],
            timestep=(unit * t).float(),
            return_dict=False,
        )[0]
        return found[:, : x_t.shape[1]]  # some learn variances besides

    found = flow.family(
        pipeline,
        Denoiser(network, schedule, "flow", call, autocast, reader(network)),
        encode_prompts,
        encode,
        decode,
        latent_shape=(network.config.in_channels, height, width),
        size={"height": height * factor, "width": width * factor, "use_resolution_binning": False},
        blocks=blocks(network, min(height, width)),
        ask=flow.by_number,
        start=start,
    )
    return replace(found, uncond=uncond, step_noise="generator")


def text(pipeline: SanaPipeline | SanaSprintPipeline) -> tuple[Callable[[Sequence[str]], Cond], Callable[[], Cond]]:
    """(encode_prompts, uncond): prompts follow the instruction that the stock call gives, no prompt follows none."""
    given = inspect.signature(type(pipeline).__call__).parameters
    instruction, length = given["complex_human_instruction"].default, given["max_sequence_length"].default
    first = "\n".join(instruction)

    @torch.no_grad()
    def encoded(prompts: Sequence[str], instruction: list[str] | None) -> Cond:
        found, mask, *_ = pipeline.encode_prompt(
            list(prompts), device=pipeline.device, complex_human_instruction=instruction, **unguided
        )
        return {"text": found.float(), "mask": mask.float()}

    def encode_prompts(prompts: Sequence[str]) -> Cond:
        tokenizer = pipeline.tokenizer
        limit = len(tokenizer.encode(first)) + length - 2  # as the pipeline has it
        longest = max(len(ids) for ids in tokenizer([first + prompt for prompt in prompts]).input_ids)
        if longest > limit:
            warnings.warn(f"a prompt was cut by {longest - limit} tokens; shorten it", stacklevel=2)
        return encoded(prompts, instruction)

    unguided = {} if isinstance(pipeline, SanaSprintPipeline) else {"do_classifier_free_guidance": False}
    return encode_prompts, lambda: encoded([""], None)


def autoencoder(vae: AutoencoderDC) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """(encode, decode) of an autoencoder without variances: pixels [B, 3, H, W] in [-1, 1] to latents."""
    scaling = vae.config.scaling_factor

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        latents: Tensor = vae.encode(pixels.to(vae.device), return_dict=False)[0]
        return latents.float() * scaling

    def decode(latents: Tensor) -> Tensor:
        pixels: Tensor = vae.decode(latents / scaling, return_dict=False)[0]
        return pixels.float()

    return encode, decode


def blocks(network: Any, size: int) -> list[Block]:
    """Four of the transformer's. size: the latents' shorter side."""
    config = network.config
    width = config.num_attention_heads * config.attention_head_dim
    return [Block(f"transformer_blocks.{i}", width, size // config.patch_size) for i in stock.some(config.num_layers)]


def reader(network: Any) -> Callable[[Any, Tensor], Tensor]:
    """How their outputs become maps."""
    patch = network.config.patch_size
    return lambda tokens, x_t: stock.tokens_as_map(tokens, x_t, patch)


load = stock.loader(wrap)
