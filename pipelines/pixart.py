"""PixArt-alpha and -Sigma: ``PixArtAlphaPipeline``, ``PixArtSigmaPipeline``, a DiT with T5 text and learned variances.

The variances are dropped, as the stock calls do. Those calls round sizes to a table of aspect ratios unless told
``use_resolution_binning=False``, which ``run`` tells them. A student leaves with an LCM or TCD scheduler (``vp``) and
is called at guidance_scale 1; both give what PixArtAlphaPipeline takes of a call of one step, the second of what a
step returns.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline
from torch import Tensor, nn

from fastgen.denoiser import Cond, Denoiser
from fastgen.family import About, Block, Family
from fastgen.sampling import Sampler

from . import stock, vp

ABOUT = About(
    pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
    kinds=("eps", "v", "x0"),
    schedulers={"renoise": "LCMScheduler", "ddim": "TCDScheduler"},
    lora=False,
)


def wrap(
    pipeline: PixArtAlphaPipeline | PixArtSigmaPipeline,
    autocast: torch.dtype | None = None,
    start: float = 1.0,
    image_size: tuple[int, int] | None = None,
) -> Family:
    """The family of a pipeline that is already in memory. Raises ValueError if its scheduler is not understood."""
    schedule, kind = vp.schedule_of(pipeline.scheduler), vp.kind_of(pipeline.scheduler)
    network, device, factor = pipeline.transformer, pipeline.device, pipeline.vae_scale_factor
    stock.prepared(pipeline, "transformer", "vae", "text_encoder")
    height, width = stock.latents_of(network, network.config.sample_size, factor, image_size)
    encode, decode = stock.autoencoder(pipeline.vae)
    patch, told_sizes = network.config.patch_size, network.use_additional_conditions
    # the call cleans captions, if bs4 and ftfy are installed; encode_prompt by itself does not
    clean = inspect.signature(type(pipeline).__call__).parameters["clean_caption"].default

    def call(network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t: [B, C, H, W]; t: [B] timesteps; cond: text [B, L, D], mask [B, L] -> y: [B, C, H, W]."""
        size = x_t.new_tensor([side * factor for side in x_t.shape[-2:]]).expand(len(x_t), 2)
        sizes = {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}
        found: Tensor = network(
            x_t,
            encoder_hidden_states=cond["text"],
            encoder_attention_mask=cond["mask"],
            timestep=t.float(),
            added_cond_kwargs=sizes if told_sizes else {"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return found[:, : x_t.shape[1]]

    @torch.no_grad()
    def encode_prompts(prompts: Sequence[str]) -> Cond:
        text, mask, _, _ = pipeline.encode_prompt(list(prompts), False, device=device, clean_caption=clean)
        return {"text": text.float(), "mask": mask.float()}

    def with_network(made: nn.Module, num_steps: int | None, sampler: Sampler = "renoise") -> Any:
        parts = {"transformer": made}
        if num_steps is not None:
            parts["scheduler"] = vp.student_scheduler(pipeline.scheduler, num_steps, sampler, start)
        return stock.rebuilt(pipeline, **parts)

    return Family(
        denoiser=Denoiser(network, schedule, kind, call, autocast, lambda y, x_t: stock.tokens_as_map(y, x_t, patch)),
        latent_shape=(network.config.in_channels, height, width),
        encode_prompts=encode_prompts,
        uncond=lambda: encode_prompts([""]),
        encode=encode,
        decode=decode,
        student=lambda embed_guidance=False: copy.deepcopy(network).requires_grad_(True),
        student_times=lambda n: vp.times(vp.student_scheduler(pipeline.scheduler, n, start=start), n),
        blocks=[
            Block(f"transformer_blocks.{i}", network.inner_dim, min(height, width) // patch)
            for i in stock.some(network.config.num_layers)
        ],
        pipeline=with_network,
        image_size=(height * factor, width * factor),
        run=stock.caller(height=height * factor, width=width * factor, use_resolution_binning=False),
    )


load = stock.loader(wrap)
