"""Z-Image: ``ZImagePipeline``, single-stream blocks on rectified flow, a language model's states as text.

The network takes lists of samples, texts of unlike lengths among them, a time that grows from noise to data, and gives
the flow negated. Where the scheduler shifts its times by the image size, a student keeps the shift of the size it was
trained at.

Our guidance by a scale is the stock call's by ``guidance_scale`` = scale - 1, which adds that much of the difference
to the conditional output; a student is called at 0, where the stock call does not guide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import ZImagePipeline
from torch import Tensor, nn

from fastgen.denoiser import Cond, Denoiser
from fastgen.family import About, Block, Family

from . import flow, stock

ABOUT = About(
    pipelines=("ZImagePipeline",),
    kinds=("flow",),
    schedulers={"renoise": flow.SCHEDULER, "ddim": flow.SCHEDULER},
    lora=True,
)


def call(network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """x_t: [B, C, H, W]; t: [B] in [0, 1]; cond: text [B, L, D], mask [B, L] -> y: [B, C, H, W]."""
    texts = [text[mask] for text, mask in zip(cond["text"], cond["mask"], strict=True)]
    found: list[Tensor] = network(list(x_t[:, :, None]), (1 - t).float(), texts, return_dict=False)[0]
    return -torch.stack(found)[:, :, 0]


def wrap(
    pipeline: ZImagePipeline,
    autocast: torch.dtype | None = None,
    start: float = 1.0,
    image_size: tuple[int, int] | None = None,
) -> Family:
    """The family of a pipeline that is already in memory. Raises ValueError if its scheduler is not understood."""
    network, device, factor = pipeline.transformer, pipeline.device, pipeline.vae_scale_factor
    stock.prepared(pipeline, "transformer", "vae", "text_encoder")
    rows, columns = stock.latents_of(pipeline, 0, 2 * factor, image_size or (1024, 1024))  # as a call without a size
    schedule = flow.schedule_of(pipeline.scheduler, flow.mu_of(pipeline.scheduler, rows * columns))
    height, width = 2 * rows, 2 * columns
    encode, decode = stock.autoencoder(pipeline.vae)
    length = stock.own(pipeline, "max_sequence_length")

    @torch.no_grad()
    def encode_prompts(prompts: Sequence[str]) -> Cond:
        texts, _ = pipeline.encode_prompt(
            list(prompts), device, do_classifier_free_guidance=False, max_sequence_length=length + 1
        )
        return stock.padded(texts, length)

    def read(output: Any, x_t: Tensor) -> Tensor:
        tokens = x_t.shape[-2] * x_t.shape[-1] // 4
        return stock.tokens_as_map(output[:, :tokens], x_t, 2)  # padding and the text come after the image

    found = flow.family(
        pipeline,
        Denoiser(network, schedule, "flow", call, autocast, read),
        encode_prompts,
        encode,
        decode,
        latent_shape=(network.config.in_channels, height, width),
        size={"height": height * factor, "width": width * factor},
        blocks=[
            Block(f"layers.{i}", network.config.dim, min(rows, columns)) for i in stock.some(network.config.n_layers)
        ],
        ask=flow.by_sigmas,
        start=start,
    )
    return replace(found, unguided=0.0)


load = stock.loader(wrap)
