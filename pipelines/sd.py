"""Stable Diffusion 1.x and 2.x: ``StableDiffusionPipeline`` with a discrete variance-preserving schedule.

Both prediction types. A student leaves as the same class with an LCM or TCD scheduler (``vp``) and a U-Net that the
stock call does not guide again (``unet``). A student of several experts has them in one component, ``UNetExperts``.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from fastgen.denoiser import Cond, Denoiser
from fastgen.family import About, Family
from fastgen.sampling import Sampler

from . import stock, unet, vp

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
    schedule, kind = vp.schedule_of(pipeline.scheduler), vp.kind_of(pipeline.scheduler)
    network, device, factor = pipeline.unet, pipeline.device, pipeline.vae_scale_factor
    stock.prepared(pipeline, "unet", "vae", "text_encoder")
    height, width = stock.latents_of(network, network.config.sample_size, factor, image_size)
    encode, decode = stock.autoencoder(pipeline.vae)

    @torch.no_grad()
    def encode_prompts(prompts: Sequence[str]) -> Cond:
        tokenizer = pipeline.tokenizer
        limit = tokenizer.model_max_length
        tokens = tokenizer(list(prompts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
        stock.warn_if_cut(map(len, tokenizer(list(prompts)).input_ids), limit)
        mask = tokens.attention_mask if getattr(pipeline.text_encoder.config, "use_attention_mask", None) else None
        return {"text": pipeline.text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0].float()}

    def with_network(made: nn.Module, num_steps: int | None, sampler: Sampler = "renoise") -> StableDiffusionPipeline:
        parts = {"unet": unet.one_unet(made), "requires_safety_checker": False}
        if num_steps is not None:
            parts["scheduler"] = vp.student_scheduler(pipeline.scheduler, num_steps, sampler, start)
        return stock.rebuilt(pipeline, **parts)

    return Family(
        denoiser=Denoiser(network, schedule, kind, call, autocast),
        latent_shape=(network.config.in_channels, height, width),
        encode_prompts=encode_prompts,
        uncond=lambda: encode_prompts([""]),
        encode=encode,
        decode=decode,
        student=lambda embed_guidance=False: unet.student(network, embed_guidance),
        student_times=lambda n: vp.times(vp.student_scheduler(pipeline.scheduler, n, start=start), n),
        blocks=unet.blocks(network, min(height, width)),
        pipeline=with_network,
        image_size=(height * factor, width * factor),
        run=stock.caller(height=height * factor, width=width * factor),
        unguided=None,
        stock_guidance=inspect.signature(StableDiffusionPipeline.__call__).parameters["guidance_scale"].default,
        fix_guidance=(lambda scale: unet.fix_guidance(network, scale)) if unet.takes_guidance(network) else None,
        component="unet",
    )


load = stock.loader(wrap, safety_checker=None)
