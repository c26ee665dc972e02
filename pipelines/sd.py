"""Stable Diffusion 1.x and 2.x: ``StableDiffusionPipeline`` with a discrete variance-preserving schedule.

Both prediction types. A student leaves as the same class with ``LCMScheduler(original_inference_steps=N)``, whose
saved config alone yields the trained times and which refuses more than N steps, and with a zero guidance embedding
in the U-Net (``time_cond_proj_dim``), which makes the stock pipeline skip classifier-free guidance whatever
``guidance_scale`` says.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, TCDScheduler, UNet2DConditionModel
from torch import Tensor, nn

from fastgen.denoiser import Cond, Denoiser
from fastgen.family import Block, Family
from fastgen.prediction import Kind
from fastgen.sampling import Sampler
from fastgen.schedule import TabulatedVP

PIPELINE = "StableDiffusionPipeline"
GUIDANCE_EMBEDDING = 32
"""Width of the guidance embedding; its projection is zero, so it only tells the pipeline to skip guidance."""

_KINDS: dict[str, Kind] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def call(network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """x_t: [B, C, H, W]; t: [B] timesteps; cond: text [B, L, D] -> y: [B, C, H, W]."""
    return network(x_t, t.float(), encoder_hidden_states=cond["text"], return_dict=False)[0]


def load(path: str | Path, device: torch.device | str = "cpu", autocast: torch.dtype | None = None) -> Family:
    """Load a pipeline folder or a Hub id. Weights are float32; ``autocast`` is what the denoisers compute in."""
    pipeline = StableDiffusionPipeline.from_pretrained(path, dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return wrap(pipeline.to(device), autocast)


def wrap(pipeline: StableDiffusionPipeline, autocast: torch.dtype | None = None) -> Family:
    """The family of a pipeline that is already in memory. Raises ValueError if its scheduler is not understood."""
    config = pipeline.scheduler.config
    if not hasattr(pipeline.scheduler, "alphas_cumprod"):
        name = type(pipeline.scheduler).__name__
        raise ValueError(
            f"scheduler {name} has no table of alphas_cumprod; this family needs one, such as DDIMScheduler"
        )
    kind = _KINDS.get(config.get("prediction_type", "epsilon"))
    if kind is None:
        raise ValueError(f"prediction_type {config['prediction_type']!r} is not one of {', '.join(_KINDS)}")
    unet, vae, device = pipeline.unet, pipeline.vae, pipeline.device
    for module in (unet, vae, pipeline.text_encoder):
        module.requires_grad_(False).eval()
    scaling = vae.config.scaling_factor
    side = unet.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    schedule = TabulatedVP(pipeline.scheduler.alphas_cumprod)

    @torch.no_grad()
    def encode_prompts(prompts: Sequence[str]) -> Cond:
        tokenizer = pipeline.tokenizer
        limit = tokenizer.model_max_length
        tokens = tokenizer(list(prompts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
        longest = max(len(ids) for ids in tokenizer(list(prompts)).input_ids)
        if longest > limit:
            warnings.warn(f"a prompt of {longest} tokens was cut to {limit}; shorten it", stacklevel=2)
        mask = tokens.attention_mask if getattr(pipeline.text_encoder.config, "use_attention_mask", None) else None
        return {"text": pipeline.text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0].float()}

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        return vae.encode(pixels.to(device)).latent_dist.mode().float() * scaling

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        return vae.decode(latents / scaling, return_dict=False)[0].float().clamp(-1, 1)

    def with_network(
        network: nn.Module, num_steps: int | None, sampler: Sampler = "renoise"
    ) -> StableDiffusionPipeline:
        parts = dict(pipeline.components)
        parts["unet"] = network
        if num_steps is not None:
            parts["scheduler"] = student_scheduler(pipeline.scheduler, num_steps, sampler)
        made = StableDiffusionPipeline(**parts, requires_safety_checker=False)
        made.set_progress_bar_config(disable=True)
        return made

    return Family(
        denoiser=Denoiser(unet, schedule, kind, call, autocast),
        latent_shape=(unet.config.in_channels, height, width),
        encode_prompts=encode_prompts,
        uncond=lambda: encode_prompts([""]),
        encode=encode,
        decode=decode,
        student=lambda: student(unet),
        student_times=lambda n: _times(student_scheduler(pipeline.scheduler, n), n),
        blocks=_blocks(unet, height),
        pipeline=with_network,
        image_size=(height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor),
    )


def student(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A trainable copy with a zero, frozen guidance embedding, also where the teacher's is not zero."""
    if unet.config.time_cond_proj_dim is not None:
        result = copy.deepcopy(unet)
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
    projection.requires_grad_(False)
    return result


def student_scheduler(teacher: Any, num_steps: int, sampler: Sampler = "renoise") -> LCMScheduler | TCDScheduler:
    """The scheduler shipped with a student of ``num_steps``; more steps than that are an error at the call.

    LCM's boundary scaling is raised until c_skip vanishes in float32, so that each step uses x0 itself. TCD at the
    pipeline's own default, eta 0, keeps the predicted noise: DDIM on the same times.
    """
    # all of the teacher's values: what it left at its class's default, from_config would take for LCM's
    config = {key: value for key, value in teacher.config.items() if key != "_use_default_values"}
    cls = {"renoise": LCMScheduler, "ddim": TCDScheduler}[sampler]
    return cls.from_config(
        config,
        original_inference_steps=num_steps,
        timestep_scaling=1e4,
        clip_sample=False,
        thresholding=False,
        rescale_betas_zero_snr=False,
    )


def _times(scheduler: LCMScheduler, num_steps: int) -> list[float]:
    scheduler.set_timesteps(num_steps)
    return [float(t) for t in scheduler.timesteps]


def _blocks(unet: UNet2DConditionModel, size: int) -> list[Block]:
    """The down blocks and the middle: DMD2's discriminator reads the encoder."""
    blocks = []
    channels = unet.config.block_out_channels
    for i, c in enumerate(channels):
        size = size if i == len(channels) - 1 else (size + 1) // 2
        blocks.append(Block(f"down_blocks.{i}", c, size))
    return [*blocks, Block("mid_block", channels[-1], size)]
