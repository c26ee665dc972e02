"""What the contract's one pipeline does not show of PixArt: sigma, other sample sizes, binned sizes, one step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline
from torch import Tensor

from fastgen import export, registry
from fastgen.denoiser import guided
from fastgen.family import Family
from fastgen.sampling import Sampler, ddim, sample
from tests import tiny

from .parts import PROMPTS, autoencoder
from .pixart import pipeline
from .test_families import called_at, close


def wrapped(made: Any, image_size: tuple[int, int]) -> Family:
    found: Family = registry.find("family", "pixart").wrap(made, image_size=image_size)
    return found


def ours(family: Family, made: Any, scale: float) -> Tensor:
    """By our sampler, on the times and the noise of the stock call that was just made."""
    x_t = torch.randn(len(PROMPTS), *family.latent_shape, generator=torch.Generator().manual_seed(5))
    denoise = guided(family.denoiser, family.uncond(), scale)
    with torch.no_grad():
        return sample(
            denoise, family.denoiser.schedule, x_t, called_at(made.scheduler), family.encode_prompts(PROMPTS), ddim
        )


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("variances", [True, False])
@pytest.mark.parametrize(
    ("cls", "sample_size"),
    [(PixArtSigmaPipeline, 128), (PixArtSigmaPipeline, 256), (PixArtAlphaPipeline, 64)],
)
def test_networks_that_are_told_no_sizes(cls: type, sample_size: int, variances: bool, scale: float) -> None:
    made = pipeline(0, cls, sample_size, variances)
    family = wrapped(made, (16, 24))
    theirs = family.run(made, PROMPTS, 4, torch.Generator().manual_seed(5), scale)
    close(ours(family, made, scale), theirs)


def test_sizes_are_a_condition_of_alpha() -> None:
    made = pipeline(0)
    family = wrapped(made, (16, 24))
    x_t, t = torch.randn(2, *family.latent_shape), torch.tensor([300.0, 700.0])
    cond = family.encode_prompts(PROMPTS)
    with torch.no_grad():
        told = family.denoiser(x_t, t, cond).y
        torch.nn.init.zeros_(made.transformer.adaln_single.emb.aspect_ratio_embedder.linear_2.weight)
        assert (family.denoiser(x_t, t, cond).y - told).abs().max() > 1e-4


def test_a_call_that_rounds_sizes_is_the_same_where_the_size_is_of_the_table() -> None:
    made = pipeline(0, sample_size=32)
    widths = {"block_out_channels": (8,) * 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    made = PixArtAlphaPipeline(**{**made.components, "vae": autoencoder(**widths, **blocks)})
    family = wrapped(made, (208, 304))
    generator = torch.Generator().manual_seed(5)
    theirs = made(PROMPTS, height=208, width=304, num_inference_steps=2, generator=generator, output_type="latent")[0]
    close(ours(family, made, 4.5), theirs)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Diffusers' own, of its scheduler
@pytest.mark.parametrize("sampler", ["renoise", "ddim"])
@pytest.mark.parametrize("num_steps", [1, 2])
@pytest.mark.parametrize("cls", [PixArtAlphaPipeline, PixArtSigmaPipeline])
def test_students_of_the_usual_teacher_s_scheduler_leave(
    cls: type, num_steps: int, sampler: Sampler, tmp_path: Path
) -> None:
    """Alpha's call of one step takes the second of what the scheduler's step returns."""
    made = pipeline(0, cls)
    made.scheduler = DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=1e-4)
    family = wrapped(made, (16, 24))
    network = tiny.perturbed(family.student())
    folder = tmp_path / "student"
    assert export.export(family, network, num_steps, folder, sampler=sampler, prompts=PROMPTS, card={}) < 1e-4
    assert f'"_class_name": "{cls.__name__}"' in (folder / "model_index.json").read_text()
    assert export.export(family, family.denoiser.network, None, folder, prompts=PROMPTS, card={}) < 1e-4
