"""Stable Diffusion XL: ``StableDiffusionXLPipeline``, two text encoders, pooled embeddings and sizes as conditions.

Both prediction types. The sizes told to the network are those of the image, uncropped, as the stock call does.
Students leave as those of ``sd`` do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from fastgen.denoiser import Cond
from fastgen.family import About, Family
from fastgen.transfer import to_device

from . import stock, unet

ABOUT = About(
    pipelines=("StableDiffusionXLPipeline",),
    kinds=("eps", "v", "x0"),
    schedulers={"renoise": "LCMScheduler", "ddim": "TCDScheduler"},
    lora=True,
)


def wrap(
    pipeline: StableDiffusionXLPipeline,
    autocast: torch.dtype | None = None,
    start: float = 1.0,
    image_size: tuple[int, int] | None = None,
) -> Family:
    """The family of a pipeline that is already in memory. Raises ValueError if its scheduler is not understood."""
    device, factor = pipeline.device, pipeline.vae_scale_factor
    stock.prepared(pipeline, "unet", "vae", "text_encoder", "text_encoder_2")

    def call(network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t: [B, C, H, W]; t: [B] timesteps; cond: text [B, L, D], pooled [B, P], perhaps guidance [B]."""
        size = [side * factor for side in x_t.shape[-2:]]
        ids = to_device(torch.tensor([*size, 0, 0, *size], dtype=cond["pooled"].dtype), x_t.device)
        found: Tensor = network(
            x_t,
            t.float(),
            encoder_hidden_states=cond["text"],
            timestep_cond=unet.embedded(network, cond),
            added_cond_kwargs={"text_embeds": cond["pooled"], "time_ids": ids.expand(len(x_t), 6)},
            return_dict=False,
        )[0]
        return found

    @torch.no_grad()
    def encoded(prompts: Sequence[str], guided: bool) -> tuple[Tensor, ...]:
        return pipeline.encode_prompt(list(prompts), device=device, do_classifier_free_guidance=guided)

    def encode_prompts(prompts: Sequence[str]) -> Cond:
        text, _, pooled, _ = encoded(prompts, guided=False)
        return {"text": text.float(), "pooled": pooled.float()}

    def uncond() -> Cond:
        _, text, _, pooled = encoded([""], guided=True)  # zeros, where the pipeline is set so
        return {"text": text.float(), "pooled": pooled.float()}

    return unet.family(pipeline, call, encode_prompts, uncond, autocast, start, image_size)


load = stock.loader(wrap)
