"""FLUX.2 dev and klein: ``Flux2Pipeline`` and ``Flux2KleinPipeline``, a language model's inner states as text.

Latents are the autoencoder's in patches of 2 x 2, normalised by its batch statistics, as the pipelines draw their
noise. They shift the times by the image size and the number of steps: a teacher is trained on with the shift of the
stock call's default number, a student's is that of its own.

Dev takes a guidance scale as an input, and its embedding has no place to fold another in: it is called at the stock
call's default, 4, in every role. Klein takes none and is guided as usual; its students leave with ``is_distilled``,
which makes the stock call not guide them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, format_input
from torch import Tensor, nn

from fastgen.denoiser import Cond, Denoiser
from fastgen.family import About, Block, Family
from fastgen.schedule import Flow
from fastgen.transfer import to_device

from . import flow, stock

ABOUT = About(
    pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
    kinds=("flow",),
    schedulers={"renoise": flow.SCHEDULER, "ddim": flow.SCHEDULER},
    lora=True,
)


def tokens_of(x_t: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H W, C]."""
    return x_t.flatten(2).transpose(1, 2)


def noise(x_t: Tensor) -> Tensor:
    """Noise for x_t, drawn in the order of its tokens."""
    return stock.tokens_as_map(torch.randn(tokens_of(x_t).shape, device=x_t.device), x_t, 1)


def read(output: Any, x_t: Tensor) -> Tensor:
    """Of a block that gives (text, image), or both in one sequence."""
    tokens = output[1] if isinstance(output, tuple) else output[:, -x_t.shape[-2] * x_t.shape[-1] :]
    return stock.tokens_as_map(tokens, x_t, 1)


def wrap(
    pipeline: Flux2Pipeline | Flux2KleinPipeline,
    autocast: torch.dtype | None = None,
    start: float = 1.0,
    image_size: tuple[int, int] | None = None,
) -> Family:
    """The family of a pipeline that is already in memory. Raises ValueError if its scheduler is not understood."""
    network, vae, device, factor = pipeline.transformer, pipeline.vae, pipeline.device, pipeline.vae_scale_factor
    stock.prepared(pipeline, "transformer", "vae", "text_encoder")
    rows, columns = stock.latents_of(network, pipeline.default_sample_size // 2, 2 * factor, image_size)
    klein = isinstance(pipeline, Flux2KleinPipeline)
    scale = None if klein or not network.config.guidance_embeds else stock.own(pipeline, "guidance_scale")
    mean = vae.bn.running_mean.reshape(-1, 1, 1)
    std = (vae.bn.running_var.reshape(-1, 1, 1) + vae.config.batch_norm_eps).sqrt()
    patched = nn.functional.pixel_unshuffle

    def shifted(num_steps: int) -> float:
        return flow.schedule_of(pipeline.scheduler, compute_empirical_mu(rows * columns, num_steps)).shift

    schedule = Flow(shift=shifted(stock.own(pipeline, "num_inference_steps")))

    def call(network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t: [B, C, H, W]; t: [B] in [0, 1]; cond: text [B, L, D] -> y: [B, C, H, W]."""
        found: Tensor = network(
            hidden_states=tokens_of(x_t),
            timestep=t.float(),
            guidance=None if scale is None else torch.full((len(x_t),), scale, device=x_t.device),
            encoder_hidden_states=cond["text"],
            txt_ids=to_device(Flux2Pipeline._prepare_text_ids(cond["text"][:1]), x_t.device),
            img_ids=to_device(Flux2Pipeline._prepare_latent_ids(x_t[:1]), x_t.device),
            return_dict=False,
        )[0]
        return stock.tokens_as_map(found, x_t, 1)

    def length_of(prompt: str) -> int:
        """Of a prompt in its chat, in tokens."""
        tokenizer = pipeline.tokenizer
        if not klein:
            chats = format_input([prompt], pipeline.system_message)
            return len(tokenizer.apply_chat_template(chats, tokenize=True, return_dict=True)["input_ids"][0])
        asked, how = [{"role": "user", "content": prompt}], {"add_generation_prompt": True, "enable_thinking": False}
        return len(tokenizer(tokenizer.apply_chat_template(asked, tokenize=False, **how)).input_ids)

    @torch.no_grad()
    def encode_prompts(prompts: Sequence[str]) -> Cond:
        stock.warn_if_cut(map(length_of, prompts), stock.own(pipeline, "max_sequence_length"))
        return {"text": pipeline.encode_prompt(list(prompts), device=device)[0].float()}

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        return (patched(vae.encode(pixels.to(device)).latent_dist.mode().float(), 2) - mean) / std

    def decode(latents: Tensor) -> Tensor:
        return vae.decode(nn.functional.pixel_shuffle(latents * std + mean, 2), return_dict=False)[0].float()

    def unpacked(made: Tensor) -> Tensor:
        """What a call gives: klein's are the autoencoder's own."""
        return (patched(made, 2) - mean) / std if klein else made.transpose(1, 2).unflatten(2, (rows, columns))

    def fix_guidance(wanted: float) -> None:
        if wanted != scale:
            raise ValueError(
                f"model.guidance_scale {wanted:g}: this network's guidance embedding has no bias to fold it into; "
                f"leave it out, which is {scale:g}"
            )

    names = [f"transformer_blocks.{i}" for i in range(network.config.num_layers)]
    names += [f"single_transformer_blocks.{i}" for i in range(network.config.num_single_layers)]
    found = flow.family(
        pipeline,
        Denoiser(network, schedule, "flow", call, autocast, read),
        encode_prompts,
        encode,
        decode,
        latent_shape=(network.config.in_channels, rows, columns),
        size={"height": 2 * rows * factor, "width": 2 * columns * factor},
        blocks=[Block(names[i], network.inner_dim, min(rows, columns)) for i in stock.some(len(names))],
        ask=flow.by_sigmas,
        start=start,
        unpack=unpacked,
        shift=shifted,
        settings={"is_distilled": True} if klein else {},
    )
    return replace(found, global_noise=noise, unguided=scale, fix_guidance=None if scale is None else fix_guidance)


load = stock.loader(wrap)
