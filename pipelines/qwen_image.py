"""Qwen-Image: ``QwenImagePipeline``, double-stream blocks on rectified flow, a language model's states as text.

Latents are packed for the network alone; of the autoencoder's, which are of videos, they are one frame. Where the
scheduler shifts its times by the image size, a student keeps the shift of the size it was trained at.

Our guidance is the stock call's ``true_cfg_scale`` with the negative prompt " ": it gives each token of the guided
output the norm of the conditional one, which plain classifier-free guidance does not. Students are called without a
negative prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from diffusers import QwenImagePipeline
from torch import Tensor, nn

from fastgen.denoiser import Cond, Denoiser, classifier_free
from fastgen.family import About, Block, Family

from . import flow, stock

ABOUT = About(
    pipelines=("QwenImagePipeline",),
    kinds=("flow",),
    schedulers={"renoise": flow.SCHEDULER, "ddim": flow.SCHEDULER},
    lora=True,
)


def call(network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """x_t: [B, C, H, W]; t: [B] in [0, 1]; cond: text [B, L, D], mask [B, L] -> y: [B, C, H, W]."""
    batch, _, height, width = x_t.shape
    found: Tensor = network(
        hidden_states=stock.packed(x_t),
        timestep=t.float(),
        encoder_hidden_states=cond["text"],
        encoder_hidden_states_mask=cond["mask"],
        img_shapes=[[(1, height // 2, width // 2)]] * batch,
        return_dict=False,
    )[0]
    return stock.unpacked(found, height, width)


def guide(pos: Tensor, neg: Tensor, scale: Tensor | float) -> Tensor:
    """Classifier-free guidance, each token of 2 x 2 latents rescaled to the norm of the conditional output's."""
    made = stock.packed(classifier_free(pos, neg, scale))
    norms = [tokens.norm(dim=-1, keepdim=True) for tokens in (stock.packed(pos), made)]
    return stock.unpacked(made * (norms[0] / norms[1]), *pos.shape[-2:])


def wrap(
    pipeline: QwenImagePipeline,
    autocast: torch.dtype | None = None,
    start: float = 1.0,
    image_size: tuple[int, int] | None = None,
) -> Family:
    """The family of a pipeline that is already in memory. Raises ValueError if its scheduler is not understood."""
    network, vae, device, factor = pipeline.transformer, pipeline.vae, pipeline.device, pipeline.vae_scale_factor
    stock.prepared(pipeline, "transformer", "vae", "text_encoder")
    rows, columns = stock.latents_of(network, pipeline.default_sample_size // 2, 2 * factor, image_size)
    schedule = flow.schedule_of(pipeline.scheduler, flow.mu_of(pipeline.scheduler, rows * columns))
    height, width = 2 * rows, 2 * columns
    mean, std = (
        torch.tensor(values, device=device).reshape(-1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    encode, decode = stock.clip_autoencoder(vae, 1, mean, std)
    length = stock.own(pipeline, "max_sequence_length")

    @torch.no_grad()
    def encode_prompts(prompts: Sequence[str]) -> Cond:
        text, mask = pipeline.encode_prompt(list(prompts), device=device, max_sequence_length=length + 1)
        found = torch.ones(text.shape[:2], device=device) if mask is None else mask  # None: all of them are tokens
        return stock.padded([row[kept.bool()] for row, kept in zip(text, found, strict=True)], length)

    found = flow.family(
        pipeline,
        Denoiser(network, schedule, "flow", call, autocast, stock.image_tokens, guide),
        encode_prompts,
        encode=lambda pixels: encode(pixels)[:, :, 0],
        decode=lambda latents: decode(latents[:, :, None])[:, :, 0],
        latent_shape=(network.config.in_channels // 4, height, width),
        size={"height": height * factor, "width": width * factor},
        blocks=[
            Block(f"transformer_blocks.{i}", network.inner_dim, min(rows, columns))
            for i in stock.some(network.config.num_layers)
        ],
        ask=flow.by_sigmas,
        start=start,
        unpack=lambda tokens: stock.unpacked(tokens, height, width),
    )
    return replace(found, uncond=lambda: encode_prompts([" "]), global_noise=stock.packed_noise, unguided=None)


load = stock.loader(wrap)
