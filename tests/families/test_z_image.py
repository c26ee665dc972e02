"""Z-Image: what its stock call makes of guidance, long prompts and texts of unlike lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastgen.denoiser import guided
from fastgen.family import Family
from fastgen.pipelines import z_image
from fastgen.sampling import ddim, sample

from .z_image import CASE, pipeline

PROMPTS = list(CASE.prompts)


def opened() -> tuple[Any, Family]:
    made = pipeline(0)
    made.set_progress_bar_config(disable=True)
    return made, z_image.wrap(made, image_size=(16, 24))


@torch.no_grad()
def ours(made: Any, family: Family, prompts: list[str], scale: float = 1.0) -> torch.Tensor:
    x_t = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(5))
    times = [float(t) for t in made.scheduler.sigmas[:-1]]
    denoise = guided(family.denoiser, family.uncond(), scale)
    return sample(denoise, family.denoiser.schedule, x_t, times, family.encode_prompts(prompts), ddim)


def theirs(made: Any, family: Family, prompts: list[str], **more: Any) -> torch.Tensor:
    return family.run(made, prompts, 3, torch.Generator().manual_seed(5), **more)


def test_the_stock_default_of_5_is_our_guidance_by_6() -> None:
    made, family = opened()
    wanted = theirs(made, family, PROMPTS)
    torch.testing.assert_close(ours(made, family, PROMPTS, 6.0), wanted, rtol=1e-4, atol=1e-4)
    assert (ours(made, family, PROMPTS, 5.0) - wanted).abs().max() > 1e-2


def test_it_is_off_at_0_and_not_at_1() -> None:
    made, family = opened()
    off, one = (theirs(made, family, PROMPTS, guidance_scale=scale) for scale in (family.unguided, 1.0))
    torch.testing.assert_close(ours(made, family, PROMPTS), off, rtol=1e-4, atol=1e-4)
    assert family.unguided == 0.0
    assert (one - off).abs().max() > 1e-2


def test_a_prompt_that_is_too_long_is_cut_as_the_stock_call_cuts_it() -> None:
    made, family = opened()
    prompts = [PROMPTS[0], "an apple and " * 50]
    wanted = theirs(made, family, prompts, guidance_scale=0.0)
    with pytest.warns(UserWarning, match=r"a prompt was cut to 512 tokens; shorten it"):
        torch.testing.assert_close(ours(made, family, prompts), wanted, rtol=1e-4, atol=1e-4)


def test_a_map_holds_the_image_s_tokens_alone() -> None:
    _, family = opened()
    x_t = torch.zeros(2, 4, 4, 6)
    image, after = torch.arange(6.0).reshape(1, 6, 1) + torch.tensor([0.0, 0.5]), torch.full((2, 58, 2), -1.0)
    found = family.denoiser.read(torch.cat([image.expand(2, 6, 2), after], 1), x_t)
    assert found.shape == (2, 2, 2, 3)
    assert torch.equal(found[1, 1], torch.arange(6.0).reshape(2, 3) + 0.5)
