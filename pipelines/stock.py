"""What the families share of stock pipelines: opening one, putting it together anew, calling it, its autoencoder."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fastgen import calls, export
from fastgen.denoiser import Cond
from fastgen.family import Family, Run

from . import absent


def loader(wrap: Callable[..., Family], **given: Any) -> Callable[..., Family]:
    """The ``load`` of a family. wrap: its own; given: further arguments of ``from_pretrained``."""

    def load(
        path: str | Path | DiffusionPipeline,
        device: torch.device | str = "cpu",
        autocast: torch.dtype | None = None,
        start: float = 1.0,
        image_size: tuple[int, int] | None = None,
        num_frames: int | None = None,
        without: Sequence[str] = (),
    ) -> Family:
        """Load a pipeline folder or a Hub id. Weights are float32; ``autocast`` is what the denoisers compute in.

        path: or a pipeline that is already in memory, which stays where it is. start: the share of the times at which
        students are called first. image_size: (height, width) in pixels; None: the pipeline's own. num_frames: of a
        video; None: the pipeline's own. Raises ValueError if it is given to a family of images. without: parts that
        stay out of memory until ``Family.whole``: "text", "vae", "network".
        """
        frames: dict[str, Any] = {} if num_frames is None else {"num_frames": num_frames}
        if frames and "num_frames" not in inspect.signature(wrap).parameters:
            raise ValueError(f"num_frames {num_frames}: this pipeline makes images; leave it out")
        if isinstance(path, DiffusionPipeline):
            return wrap(path, autocast, start, image_size, **frames)
        if without:
            partly = absent.Pipeline(path, device, without, given)

            def whole(family: Family) -> Family:
                with export.opening(path):
                    partly.fill()
                    export.whole(partly.pipeline, path)
                return family

            family = replace(wrap(partly.pipeline, autocast, start, image_size, **frames), whole=whole)
            return tried(family, path)
        pipeline = DiffusionPipeline.from_pretrained(path, dtype=torch.float32, use_safetensors=True, **given)
        export.whole(pipeline, path)
        return tried(wrap(pipeline.to(device), autocast, start, image_size, **frames), path)

    return load


def tried(family: Family, path: str | Path) -> Family:
    """The family with ``export.tried`` round what it calls its pipeline's components by."""
    return replace(
        family,
        denoiser=replace(family.denoiser, call=export.tried(family.denoiser.call, path)),
        encode_prompts=export.tried(family.encode_prompts, path),
        uncond=export.tried(family.uncond, path),
        encode=export.tried(family.encode, path),
        decode=export.tried(family.decode, path),
    )


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


def caller_for_images(own: Any) -> Run:
    """The ``run`` of a family whose pipeline gives images alone: its scheduler's last step gives the latents.

    own: the family's pipeline, whose class says what a call takes of prompts and guidance.
    """

    def run(
        pipeline: Any,
        prompts: Sequence[str],
        num_steps: int,
        generator: torch.Generator,
        guidance_scale: float | None = None,
        **more: Any,
    ) -> Tensor:
        given = calls.settled(own, {"num_inference_steps": num_steps, "guidance_scale": guidance_scale})
        given |= {"generator": generator, "output_type": "pt", **calls.prompted(own, prompts), **more}
        if "output_type" in more:
            return pipeline(**given)[0]
        with _last_step(pipeline.scheduler) as found:
            pipeline(**given)
        return found[0][: len(prompts)]  # of a guided batch both halves are the same

    return run


@contextmanager
def _last_step(scheduler: Any) -> Iterator[list[Tensor]]:
    """Within it, the list holds what the scheduler's latest step gave."""
    step = scheduler.step
    found: list[Tensor] = []

    def kept(*args: Any, **named: Any) -> Any:
        output = step(*args, **named)
        found[:] = [output[0]]
        return output

    scheduler.step = kept
    try:
        yield found
    finally:
        del scheduler.step


