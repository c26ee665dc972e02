"""Stable Diffusion XL: ``StableDiffusionXLPipeline``, two text encoders, pooled embeddings and sizes as conditions.

Both prediction types. The sizes told to the network are those of the image, uncropped, as the stock call does.
Students leave as those of ``sd`` do.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from fastgen.denoiser import Cond, Denoiser
from fastgen.family import About, Family
from fastgen.sampling import Sampler

from . import stock, unet, vp

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
    schedule, kind = vp.schedule_of(pipeline.scheduler), vp.kind_of(pipeline.scheduler)
    network, device, factor = pipeline.unet, pipeline.device, pipeline.vae_scale_factor
    stock.prepared(pipeline, "unet", "vae", "text_encoder", "text_encoder_2")
    height, width = stock.latents_of(network, network.config.sample_size, factor, image_size)
    encode, decode = stock.autoencoder(pipeline.vae)

    def call(network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t: [B, C, H, W]; t: [B] timesteps; cond: text [B, L, D], pooled [B, P], perhaps guidance [B]."""
        size = [side * factor for side in x_t.shape[-2:]]
        ids = torch.tensor([*size, 0, 0, *size], dtype=cond["pooled"].dtype, device=x_t.device)
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

    def with_network(
        made: nn.Module, num_steps: int | None, sampler: Sampler = "renoise"
    ) -> StableDiffusionXLPipeline:
        parts = {"unet": unet.one_unet(made)}
        if num_steps is not None:
            parts["scheduler"] = vp.student_scheduler(pipeline.scheduler, num_steps, sampler, start)
        return stock.rebuilt(pipeline, **parts)

    return Family(
        denoiser=Denoiser(network, schedule, kind, call, autocast),
        latent_shape=(network.config.in_channels, height, width),
        encode_prompts=encode_prompts,
        uncond=uncond,
        encode=encode,
        decode=decode,
        student=lambda embed_guidance=False: unet.student(network, embed_guidance),
        student_times=lambda n: vp.times(vp.student_scheduler(pipeline.scheduler, n, start=start), n),
        blocks=unet.blocks(network, min(height, width)),
        pipeline=with_network,
        image_size=(height * factor, width * factor),
        run=stock.caller(height=height * factor, width=width * factor),
        unguided=None,
        stock_guidance=inspect.signature(StableDiffusionXLPipeline.__call__).parameters["guidance_scale"].default,
        fix_guidance=(lambda scale: unet.fix_guidance(network, scale)) if unet.takes_guidance(network) else None,
        component="unet",
    )


load = stock.loader(wrap)
