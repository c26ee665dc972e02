"""FLUX.1 dev: embedded guidance beside true guidance, students that take no scale, adapters at the stock default."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen import export, lora, recipe
from fastgen import train as training
from fastgen.denoiser import guided
from fastgen.family import Family
from fastgen.guidance import with_guidance
from fastgen.lora import Lora
from fastgen.pipelines import flux
from fastgen.recipe import Model
from fastgen.sampling import ddim, sample
from tests import tiny
from tests.families.flux import pipeline
from tests.families.parts import PROMPTS

SIZE = (16, 16)
CPU = torch.device("cpu")
TRUE = {"true_cfg_scale": 4.0, "negative_prompt": ["", ""]}


def dev(embeds: bool = True, size: tuple[int, int] = SIZE) -> tuple[Any, Family]:
    made = pipeline(0, guidance_embeds=embeds)
    if embeds:  # so that the scale shows in an untrained network
        made.transformer.time_text_embed.guidance_embedder.requires_grad_(False).linear_2.weight *= 20
    return made, flux.wrap(made, image_size=size)


def noise(family: Family) -> Tensor:
    return torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(5))


def called(made: Any, family: Family, **more: Any) -> Tensor:
    return family.run(made, PROMPTS, 3, torch.Generator().manual_seed(5), **more)


@torch.no_grad()
def output(family: Family, network: Any, scale: float | None) -> Tensor:
    cond, t = family.encode_prompts(PROMPTS), torch.tensor([0.9, 0.4])
    given = cond if scale is None else with_guidance(cond, scale)
    return family.denoiser.with_network(network)(noise(family), t, given).y


# The teacher


@pytest.mark.parametrize("size", [(16, 16), (24, 16)])
@pytest.mark.parametrize("true", [False, True])
@pytest.mark.parametrize("scale", [None, 1.0, 6.0])
def test_the_teacher_is_the_stock_call_at_each_embedded_scale(
    scale: float | None, true: bool, size: tuple[int, int]
) -> None:
    made, family = dev(size=size)
    wanted = called(made, family, guidance_scale=scale, **(TRUE if true else {}))
    cond, uncond = family.encode_prompts(PROMPTS), family.uncond()
    if scale is not None:
        cond, uncond = with_guidance(cond, scale), with_guidance(uncond, scale)
    denoise = guided(family.denoiser, uncond, 4.0 if true else 1.0)
    times = [float(t) for t in made.scheduler.sigmas[:-1]]
    with torch.no_grad():
        found = sample(denoise, family.denoiser.schedule, noise(family), times, cond, ddim)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    for other in ({"guidance_scale": 2.0, **(TRUE if true else {})}, {} if true else TRUE):
        assert (called(made, family, **other) - wanted).abs().max() > 1e-3


def test_without_a_scale_it_is_called_at_the_stock_default() -> None:
    _, family = dev()
    network = family.denoiser.network
    assert flux.GUIDANCE == family.unguided == family.stock_guidance == 3.5
    torch.testing.assert_close(output(family, network, None), output(family, network, 3.5), rtol=0, atol=0)


def test_fixed_it_is_the_network_at_this_scale_and_ignores_any_other() -> None:
    _, family = dev()
    network = family.denoiser.network
    wanted, other = output(family, network, 2.0), output(family, network, 3.5)
    assert family.fix_guidance is not None
    family.fix_guidance(2.0)
    for scale in (None, 1.0, 3.5):
        torch.testing.assert_close(output(family, network, scale), wanted)
    assert (wanted - other).abs().max() > 1e-2
    again = flux.wrap(family.pipeline(network, None), image_size=SIZE)
    assert again.fix_guidance is None
    assert again.unguided is None


def test_the_shift_is_the_image_s_where_it_is_dynamic_and_the_student_s_is_static() -> None:
    for size, tokens in ((16, 16), 16), ((32, 16), 32):
        _, family = dev(size=size)
        mu = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
        shift = math.exp(mu)
        assert family.student_times(2) == pytest.approx([1.0, shift * 0.5 / (1 + (shift - 1) * 0.5)])
        scheduler = family.pipeline(family.denoiser.network, 2).scheduler
        assert scheduler.config.shift == pytest.approx(shift)
        assert not scheduler.config.use_dynamic_shifting
    made = pipeline(0)
    made.scheduler = type(made.scheduler)(shift=1.0)
    assert flux.wrap(made, image_size=SIZE).student_times(2) == [1.0, 0.5]


# Students


@pytest.mark.parametrize("embed", [False, True])
@pytest.mark.parametrize("embeds", [False, True])
def test_a_student_starts_as_its_teacher_at_the_default_and_at_any_scale(embeds: bool, embed: bool) -> None:
    _, family = dev(embeds)
    wanted = output(family, family.denoiser.network, None)
    network = family.student(embed)
    for scale in (None, 1.0, 9.0):
        torch.testing.assert_close(output(family, network, scale), wanted)
    tiny.perturbed(network)
    depends = bool((output(family, network, 1.0) - output(family, network, 9.0)).abs().max() > 1e-4)
    assert depends == embed


@pytest.mark.parametrize("embeds", [False, True])
def test_a_student_that_learnt_the_scale_is_itself_in_a_stock_call(embeds: bool, tmp_path: Path) -> None:
    _, family = dev(embeds)
    network = tiny.perturbed(family.student(True))
    export.export(family, network, 2, tmp_path / "student", prompts=PROMPTS, card={}, guidance_scale=5.0)
    config = json.loads((tmp_path / "student/transformer/config.json").read_text())
    assert config["guidance_embeds"] is True


def test_an_exported_student_ignores_the_stock_call_s_scale(tmp_path: Path) -> None:
    _, family = dev()
    export.export(family, tiny.perturbed(family.student()), 2, tmp_path / "student", prompts=PROMPTS, card={})
    student = export.from_pretrained(tmp_path / "student")
    torch.manual_seed(0)
    found = called(student, family)
    torch.manual_seed(0)
    torch.testing.assert_close(called(student, family, guidance_scale=0.0), found)


def test_an_adapter_fits_dev_at_the_stock_default(tmp_path: Path) -> None:
    made, family = dev()
    made.save_pretrained(tmp_path / "dev")
    adapted = lora.adapted(family, Lora(rank=2))
    network: Any = tiny.perturbed(adapted.student())
    given: dict[str, Any] = {"num_steps": 2, "prompts": PROMPTS, "card": {}}
    export.export(adapted, network, folder=tmp_path / "student", **given)
    weights = [lora.weights(network, "transformer")]
    base = str(tmp_path / "dev")
    opener = functools.partial(export.from_pretrained, tmp_path / "student")
    export.export_adapter(adapted, opener, weights, base, tmp_path / "lora", **given)


# Runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("dev")
    dev()[0].save_pretrained(place / "dev")
    (place / "prompts.txt").write_text("\n".join(PROMPTS))
    return place


def run(folder: Path, method: dict[str, Any], student: dict[str, Any] | None = None, **model: Any) -> training.Session:
    step = {"lr": 1e-3, "warmup": 0}
    tree = {
        "model": {"path": str(folder / "dev"), "image_size": SIZE, **model},
        "method": method,
        "student": {"steps": 1, **(student or {})},
        "data": {"source": "prompts", "path": str(folder / "prompts.txt")},
        "optim": {"student": step, "fake_score": step},
        "run": {"out": str(folder / "run"), "steps": 2, "batch_size": 2},
    }
    return training.build(recipe.decode(tree, "run.yaml"), CPU)


@pytest.mark.parametrize("form", [{}, {"lora": {"rank": 2}}, {"lora": {"rank": 2}, "share_backbone": True}])
def test_dev_trains_at_its_default_without_being_told(folder: Path, form: dict[str, Any]) -> None:
    session = run(folder, {"name": "dmd2", "guidance_scale": 1.0}, form)
    for _, logs in session.engine.run(range(2)):
        assert all(math.isfinite(value) for value in logs.values())
    folder = folder / f"{len(form)}"
    training.export_run(session, folder / "pipeline")
    assert export.read_card(folder / "pipeline")["guidance_scale"] == 3.5
    if form:
        assert export.read_card(folder / "lora")["guidance_scale"] == 3.5


def test_dev_is_fixed_at_a_scale_that_is_named(folder: Path) -> None:
    found, _ = training.load_teacher(Model(str(folder / "dev"), image_size=SIZE, guidance_scale=2.0), "fp32", CPU)
    _, free = dev()
    network = found.denoiser.network
    torch.testing.assert_close(output(found, network, None), output(free, free.denoiser.network, 2.0))


def test_dev_is_not_guided_twice(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^method\.guidance_scale 7\.5 would guide .* model\.guidance_scale 3\.5"):
        run(folder, {"name": "dmd2"})