def fixed_size(pipeline: Any, image_size: tuple[int, int] | None, own: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a pipeline whose call takes none. Raises ValueError if another is asked for."""
    if image_size not in (None, own):
        raise ValueError(
            f"image size {image_size[0]} x {image_size[1]}: the call of {type(pipeline).__name__} takes none and "
            f"makes {own[0]} x {own[1]}; leave it out"
        )
    return own


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


def own(pipeline: Any, name: str) -> Any:
    """What the pipeline's own call has for an argument that is not given."""
    return inspect.signature(type(pipeline).__call__).parameters[name].default


def frames_of(pipeline: Any, num_frames: int, factor: int) -> tuple[int, int]:
    """(frames, those of the latents): the first stands alone, then ``factor`` make one of the latents.

    Raises ValueError if that does not come out even.
    """
    if (num_frames - 1) % factor:
        below = (num_frames - 1) // factor * factor + 1
        raise ValueError(
            f"num_frames {num_frames}: {type(pipeline).__name__} makes 1 and a multiple of {factor}; "
            f"give {below} or {below + factor}"
        )
    return num_frames, (num_frames - 1) // factor + 1


def clips(pixels: Tensor, num_frames: int) -> Tensor:
    """Clips as they are, images as clips that stand still: [B, 3, F, H, W] or [B, 3, H, W] -> [B, 3, F, H, W].

    Raises ValueError if they have another number of frames.
    """
    made = pixels[:, :, None].expand(-1, -1, num_frames, -1, -1) if pixels.ndim == 4 else pixels
    if made.shape[2] != num_frames:
        raise ValueError(f"clips of {made.shape[2]} frames, this family has {num_frames}; set model.num_frames")
    return made


def clip_autoencoder(
    vae: Any, num_frames: int, mean: Tensor | float, std: Tensor | float, *when: Tensor
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """(encode, decode) of an autoencoder of videos: images or clips to latents [B, C, F, H, W], and clips of these.

    mean, std: of the autoencoder's own latents, which ours are without: numbers, or [C, 1, 1, 1]. when: the timestep
    at which it decodes, where it takes one: [1].
    """

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        latents: Tensor = vae.encode(clips(pixels.to(vae.device), num_frames)).latent_dist.mode()
        return (latents.float() - mean) / std

    def decode(latents: Tensor) -> Tensor:
        pixels: Tensor = vae.decode(latents * std + mean, *(t.expand(len(latents)) for t in when), return_dict=False)[
            0
        ]
        return pixels.float()

    return encode, decode


def tokens_as_map(tokens: Tensor, x_t: Tensor, patch: int) -> Tensor:
    """A transformer's tokens, one for each patch of x_t: [B, ..., H, W], row by row: [B, N, D] -> [B, D, H/p, W/p].

    Of a video the frames, or patches of them, are one below another: [B, D, F H/p, W/p].
    """
    return tokens.transpose(1, 2).unflatten(2, (-1, x_t.shape[-1] // patch))


def image_tokens(output: Any, x_t: Tensor) -> Tensor:
    """Of a block that gives (text, image), the latter's tokens of 2 x 2 as a map: [B, D, H / 2, W / 2]."""
    return tokens_as_map(output[1], x_t, 2)


def warn_if_cut(lengths: Iterable[int], limit: int) -> None:
    """Warn where prompts of so many tokens are cut: some stock calls do not say so."""
    longest = max(lengths)
    if longest > limit:
        warnings.warn(f"a prompt of {longest} tokens was cut to {limit}; shorten it", stacklevel=3)


def padded(rows: Sequence[Tensor], length: int) -> Cond:
    """Texts of unlike lengths in one width: [L, D] each -> text [B, length, D] and mask [B, length], True at theirs.

    Longer ones are cut, with a warning.
    """
    if any(len(row) > length for row in rows):  # how much longer, the stock encoder does not tell
        warnings.warn(f"a prompt was cut to {length} tokens; shorten it", stacklevel=3)
    text = torch.zeros(len(rows), length, rows[0].shape[-1], device=rows[0].device)
    mask = torch.zeros(len(rows), length, dtype=torch.bool, device=rows[0].device)
    for i, row in enumerate(rows):
        text[i, : len(row)], mask[i, : len(row)] = row[:length].float(), True
    return {"text": text, "mask": mask}


def packed(x_t: Tensor) -> Tensor:
    """Latents as tokens of 2 x 2, row by row: [B, C, H, W] -> [B, H W / 4, 4 C]."""
    return nn.functional.pixel_unshuffle(x_t, 2).flatten(2).transpose(1, 2)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of ``packed``. height, width: of the latents."""
    return nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def packed_noise(x_t: Tensor) -> Tensor:
    """Noise for x_t, drawn in the order of its tokens."""
    return unpacked(torch.randn(packed(x_t).shape, device=x_t.device), *x_t.shape[-2:])


def some(depth: int) -> list[int]:
    """Four blocks of a deep network, at even distances, for a discriminator to read; all of a shallow one's."""
    return sorted({round((i + 1) * depth / 4) - 1 for i in range(4)} - {-1})
