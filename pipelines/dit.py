"""DiT: ``DiTPipeline``, a transformer on latents that knows classes by number, with learned variances.

A prompt is a word of the pipeline's own labels, or a number (``fastgen.calls``). The learned variances are dropped, as
the stock call does; its guidance is against the class past the last, the null class, of networks of 1000 classes. It
makes one size only. A student leaves with an LCM scheduler, whose noise is torch's global one since the call hands no
generator on, or DDIM's, and is called at guidance_scale 1.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiTPipeline
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from fastgen import calls
from fastgen.denoiser import Cond, Denoiser
from fastgen.family import About, Block, Family
from fastgen.sampling import Sampler
from fastgen.students import Students

from . import stock, vp
from .students import DiTStudents

ABOUT = About(
    pipelines=("DiTPipeline",),
    kinds=("eps", "v", "x0"),
    schedulers={"renoise": "LCMScheduler", "ddim": "DDIMScheduler"},
    lora=False,
)


def call(network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """x_t: [B, C, H, W]; t: [B] timesteps; cond: label [B], integers -> y: [B, C, H, W], without variances."""
    found: Tensor = network(x_t, timestep=t.float(), class_labels=cond["label"], return_dict=False)[0]
    return found[:, : x_t.shape[1]]


def wrap(
    pipeline: DiTPipeline,
    autocast: torch.dtype | None = None,
    start: float = 1.0,
    image_size: tuple[int, int] | None = None,
) -> Family:
    """The family of a pipeline that is already in memory. Raises ValueError if its scheduler is not understood."""
    schedule, kind = vp.schedule_of(pipeline.scheduler), vp.kind_of(pipeline.scheduler)
    network, device = pipeline.transformer, pipeline.device
    side, factor = network.config.sample_size, 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    size = stock.fixed_size(pipeline, image_size, (side * factor, side * factor))
    stock.prepared(pipeline, "transformer", "vae")
    for part in network.modules():
        if isinstance(part, LabelEmbedding):  # which in training drops labels by itself, by no noise of ours
            part.dropout_prob = 0.0
    encode, decode = stock.autoencoder(pipeline.vae)
    patch = network.config.patch_size

    def encode_prompts(prompts: Sequence[str]) -> Cond:
        return {"label": torch.tensor(calls.labels(pipeline, prompts), device=device)}

    def with_network(made: nn.Module, num_steps: int | None, sampler: Sampler = "renoise") -> DiTPipeline:
        parts: dict[str, Any] = {"transformer": made}
        if isinstance(made, Students):
            parts["transformer"] = DiTStudents.of(list(made), made.router.axes, made.router.cuts)
        if num_steps is not None:
            parts["scheduler"] = vp.plain_student_scheduler(pipeline.scheduler, num_steps, sampler, start)
        result = stock.rebuilt(pipeline, **parts)
        if pipeline.labels:  # which a pipeline does not keep in the config that it saves
            words: dict[str, str] = {}
            for word, number in pipeline.labels.items():
                words[str(number)] = f"{words[str(number)]}, {word}" if str(number) in words else word
            result.register_to_config(id2label=words)
            result.labels = dict(pipeline.labels)
        return result

    return Family(
        denoiser=Denoiser(network, schedule, kind, call, autocast, lambda y, x_t: stock.tokens_as_map(y, x_t, patch)),
        latent_shape=(network.config.in_channels, side, side),
        encode_prompts=encode_prompts,
        uncond=lambda: {"label": torch.tensor([network.config.num_embeds_ada_norm], device=device)},
        encode=encode,
        decode=decode,
        student=lambda embed_guidance=False: copy.deepcopy(network).requires_grad_(True),
        student_times=lambda n: vp.times(vp.student_scheduler(pipeline.scheduler, n, start=start), n),
        blocks=[
            Block(f"transformer_blocks.{i}", network.inner_dim, side // patch)
            for i in stock.some(network.config.num_layers)
        ],
        pipeline=with_network,
        image_size=size,
        run=stock.caller_for_images(pipeline),
        step_noise="global",
        routed_by="label",
    )


load = stock.loader(wrap)
