"""CogVideoX 1.0 and 1.5: ``CogVideoXPipeline``, text to video by one transformer on a discrete schedule, with T5.

Latents are laid out as the pipeline draws them, [B, F, C, H, W]. The schedule is a table of alphas_cumprod, shifted
and rescaled to end in pure noise. A student leaves with an LCM or TCD scheduler (``vp``) that has this table. Where
the transformer takes patches of several frames (1.5), the latents are filled up to them in front, which the pipeline
leaves out before it decodes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import CogVideoXPipeline
from torch import Tensor, nn

from fastgen.denoiser import Cond, Denoiser
from fastgen.family import About, Block, Family
from fastgen.sampling import Sampler

from . import stock, vp

ABOUT = About(
    pipelines=("CogVideoXPipeline",),
    kinds=("eps", "v", "x0"),
    schedulers={"renoise": "LCMScheduler", "ddim": "TCDScheduler"},
    lora=True,
)


def wrap(
    pipeline: CogVideoXPipeline,
    autocast: torch.dtype | None = None,
    start: float = 1.0,
    image_size: tuple[int, int] | None = None,
    num_frames: int | None = None,
) -> Family:
    """The family of a pipeline that is already in memory.

    Raises ValueError if its scheduler is not understood, or if its positions do not reach as far as the image.
    """
    schedule, kind = vp.schedule_of(pipeline.scheduler), vp.kind_of(pipeline.scheduler)
    network, device, factor = pipeline.transformer, pipeline.device, pipeline.vae_scale_factor_spatial
    stock.prepared(pipeline, "transformer", "vae", "text_encoder")
    config: Any = network.config
    patch, several = config.patch_size, config.patch_size_t or 1
    size = image_size or (config.sample_height * factor, config.sample_width * factor)
    height, width = (patch * side for side in stock.latents_of(network, 0, factor * patch, size))
    most = (config.sample_height, config.sample_width)
    if config.patch_size_t and config.use_rotary_positional_embeddings and (height > most[0] or width > most[1]):
        raise ValueError(
            f"image size {size[0]} x {size[1]}: the positions of this transformer reach {most[0] * factor} x "
            f"{most[1] * factor}; give no more"
        )
    every = pipeline.vae_scale_factor_temporal
    # the first frame stands alone only if the latents are odd in number: the autoencoder upsamples an even one whole
    frames, _ = stock.frames_of(pipeline, num_frames or config.sample_frames, 2 * every)
    decoded = (frames - 1) // every + 1
    extra = -decoded % several
    depth = decoded + extra
    encode_clips, decode_clips = stock.clip_autoencoder(
        pipeline.vae, frames, 0.0, 1 / pipeline.vae_scaling_factor_image
    )

    def call(network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t: [B, F, C, H, W]; t: [B] timesteps; cond: text [B, L, D] -> y: [B, F, C, H, W]."""
        rope = None
        if config.use_rotary_positional_embeddings:
            pixels = [side * factor for side in x_t.shape[-2:]]
            rope = pipeline._prepare_rotary_positional_embeddings(*pixels, x_t.shape[1], x_t.device)
        found: Tensor = network(
            hidden_states=x_t,
            encoder_hidden_states=cond["text"],
            timestep=t.float(),
            image_rotary_emb=rope,
            return_dict=False,
        )[0]
        return found

    def read(output: Any, x_t: Tensor) -> Tensor:
        return stock.tokens_as_map(output[0], x_t, patch)  # (video, text)

    def encode(pixels: Tensor) -> Tensor:
        latents = encode_clips(pixels).transpose(1, 2)
        return torch.cat([latents[:, :1].expand(-1, extra, -1, -1, -1), latents], 1)

    def decode(latents: Tensor) -> Tensor:
        return decode_clips(latents[:, extra:].transpose(1, 2))

    @torch.no_grad()
    def encode_prompts(prompts: Sequence[str]) -> Cond:
        text, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False, device=device)
        return {"text": text.float()}

    def with_network(made: nn.Module, num_steps: int | None, sampler: Sampler = "renoise") -> CogVideoXPipeline:
        parts = {}
        if num_steps is not None:
            parts["scheduler"] = vp.student_scheduler(pipeline.scheduler, num_steps, sampler, start)
        return stock.rebuilt(pipeline, transformer=made, **parts)

    return Family(
        denoiser=Denoiser(network, schedule, kind, call, autocast, read),
        latent_shape=(depth, config.in_channels, height, width),
        encode_prompts=encode_prompts,
        uncond=lambda: encode_prompts([""]),
        encode=encode,
        decode=decode,
        student=lambda embed_guidance=False: copy.deepcopy(network).requires_grad_(True),
        student_times=lambda n: vp.times(vp.student_scheduler(pipeline.scheduler, n, start=start), n),
        blocks=[
            Block(
                f"transformer_blocks.{i}",
                config.num_attention_heads * config.attention_head_dim,
                min(depth // several * height // patch, width // patch),
            )
            for i in stock.some(config.num_layers)
        ],
        pipeline=with_network,
        image_size=(height * factor, width * factor),
        run=stock.caller(height=height * factor, width=width * factor, num_frames=frames),
        component="transformer",
    )


load = stock.loader(wrap)
