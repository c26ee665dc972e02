"""SANA-Sprint: ``SanaSprintPipeline``, Sana's transformer with the guidance scale as an input, sampled in TrigFlow.

The pipeline calls its transformer on rectified flow, at t = tan(tau) / (1 + tan(tau)) in [0, 1], and makes of its
output TrigFlow's, which names the same x0 and eps (``fastgen.coordinates``): schedule and kind are those of ``sana``.
``SCMScheduler`` noises afresh between times tau that no config says: pi / 2 and 1.3 for two steps, and for any other
number even ones, if the call is told ``intermediate_timesteps=None`` as ``run`` does; without, it is an error.

A ``SanaPipeline`` teaches here, too, if its transformer takes times of 0 to 1. Its students leave as
``SanaSprintPipeline``, so ``scm`` with ``guidance.embed`` makes a SANA-Sprint of it (Chen et al. 2025, arXiv
2503.09641). By its class it is of the family ``sana``; name this one.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import SanaPipeline, SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler
from torch import Tensor, nn

from fastgen.denoiser import Cond, Denoiser
from fastgen.family import About, Family
from fastgen.sampling import Sampler
from fastgen.schedule import Flow

from . import flow, sana, stock

ABOUT = About(
    pipelines=("SanaSprintPipeline", "SanaPipeline"),
    kinds=("flow",),
    schedulers={"renoise": "SCMScheduler"},
    lora=True,
)
UNIT = 0.001
"""timestep_scale of a transformer that takes times of 0 to 1."""


def wrap(
    pipeline: SanaSprintPipeline | SanaPipeline,
    autocast: torch.dtype | None = None,
    start: float = 1.0,
    image_size: tuple[int, int] | None = None,
) -> Family:
    """The family of a pipeline that is already in memory.

    Raises ValueError if its scheduler is not understood, if its transformer takes other times, or if ``start`` is not
    1, which no config says.
    """
    plain = isinstance(pipeline, SanaPipeline)
    scale_of_times = pipeline.transformer.config.timestep_scale
    if plain and scale_of_times != UNIT:
        raise ValueError(
            f"SanaSprintPipeline gives its transformer times of 0 to 1, this one takes them times "
            f"{1000 * scale_of_times:g}; name a teacher of timestep_scale {UNIT}, or the family sana"
        )
    if start != 1.0:
        raise ValueError(f"student.start {start:g} cannot be told SCMScheduler; leave it out")
    schedule = flow.schedule_of(pipeline.scheduler) if plain else Flow()
    scheduler = SCMScheduler() if plain else pipeline.scheduler
    stock.prepared(pipeline, "transformer", "vae", "text_encoder")
    network, factor = with_input(pipeline.transformer), pipeline.vae_scale_factor
    height, width = stock.latents_of(network, network.config.sample_size, factor, image_size)
    encode_prompts, uncond = sana.text(pipeline)
    encode, decode = sana.autoencoder(pipeline.vae)
    unit = network.config.guidance_embeds_scale

    def call(network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t: [B, C, H, W]; t: [B] in [0, 1]; cond: text, mask, perhaps guidance [B] -> y: [B, C, H, W]."""
        scale = cond["guidance"] if "guidance" in cond else torch.ones_like(t)  # any will do: it is ignored
        found: Tensor = network(
            x_t,
            encoder_hidden_states=cond["text"],
            encoder_attention_mask=cond["mask"],
            guidance=scale.float() * unit,
            timestep=t.float(),
            return_dict=False,
        )[0]
        return found

    def with_network(made: nn.Module, num_steps: int | None, sampler: Sampler = "renoise") -> Any:
        if plain and num_steps is None:
            return stock.rebuilt(pipeline, transformer=without_input(made))
        if num_steps is not None and sampler != "renoise":
            raise ValueError(
                f"SCMScheduler noises x0 afresh, and these students are sampled by {sampler}; name the family sana"
            )
        student = SanaSprintPipeline(**{**pipeline.components, "transformer": made, "scheduler": scheduler})
        student.set_progress_bar_config(disable=True)
        return student

    stock_call = stock.caller(height=height * factor, width=width * factor, use_resolution_binning=False)

    def run(
        pipeline: Any,
        prompts: Sequence[str],
        num_steps: int,
        generator: torch.Generator,
        guidance_scale: float | None = None,
        **more: Any,
    ) -> Tensor:
        more |= {} if isinstance(pipeline, SanaPipeline) else told(num_steps)
        return stock_call(pipeline, prompts, num_steps, generator, guidance_scale, **more)

    return Family(
        denoiser=Denoiser(network, schedule, "flow", call, autocast, sana.reader(network)),
        latent_shape=(network.config.in_channels, height, width),
        encode_prompts=encode_prompts,
        uncond=uncond,
        encode=encode,
        decode=decode,
        student=lambda embed_guidance=False: student_of(network, embed_guidance),
        student_times=lambda n: times(scheduler, n),
        blocks=sana.blocks(network, min(height, width)),
        pipeline=with_network,
        image_size=(height * factor, width * factor),
        run=run,
        told=told,
        unguided=None,
        stock_guidance=inspect.signature(SanaSprintPipeline.__call__).parameters["guidance_scale"].default,
        fix_guidance=(lambda scale: fix_guidance(network, scale)) if takes_guidance(network) else None,
        component="" if plain else "transformer",  # SanaPipeline has no place for what the times are
    )


