"""Stable Diffusion 1.x and 2.x: ``StableDiffusionPipeline`` with a discrete variance-preserving schedule.

Both prediction types. A student leaves as the same class with an LCM or TCD scheduler (``vp``) and a U-Net that the
stock call does not guide again (``unet``). A student of several experts has them in one component, ``UNetExperts``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from fastgen.denoiser import Cond
from fastgen.family import About, Family

from . import stock, unet

ABOUT = About(
    pipelines=("StableDiffusionPipeline",),
    kinds=("eps", "v", "x0"),
    schedulers={"renoise": "LCMScheduler", "ddim": "TCDScheduler"},
    lora=True,
)


def call(network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """x_t: [B, C, H, W]; t: [B] timesteps; cond: text [B, L, D], perhaps guidance [B] -> y: [B, C, H, W]."""
    scale = unet.embedded(network, cond)
    return network(x_t, t.float(), encoder_hidden_states=cond["text"], timestep_cond=scale, return_dict=False)[0]


def wrap(
    pipeline: StableDiffusionPipeline,
    autocast: torch.dtype | None = None,
    start: float = 1.0,
    image_size: tuple[int, int] | None = None,
) -> Family:
    """The family of a pipeline that is already in memory. Raises ValueError if its scheduler is not understood."""
    device = pipeline.device
    stock.prepared(pipeline, "unet", "vae", "text_encoder")

    @torch.no_grad()
    def encode_prompts(prompts: Sequence[str]) -> Cond:
        tokenizer = pipeline.tokenizer
        limit = tokenizer.model_max_length
        tokens = tokenizer(list(prompts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
        stock.warn_if_cut(map(len, tokenizer(list(prompts)).input_ids), limit)
        mask = tokens.attention_mask if getattr(pipeline.text_encoder.config, "use_attention_mask", None) else None
        return {"text": pipeline.text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0].float()}

    return unet.family(
        pipeline,
        call,
        encode_prompts,
        lambda: encode_prompts([""]),
        autocast,
        start,
        image_size,
        requires_safety_checker=False,
    )


load = stock.loader(wrap, safety_checker=None)
