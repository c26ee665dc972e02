"""What the families share of stock pipelines: opening one, putting it together anew, calling it, its autoencoder."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fastgen.family import Family, Run


def loader(wrap: Callable[..., Family], **given: Any) -> Callable[..., Family]:
    """The ``load`` of a family. wrap: its own; given: further arguments of ``from_pretrained``."""

    def load(
        path: str | Path,
        device: torch.device | str = "cpu",
        autocast: torch.dtype | None = None,
        start: float = 1.0,
        image_size: tuple[int, int] | None = None,
    ) -> Family:
        """Load a pipeline folder or a Hub id. Weights are float32; ``autocast`` is what the denoisers compute in.

        start: the share of the times at which students are called first. image_size: (height, width) in pixels; None:
        the pipeline's own.
        """
        pipeline = DiffusionPipeline.from_pretrained(path, dtype=torch.float32, **given)
        return wrap(pipeline.to(device), autocast, start, image_size)

    return load


def prepared(pipeline: Any, *networks: str) -> None:
    """Freeze the parts of these names, those that are there, and keep the pipeline from drawing bars."""
    pipeline.set_progress_bar_config(disable=True)
    for name in networks:
        part = getattr(pipeline, name, None)
        if part is not None:
            part.requires_grad_(False).eval()


def rebuilt(pipeline: Any, **parts: Any) -> Any:
    """A pipeline of the same class and settings with these parts in the place of its own."""
    own = {**pipeline.config, **pipeline.components}
    wanted = inspect.signature(type(pipeline).__init__).parameters
    made = type(pipeline)(**{name: own[name] for name in wanted if name in own} | parts)
    made.set_progress_bar_config(disable=True)
    return made


def caller(unpack: Callable[[Tensor], Tensor] = lambda latents: latents, **size: Any) -> Run:
    """The ``run`` of a family whose pipeline takes prompts and gives latents. size: what its call is told of it."""

    def run(
        pipeline: Any,
        prompts: Sequence[str],
        num_steps: int,
        generator: torch.Generator,
        guidance_scale: float | None = None,
        **more: Any,
    ) -> Tensor:
        given = {"num_inference_steps": num_steps, "generator": generator, "output_type": "latent", **size, **more}
        if guidance_scale is not None:
            given["guidance_scale"] = guidance_scale
        made = pipeline(prompt=list(prompts), **given)[0]
        return unpack(made) if given["output_type"] == "latent" else made

    return run


def latents_of(
    component: Any, side: int | Sequence[int], factor: int, image_size: tuple[int, int] | None
) -> tuple[int, int]:
    """(height, width) of latents: the network's own, or those of an image size, a multiple of ``factor`` pixels.

    Raises ValueError if it is none.
    """
    if image_size is None:
        height, width = (side, side) if isinstance(side, int) else side
        return height, width
    if any(pixels % factor for pixels in image_size):
        raise ValueError(
            f"image size {image_size[0]} x {image_size[1]}: {type(component).__name__} takes multiples of {factor}"
        )
    return image_size[0] // factor, image_size[1] // factor


def autoencoder(vae: Any) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """(encode, decode) of an ``AutoencoderKL``: pixels [B, 3, H, W] in [-1, 1] to latents as denoisers see them."""
    scaling, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        latents: Tensor = vae.encode(pixels.to(vae.device)).latent_dist.mode()
        return (latents.float() - shift) * scaling

    def decode(latents: Tensor) -> Tensor:
        pixels: Tensor = vae.decode(latents / scaling + shift, return_dict=False)[0]
        return pixels.float()

    return encode, decode


def tokens_as_map(tokens: Tensor, x_t: Tensor, patch: int) -> Tensor:
    """A transformer's tokens, one for each patch of x_t: [B, C, H, W], row by row: [B, N, D] -> [B, D, H/p, W/p]."""
    return tokens.transpose(1, 2).unflatten(2, (x_t.shape[-2] // patch, x_t.shape[-1] // patch))


def some(depth: int) -> list[int]:
    """Four blocks of a deep network, at even distances, for a discriminator to read; all of a shallow one's."""
    return sorted({round((i + 1) * depth / 4) - 1 for i in range(4)} - {-1})