def told(num_steps: int) -> dict[str, Any]:
    """What the stock call must be told of this number of steps besides the number."""
    return {} if num_steps == 2 else {"intermediate_timesteps": None}


def times(scheduler: SCMScheduler, num_steps: int) -> list[float]:
    """Those at which the pipeline calls its transformer."""
    made = copy.deepcopy(scheduler)
    made.set_timesteps(num_steps, **told(num_steps))
    tau = made.timesteps[:-1].double()
    # the pipeline's pi / 2 is 1.57080, which is 4e-6 past pure noise
    return [min(float(t), 1.0) for t in tau.sin() / (tau.sin() + tau.cos())]


@torch.no_grad()
def with_input(transformer: SanaTransformer2DModel) -> SanaTransformer2DModel:
    """The transformer with the guidance scale as an input that does nothing, round the same layers; itself if it has.

    The input's first layer begins as that of the time.
    """
    if transformer.config.guidance_embeds:
        return transformer
    made, embedding = _round(transformer, guidance_embeds=True), transformer.time_embed
    made.time_embed.timestep_embedder, made.time_embed.linear = embedding.emb.timestep_embedder, embedding.linear
    made.time_embed.guidance_embedder = copy.deepcopy(embedding.emb.timestep_embedder)
    _silence(made.time_embed.guidance_embedder)
    return made


def without_input(transformer: SanaTransformer2DModel) -> SanaTransformer2DModel:
    """The inverse of ``with_input``. Raises ValueError if the guidance scale does something."""
    if takes_guidance(transformer):
        raise ValueError("SanaPipeline gives its transformer no guidance scale; set guidance.embed: false")
    made, embedding = _round(transformer, guidance_embeds=False), transformer.time_embed
    made.time_embed.emb.timestep_embedder, made.time_embed.linear = embedding.timestep_embedder, embedding.linear
    return made


def _round(transformer: SanaTransformer2DModel, guidance_embeds: bool) -> Any:
    """A transformer whose layers are this one's but for ``time_embed``, which is without weights."""
    with torch.device("meta"):
        # an override: what the config left at its default, from_config would take for unset
        made = SanaTransformer2DModel.from_config(transformer.config, guidance_embeds=guidance_embeds)
    for name, layer in transformer.named_children():
        if name != "time_embed":
            setattr(made, name, layer)
    made.scale_shift_table = transformer.scale_shift_table
    return made.train(transformer.training)


def _silence(embedder: Any) -> None:
    nn.init.zeros_(embedder.linear_2.weight)
    nn.init.zeros_(embedder.linear_2.bias)


@torch.no_grad()
def _given(transformer: SanaTransformer2DModel, scale: float) -> Tensor:
    """What the guidance scale adds to the embedding of the time: [D]."""
    embedding, unit = transformer.time_embed, transformer.config.guidance_embeds_scale
    found: Tensor = embedding.guidance_embedder(
        embedding.guidance_condition_proj(torch.tensor([scale], device=transformer.device) * unit)
    )
    return found[0]


def takes_guidance(transformer: SanaTransformer2DModel) -> bool:
    """Whether what it gives depends on the guidance scale."""
    return bool(_given(transformer, 1.0).any())


@torch.no_grad()
def fix_guidance(transformer: SanaTransformer2DModel, scale: float) -> None:
    """Let it always do what it does at this guidance scale, whose part of the time embedding is then a constant."""
    transformer.time_embed.timestep_embedder.linear_2.bias += _given(transformer, scale)
    _silence(transformer.time_embed.guidance_embedder)


def student_of(transformer: SanaTransformer2DModel, embed_guidance: bool = False) -> SanaTransformer2DModel:
    """A trainable copy whose guidance embedding does nothing, frozen or to be learnt."""
    result = copy.deepcopy(transformer).requires_grad_(True)
    embedder = result.time_embed.guidance_embedder
    _silence(embedder)
    embedder.requires_grad_(embed_guidance)
    return result


load = stock.loader(wrap)
