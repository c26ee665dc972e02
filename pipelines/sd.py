"""Stable Diffusion 1.x and 2.x: ``StableDiffusionPipeline`` with a discrete variance-preserving schedule.

Both prediction types. A student leaves as the same class with ``LCMScheduler(original_inference_steps=N)``, whose
saved config alone yields the trained times and which refuses more than N steps, and with a guidance embedding in the
U-Net (``time_cond_proj_dim``), which makes the stock pipeline skip classifier-free guidance whatever
``guidance_scale`` says. The embedding is zero, so that the scale does nothing, or learnt, so that it does what
guidance by it would. A student of several experts has them in one component, ``UNetExperts``.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, TCDScheduler, UNet2DConditionModel
from torch import Tensor, nn

from fastgen.denoiser import Cond, Denoiser
from fastgen.experts import Experts
from fastgen.family import Block, Family
from fastgen.prediction import Kind
from fastgen.sampling import Sampler
from fastgen.schedule import TabulatedVP

from .experts import UNetExperts

PIPELINE = "StableDiffusionPipeline"
GUIDANCE_EMBEDDING = 32
"""Width of the guidance embedding. Where its projection is zero it only tells the pipeline to skip guidance."""

_KINDS: dict[str, Kind] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def call(network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """x_t: [B, C, H, W]; t: [B] timesteps; cond: text [B, L, D], perhaps guidance [B] -> y: [B, C, H, W]."""
    embedded = None
    if "guidance" in cond:
        config: Any = network.config
        embedded = guidance_embedding(cond["guidance"], config.time_cond_proj_dim)
    return network(x_t, t.float(), encoder_hidden_states=cond["text"], timestep_cond=embedded, return_dict=False)[0]


def guidance_embedding(scale: Tensor, width: int) -> Tensor:
    """What the stock pipelines make of guidance_scale: [B] -> [B, width]: sinusoids of 1000 (scale - 1)."""
    half = width // 2
    # in float32 step by step as they do, since a phase of thousands shows the last bit
    rates = torch.exp(torch.arange(half, dtype=torch.float32) * -(torch.tensor(10000.0).log() / (half - 1)))
    phase = (1000 * (scale.double() - 1).float())[:, None] * rates.to(scale.device)
    return nn.functional.pad(torch.cat([phase.sin(), phase.cos()], 1), (0, width % 2))


def load(
    path: str | Path,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    start: float = 1.0,
) -> Family:
    """Load a pipeline folder or a Hub id. Weights are float32; ``autocast`` is what the denoisers compute in.

    start: the share of the times at which students are called first.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(path, dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return wrap(pipeline.to(device), autocast, start)


def wrap(pipeline: StableDiffusionPipeline, autocast: torch.dtype | None = None, start: float = 1.0) -> Family:
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

    def decode(latents: Tensor) -> Tensor:
        return vae.decode(latents / scaling, return_dict=False)[0].float()

    def with_network(
        network: nn.Module, num_steps: int | None, sampler: Sampler = "renoise"
    ) -> StableDiffusionPipeline:
        parts = dict(pipeline.components)
        parts["unet"] = one_unet(network)
        if num_steps is not None:
            parts["scheduler"] = student_scheduler(pipeline.scheduler, num_steps, sampler, start)
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
        student=lambda embed_guidance=False: student(unet, embed_guidance),
        student_times=lambda n: _times(student_scheduler(pipeline.scheduler, n, start=start), n),
        blocks=_blocks(unet, height),
        pipeline=with_network,
        image_size=(height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor),
        stock_guidance=inspect.signature(StableDiffusionPipeline.__call__).parameters["guidance_scale"].default,
        fix_guidance=(lambda scale: fix_guidance(unet, scale)) if takes_guidance(unet) else None,
        component="unet",
    )


def one_unet(network: nn.Module) -> nn.Module:
    """What a pipeline has as its U-Net: experts in one component, where there is more than one."""
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


def student_scheduler(
    teacher: Any, num_steps: int, sampler: Sampler = "renoise", start: float = 1.0
) -> LCMScheduler | TCDScheduler:
    """The scheduler shipped with a student of ``num_steps``; more steps than that are an error at the call.

    LCM's boundary scaling is raised until c_skip vanishes in float32, so that each step uses x0 itself. TCD at the
    pipeline's own default, eta 0, keeps the predicted noise: DDIM on the same times. A start below 1 cuts the table
    of betas after that share: what remains is the teacher's noise to the bit, and the scheduler's first time, at which
    the stock pipeline feeds pure noise, is its last. Raises ValueError if fewer times remain than steps.
    """
    # all of the teacher's values: what it left at its class's default, from_config would take for LCM's
    config = {key: value for key, value in teacher.config.items() if key != "_use_default_values"}
    cls = {"renoise": LCMScheduler, "ddim": TCDScheduler}[sampler]
    made = cls.from_config(
        config,
        original_inference_steps=num_steps,
        timestep_scaling=1e4,
        clip_sample=False,
        thresholding=False,
        rescale_betas_zero_snr=False,
    )
    count = len(made.betas)
    left = round(start * count)
    if left == count:
        return made
    if left < num_steps:
        raise ValueError(f"student.start {start:g} leaves {left} of {count} times for {num_steps} steps; raise it")
    return cls.from_config(made.config, num_train_timesteps=left, trained_betas=made.betas[:left].tolist())


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
