"""The images that a pipeline is judged by: made once, one seed each, kept as PNG."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fastgen import calls, parallel
from fastgen.checkpoint import atomic_file, write_text
from fastgen.export import called
from fastgen.plain import from_json
from fastgen.rng import seed_of

log = logging.getLogger("fastgen")

SETTINGS = "settings.json"


def generate(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 32,
    call: Mapping[str, Any] | None = None,
) -> Iterator[Tensor]:
    """Batches of uint8 [B, 3, H, W], image i from prompts[i] and a CPU generator seeded with seeds[i].

    So an image does not depend on the batch it is in, but for the rounding of the networks' arithmetic; and for
    pipelines that draw noise between steps from torch's global generator (``Family.step_noise``), which is seeded for
    each batch. call: further arguments of the pipeline's. Of a video it is the middle frame.

    Raises:
        ValueError: without prompts, or with another number of seeds.
    """
    if not prompts:
        raise ValueError("no prompts to make images from; give at least one")
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts need as many seeds, got {len(seeds)}")
    given, draw = arguments(pipeline, steps, guidance_scale) | dict(call or {}), called(pipeline)
    for start in range(0, len(prompts), batch_size):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
        told = calls.prompted(pipeline, prompts[start : start + batch_size])
        with torch.random.fork_rng():
            torch.manual_seed(seeds[start])
            made = draw(**told, generator=generators, output_type="pil", **given)
        pixels = [np.asarray(image.convert("RGB")) for image in (frame(shown) for shown in made[0])]
        yield torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


def frame(made: Any) -> Any:
    """An image as it is, of a video's frames the middle one, as quick evaluations of a training take it."""
    return made[len(made) // 2] if isinstance(made, list) else made


def arguments(pipeline: Any, steps: int | None, guidance_scale: float | None) -> dict[str, Any]:
    """Keyword arguments of a pipeline's call; None leaves the pipeline its default. Some take no guidance scale."""
    return calls.settled(pipeline, {"num_inference_steps": steps, "guidance_scale": guidance_scale})


class Made:
    """The images of one pipeline for a list of prompts; those kept in a folder are not made again."""

    def __init__(self, pipeline: Any, prompts: Sequence[str], seed: int, folder: Path | None, **call: Any) -> None:
        """seed: of noises, with the images' numbers. folder: for PNGs. call: as ``generate`` takes it."""
        self._pipeline, self._prompts, self._seed, self._folder, self._call = pipeline, prompts, seed, folder, call

    def __call__(self, part: Sequence[int]) -> Tensor:
        """The images of these numbers: uint8 [B, 3, H, W]. Raises ValueError, naming it, if a kept one is damaged."""
        files = {i: self._folder / f"{i:05d}.png" for i in part} if self._folder else {}
        found = {i: read_png(file) for i, file in files.items() if file.is_file()}
        missing = [i for i in part if i not in found]
        if missing:
            seeds = [seed_of(self._seed, i) for i in missing]
            made = generate(self._pipeline, [self._prompts[i] for i in missing], seeds, **self._call)
            for i, image in zip(missing, torch.cat(list(made)), strict=True):
                found[i] = image
                if self._folder:
                    write_png(image, files[i])
        return torch.stack([found[i] for i in part])

    def one(self, number: int) -> Tensor:
        """The image of this number: uint8 [3, H, W]."""
        return self([number])[0]


def opened(folder: Path, settings: dict[str, Any]) -> Path:
    """The folder of a pipeline's images, with what they depend on; those of other settings go."""
    path = folder / SETTINGS
    if parallel.rank() == 0:
        kept = _settings(path)
        differs = next((name for name in settings if kept.get(name) != settings[name]), None)
        if kept and differs:
            log.info(
                "%s: its images were made with %s %r, now it is %r; they are made anew",
                *(folder, differs, kept.get(differs), settings[differs]),
            )
        if differs:
            path.unlink(missing_ok=True)  # first, so that what a kill leaves is known to be nothing
            for file in folder.glob("[0-9]*.png"):
                file.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(settings, indent=1) + "\n")
    parallel.barrier()
    return folder


def _settings(path: Path) -> dict[str, Any]:
    """As they were written down; none if there is no such file, or if it is damaged."""
    try:
        kept = from_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return {}
    return kept if isinstance(kept, dict) else {}


def read_png(file: Path) -> Tensor:
    """uint8 [3, H, W]. Raises ValueError, naming the file, if it is damaged."""
    try:
        with Image.open(file) as found:
            pixels = np.asarray(found.convert("RGB"))
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise ValueError(f"{file}: not a readable image ({error}); delete it to have it made again") from None
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def write_png(image: Tensor, file: Path) -> None:
    """image: uint8 [3, H, W] -> a file that appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as partial:
        Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(partial, "PNG")
