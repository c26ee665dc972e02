"""Qwen-Image: guidance that keeps the norm of each token, texts of unlike lengths, one frame of a video's latents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen.denoiser import guided
from fastgen.family import Family
from fastgen.pipelines import qwen_image, stock
from fastgen.sampling import ddim, sample
from tests.families.parts import PROMPTS
from tests.families.qwen_image import pipeline


def opened() -> tuple[Any, Family]:
    made = pipeline(0)
    made.set_progress_bar_config(disable=True)
    return made, qwen_image.wrap(made, image_size=(16, 24))


def test_guidance_keeps_the_norm_of_each_token_of_the_conditional_output() -> None:
    g = torch.Generator().manual_seed(0)
    pos, neg = (torch.randn(2, 4, 6, 8, generator=g) + m for m in (0.5, -1.0))
    scale = torch.tensor([1.0, 5.0]).reshape(-1, 1, 1, 1)
    found, plain = qwen_image.guide(pos, neg, scale), neg + scale * (pos - neg)
    for i in range(0, 6, 2):
        for j in range(0, 8, 2):
            ours, theirs, ends = (x[:, :, i : i + 2, j : j + 2].flatten(1) for x in (found, pos, plain))
            torch.testing.assert_close(ours.norm(dim=1), theirs.norm(dim=1))
            torch.testing.assert_close(torch.cosine_similarity(ours, ends), torch.ones(2))
    torch.testing.assert_close(found[0], pos[0])
    assert (found[1] - plain[1]).abs().max() > 1


def test_plain_guidance_is_not_what_the_stock_call_does() -> None:
    made, family = opened()
    more = {"true_cfg_scale": 4.0, "negative_prompt": [" ", " "]}
    wanted = family.run(made, PROMPTS, 3, torch.Generator().manual_seed(5), **more)
    x_t = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(5))
    times, cond = [float(t) for t in made.scheduler.sigmas[:-1]], family.encode_prompts(PROMPTS)

    @torch.no_grad()
    def difference(denoiser: Any) -> float:
        denoise = guided(denoiser, family.uncond(), 4.0)
        found = sample(denoise, family.denoiser.schedule, x_t, times, cond, ddim)
        return float((found - wanted).abs().max())

    assert difference(family.denoiser) < 1e-4
    assert difference(lambda x, t, c: family.denoiser(x, t, c)) > 1e-2  # of what it wraps, guided() knows no rule


def test_a_prompt_that_is_too_long_is_cut_as_the_stock_call_cuts_it() -> None:
    made, family = opened()
    prompts = [PROMPTS[0], "an apple and " * 30]
    with pytest.warns(UserWarning, match=r"a prompt was cut to 512 tokens; shorten it"):
        cond = family.encode_prompts(prompts)
    wanted = family.run(made, prompts, 2, torch.Generator().manual_seed(5))
    x_t = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(5))
    times = [float(t) for t in made.scheduler.sigmas[:-1]]
    with torch.no_grad():
        found = sample(family.denoiser, family.denoiser.schedule, x_t, times, cond, ddim)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert cond["mask"][1].all()
    assert not cond["mask"][0].all()


def test_texts_are_padded_to_one_width() -> None:
    rows = [torch.full((2, 3), 1.0), torch.full((4, 3), 2.0)]
    found = stock.padded(rows, 4)
    assert found["text"].sum(-1).tolist() == [[3, 3, 0, 0], [6, 6, 6, 6]]
    assert found["mask"].tolist() == [[True, True, False, False], [True] * 4]


def test_latents_are_one_normalised_frame_of_the_autoencoder_s() -> None:
    made, family = opened()
    pixels = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        raw: Tensor = made.vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
    mean, std = (torch.tensor(made.vae.config[name]).reshape(-1, 1, 1) for name in ("latents_mean", "latents_std"))
    torch.testing.assert_close(family.encode(pixels), (raw - mean) / std)


def test_packing_is_the_stock_pipeline_s() -> None:
    x_t = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    theirs = qwen_image.QwenImagePipeline._pack_latents(x_t, 2, 4, 6, 8)
    assert torch.equal(stock.packed(x_t), theirs)
    assert torch.equal(stock.unpacked(theirs, 6, 8), x_t)
