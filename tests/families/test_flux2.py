"""FLUX.2: shifts by the number of steps, dev's guidance at its default alone, klein's students that are not guided."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgen import export, recipe
from fastgen import train as training
from fastgen.family import Family
from fastgen.pipelines import flux2
from fastgen.recipe import Model
from tests import tiny

from .flux2 import dev, klein
from .parts import PROMPTS

SIZE = (16, 24)
CPU = torch.device("cpu")


def opened(make: Any) -> tuple[Any, Family]:
    made = make(0)
    made.vae.eval()
    made.set_progress_bar_config(disable=True)
    return made, flux2.wrap(made, image_size=SIZE)


@pytest.mark.parametrize("make", [klein, dev])
def test_a_teacher_has_the_shift_of_the_default_number_of_steps_and_a_student_of_its_own(make: Any) -> None:
    _, family = opened(make)
    tokens, shifts = 4 * 6, {}
    for steps in (50, 4, 2):
        ten, many = 8.73809524e-05 * tokens + 1.89833333, 0.00016927 * tokens + 0.45666666  # at 10 and 200 steps
        shifts[steps] = math.exp(ten + (many - ten) * (steps - 10) / 190)
    assert family.denoiser.schedule.draw(torch.tensor([0.5])).item() == pytest.approx(shifts[50] / (1 + shifts[50]))
    assert family.student_times(2) == pytest.approx([1.0, shifts[2] / (1 + shifts[2])])
    scheduler = family.pipeline(family.denoiser.network, 4).scheduler
    assert scheduler.config.shift == pytest.approx(shifts[4])
    assert not scheduler.config.use_dynamic_shifting


def test_latents_are_normalised_patches_of_the_autoencoder_s() -> None:
    made, family = opened(klein)
    pixels = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        wanted = made._encode_vae_image(pixels, None)
        torch.testing.assert_close(family.encode(pixels), wanted)
        raw = made.vae.encode(pixels).latent_dist.mode()
        torch.testing.assert_close(family.decode(wanted), made.vae.decode(raw).sample, rtol=1e-4, atol=1e-4)


def test_a_map_holds_the_image_s_tokens_alone() -> None:
    x_t = torch.zeros(2, 16, 2, 3)
    image, text = torch.arange(6.0).reshape(1, 6, 1).expand(2, 6, 5), torch.full((2, 7, 5), -1.0)
    for output in ((text, image), torch.cat([text, image], 1)):
        found = flux2.read(output, x_t)
        assert found.shape == (2, 5, 2, 3)
        assert torch.equal(found[1, 4], torch.arange(6.0).reshape(2, 3))


# Dev


def test_dev_is_called_at_the_stock_default_alone() -> None:
    made, family = opened(dev)
    made.transformer.time_guidance_embed.guidance_embedder.linear_2.weight *= 20  # so that the scale shows
    default, named, other = (
        family.run(made, PROMPTS, 2, torch.Generator().manual_seed(5), scale) for scale in (None, 4.0, 1.0)
    )
    assert family.unguided == 4.0
    torch.testing.assert_close(default, named)
    assert (other - default).abs().max() > 1e-3
    cond = family.encode_prompts(PROMPTS)
    assert (cond["text"][0] - cond["text"][1]).abs().max() > 1e-2
    x_t = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(5))
    t = torch.tensor([1.0, 1.0])
    one = family.run(made, PROMPTS, 1, torch.Generator().manual_seed(5))
    with torch.no_grad():
        torch.testing.assert_close(family.denoiser(x_t, t, cond).x0, one, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("dev")
    dev(0).save_pretrained(place / "dev")
    (place / "prompts.txt").write_text("\n".join(PROMPTS))
    return place


def test_another_scale_for_dev_is_refused(folder: Path) -> None:
    model = Model(str(folder / "dev"), image_size=SIZE, guidance_scale=2.5)
    with pytest.raises(ValueError, match=r"^model\.guidance_scale 2\.5: .* no bias .*; leave it out, which is 4"):
        training.load_teacher(model, "fp32", CPU)
    kept, _ = training.load_teacher(Model(str(folder / "dev"), image_size=SIZE, guidance_scale=4.0), "fp32", CPU)
    assert kept.unguided == 4.0


def test_dev_is_not_guided_twice(folder: Path) -> None:
    tree = {
        "model": {"path": str(folder / "dev"), "image_size": SIZE},
        "method": {"name": "dmd2"},
        "data": {"source": "prompts", "path": str(folder / "prompts.txt")},
        "optim": {"student": {"lr": 1e-3}, "fake_score": {"lr": 1e-3}},
        "run": {"out": str(folder / "run"), "steps": 2, "batch_size": 2},
    }
    with pytest.raises(
        ValueError, match=r"^method\.guidance_scale 7\.5 would guide .* model\.guidance_scale 4 already"
    ):
        training.build(recipe.decode(tree, "run.yaml"), CPU)


# Klein


def test_a_student_of_klein_is_not_guided_by_the_stock_call(tmp_path: Path) -> None:
    _, family = opened(klein)
    export.export(family, tiny.perturbed(family.student()), 2, tmp_path / "student", prompts=PROMPTS, card={})
    student = export.from_pretrained(tmp_path / "student")
    assert student.config.is_distilled
    made = []
    for scale in (None, 7.0):
        torch.manual_seed(0)
        made.append(family.run(student, PROMPTS, 2, torch.Generator().manual_seed(5), scale))
    torch.testing.assert_close(made[0], made[1])
