"""The family ``sana_sprint`` for the contract: its own class, whose guidance scale does nothing yet."""

from __future__ import annotations

from diffusers import SanaSprintPipeline, SCMScheduler

from fastgen.sampling import renoise

from . import sana
from .parts import Case


def pipeline(seed: int, guided: bool = False) -> SanaSprintPipeline:
    """guided: its transformer makes something of the guidance scale."""
    made = sana.pipeline(seed, timestep_scale=0.001, guidance_embeds=True)
    embedder = made.transformer.time_embed.guidance_embedder.linear_2
    if not guided:
        embedder.weight.data.zero_()
        embedder.bias.data.zero_()
    return SanaSprintPipeline(**{**made.components, "scheduler": SCMScheduler()})


CASE = Case(
    pipeline,
    guidance_scale=None,
    image_sizes=sana.CASE.image_sizes,
    prompts=sana.CASE.prompts,
    step=renoise,
    samplers=("renoise",),
)
