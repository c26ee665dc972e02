"""The guidance scale as an input: what a network is given, what stock pipelines give it, and learning what it does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from torch import Tensor, nn

import fastgen
from fastgen import config, recipe
from fastgen import train as training
from fastgen.denoiser import guided
from fastgen.engine import Engine
from fastgen.export import ExportError, export, read_card
from fastgen.family import Family
from fastgen.guidance import Scales, student_guidance, with_guidance
from fastgen.optimizers import Optim
from fastgen.pipelines import sd, unet
from fastgen.rng import Noise
from fastgen.sampling import Sampler, ddim, ddim_times, sample, sample_student
from fastgen.trainers import dmd2
from fastgen.trainers.guidance import Config, Method
from tests import command, tiny
from tests.oracle import (
    Gaussians,
    Samples,
    conv_family,
    gaussian_family,
    gradients_by_phase,
    labels,
    moved,
    optims,
    same,
    states,
    train,
)

MEANS, STD, SHAPE = (0.3, 1.0, -0.5), 0.5, (4, 4)
SLOPES = tuple(m - MEANS[0] for m in MEANS)
CONV = Samples((2, 8, 8))
WIDE = Scales(1.0, 8.0, default=2.5)
PROMPTS = ["a red apple", "a dog left of a cat"]


def noise(step: int = 0, n: int = 4) -> Noise:
    return Noise(range(n), 0, step, "student")


def conv_method(**options: object) -> Method:
    return Method(Config(**{"guidance": WIDE, **options}), conv_family(), 1)  # type: ignore[arg-type]


def world(means: tuple[float, ...], slopes: tuple[float, ...], guidance: Scales = WIDE) -> Method:
    """An exact teacher and a student that is the exact denoiser of N(means + slopes (scale - 1), STD^2)."""

    def student(embed_guidance: bool = False) -> nn.Module:
        schedule = family.denoiser.schedule
        wide = embed_guidance * len(means)
        return Gaussians((*means, *slopes[:wide]), (STD,) * len(means) + (1.0,) * wide, schedule, "v")

    family = gaussian_family(MEANS, (STD,) * 3, shape=SHAPE, student=student)
    return Method(Config(guidance), family, 1)


# A scale for each sample


def test_a_scale_for_each_sample_guides_each_by_its_own() -> None:
    family = conv_family()
    x_t, t, cond = torch.randn(3, 2, 8, 8), torch.tensor([10.0, 500.0, 900.0]), labels(["left", "right", "left"])
    scales = torch.tensor([1.0, 2.5, 7.0], dtype=torch.float64)
    found = guided(family.denoiser, family.uncond(), scales)(x_t, t, cond)
    assert found.y.dtype == torch.float32
    for i, scale in enumerate(scales.tolist()):
        alone = guided(family.denoiser, family.uncond(), scale)
        expected = alone(x_t[i : i + 1], t[i : i + 1], labels([("left", "right", "left")[i]]))
        torch.testing.assert_close(found.y[i : i + 1], expected.y, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.x0[i : i + 1], expected.x0, rtol=1e-4, atol=1e-4)


def test_scales_are_drawn_over_the_range_for_each_sample() -> None:
    drawn = WIDE.draw(noise(n=2000))
    assert drawn.shape == (2000,)
    assert 1 <= drawn.min() < 1.05
    assert 7.95 < drawn.max() < 8
    assert drawn.mean().item() == pytest.approx(4.5, abs=0.15)


def test_with_guidance_adds_a_row_for_each_sample_and_leaves_the_rest() -> None:
    cond = labels(["left", "right"])
    assert with_guidance(cond, 2.5)["guidance"].tolist() == [2.5, 2.5]
    scale = torch.tensor([1.0, 3.0], dtype=torch.float64)
    given = with_guidance(cond, scale)
    assert given["guidance"].tolist() == [1.0, 3.0]
    assert given["label"] is cond["label"]
    assert set(cond) == {"label"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 5.0, "high": 3.0}, "low 5 must not be above high 3"),
        ({"low": 1.0, "high": 4.0}, "default 7.5 must be one of the scales trained, 1 to 4"),
    ],
)
def test_a_range_that_is_none_or_leaves_out_the_default_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scales(**options)


def test_a_range_that_leaves_out_a_stock_call_s_scale_is_refused() -> None:
    with pytest.raises(ValueError, match=r"own default guidance_scale 7\.5 must be one of the scales trained, 1 to 4"):
        Scales(1.0, 4.0, default=2.5).student(conv_family())
    Scales(1.0, 4.0, embed=False).student(conv_family())  # which ignores it


def test_a_family_without_a_place_for_the_scale_is_refused() -> None:
    family = replace(conv_family(), stock_guidance=None)
    with pytest.raises(ValueError, match="no place for a guidance scale; set embed: false"):
        WIDE.student(family)


def test_a_method_says_whether_its_students_take_a_scale() -> None:
    assert student_guidance(conv_method()) == 2.5
    assert student_guidance(conv_method(guidance=Scales(2.0, 2.0, embed=False))) is None
    assert student_guidance(dmd2.Method(dmd2.Config(), conv_family(), 1)) is None


# Stable Diffusion


@pytest.mark.parametrize("width", [32, 33, 256])
def test_the_embedding_is_the_stock_pipelines_to_the_bit(width: int) -> None:
    scales = [1.0, 1.7, 3.0, 7.5, 15.0]
    found = unet.guidance_embedding(torch.tensor(scales, dtype=torch.float64), width)
    for row, scale in zip(found, scales, strict=True):
        stock = StableDiffusionPipeline.get_guidance_scale_embedding(None, torch.tensor(scale - 1).repeat(1), width)
        assert torch.equal(row[None], stock)


def perturbed(family: Family, embed_guidance: bool = True) -> nn.Module:
    """A student that has left its teacher, and whose image depends on the scale where it takes one."""
    network, g = family.student(embed_guidance=embed_guidance), torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if p.requires_grad:
                p += (0.3 if "cond_proj" in name else 0.02) * torch.randn(p.shape, generator=g)
    return network.eval()


def close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-4 * max(1.0, theirs.abs().max().item())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_fresh_student_is_its_teacher_at_every_scale_and_its_embedding_learns(prediction_type: str) -> None:
    family = sd.wrap(tiny.pipeline(prediction_type))
    assert family.stock_guidance == 7.5
    network = family.student(embed_guidance=True)
    x_t, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([5.0, 900.0]), family.encode_prompts(PROMPTS)
    pred = family.denoiser.with_network(network)(x_t, t, with_guidance(cond, torch.tensor([1.0, 7.5])))
    with torch.no_grad():
        torch.testing.assert_close(pred.y, family.denoiser(x_t, t, cond).y, rtol=1e-5, atol=1e-6)
    assert all(p.requires_grad for p in network.parameters())
    pred.y.square().sum().backward()
    assert network.time_embedding.cond_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize(("num_steps", "sampler"), [(1, "renoise"), (2, "renoise"), (2, "ddim")])
def test_plain_diffusers_gives_our_image_at_each_scale(num_steps: int, sampler: Sampler, tmp_path: Path) -> None:
    """Saved and opened again; what is called without a scale is called with 7.5; nothing is guided a second time."""
    family = sd.wrap(tiny.pipeline("v_prediction"))
    network = perturbed(family)
    family.pipeline(network, num_steps, sampler).save_pretrained(tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    rows: list[int] = []
    pipeline.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    images = {}
    for scale in (1.0, 3.0, 7.5, None):
        g = torch.Generator().manual_seed(0)
        x_t = torch.randn(2, 4, 8, 8, generator=g)
        fresh = lambda g=g: torch.randn(2, 4, 8, 8, generator=g)  # noqa: E731
        cond = with_guidance(family.encode_prompts(PROMPTS), 7.5 if scale is None else scale)
        student = family.denoiser.with_network(network)
        with torch.no_grad():
            ours = sample_student(
                student, student.schedule, x_t, family.student_times(num_steps), cond, sampler, fresh
            )
        call = {} if scale is None else {"guidance_scale": scale}
        images[scale] = pipeline(
            PROMPTS,
            num_inference_steps=num_steps,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **call,
        ).images
        close(ours, images[scale])
    assert (images[1.0] - images[3.0]).abs().max() > 0.01
    assert (images[3.0] - images[7.5]).abs().max() > 0.01
    assert set(rows) == {2}


def test_the_gate_calls_with_the_scale_it_is_given(tmp_path: Path) -> None:
    family = sd.wrap(tiny.pipeline())
    network = perturbed(family)
    export(family, network, 2, tmp_path / "one", prompts=PROMPTS, card={}, guidance_scale=2.5)
    with pytest.raises(ExportError, match="differs from the trainer's sampler"):
        export(family, network, 2, tmp_path / "two", prompts=PROMPTS, card={})  # a sampler that gives no scale


# Guidance distillation


@pytest.mark.parametrize("low", [1.0, 3.0, 7.5])
def test_at_the_optimum_it_is_the_guided_teacher_at_every_scale(low: float) -> None:
    """Exact for Gaussians of one deviation: their guided denoiser is that of the guided mean."""
    scales = Scales(1.0, 8.0, default=low)
    method, batch = world(MEANS, SLOPES, scales), Samples(SHAPE).batch(range(64))
    assert method.loss(batch, noise(n=64))["guidance"].max() < 1e-9
    x_t, t = torch.randn(64, *SHAPE), torch.linspace(1, 999, 64)
    student = method.student(x_t, t, with_guidance(batch.cond, low))
    teacher = guided(method.teacher, batch.uncond, low)(x_t, t, batch.cond)
    torch.testing.assert_close(student.y, teacher.y, rtol=1e-4, atol=1e-4)


def test_loss_is_the_distance_of_the_guided_means_in_the_network_s_own_output() -> None:
    """(dy/dmean)^2 (scale - 1)^2 (m_c - m_u)^2 for a student that ignores the scale; off by one it is another."""
    method, n = world(MEANS, (0.0,) * 3), 64
    batch, rng = Samples(SHAPE, captions=("left",)).batch(range(n)), noise(n=n)
    t = (1000 * rng.uniform()).floor()
    scale = 1 + 7 * rng.uniform()
    at = method.teacher.schedule(t)
    variance = (at.alpha * STD).square() + at.sigma.square()
    slope = -at.sigma * at.sigma.square() / variance - at.alpha.square() * at.sigma / variance  # of v, in the mean
    expected = (slope * (scale - 1) * SLOPES[1]).square()
    found = method.loss(batch, noise(n=n))["guidance"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)
    assert (found - (slope * scale * SLOPES[1]).square()).abs().max() > 0.05


def test_at_scale_one_the_target_is_the_conditional_teacher() -> None:
    """Which the student is at the start: nothing to learn, and no second pass."""
    method, rows = conv_method(guidance=Scales(1.0, 1.0, embed=False)), []
    method.teacher.network.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    assert method.loss(CONV.batch(range(4)), noise())["guidance"].max() == 0
    assert rows == [4]


def test_only_the_student_learns_from_one_pass_of_its_own_and_two_of_the_teacher() -> None:
    method = conv_method()
    seen: dict[str, list[tuple[int, bool]]] = {"teacher": [], "student": []}
    for role, calls in seen.items():
        method.networks[role].register_forward_pre_hook(
            lambda _, args, to=calls: to.append((len(args[0]), torch.is_grad_enabled()))
        )
    found, before = gradients_by_phase(method), states(method)  # type: ignore[arg-type]
    train(Engine(method, CONV, optims(method, lr=1e-3), batch_size=4, steps=1), range(1))
    after = states(method)
    assert seen == {"teacher": [(8, False)], "student": [(4, True)]}
    assert found == {"student": {f"student.{name}" for name in before["student"]}}
    assert moved(before["student"], after["student"]) == set(before["student"])
    assert same(before["teacher"], after["teacher"])


def test_the_student_learns_what_the_scale_does() -> None:
    method = world(MEANS, (0.0,) * 3)
    settings = Optim(lr=0.05, schedule="linear", betas=(0.5, 0.9), weight_decay=0.0)
    train(Engine(method, Samples(SHAPE), {"student": settings}, batch_size=16, steps=200), range(200))
    network = method.student.network
    assert network.mean[1:3].tolist() == pytest.approx(MEANS[1:], abs=0.03)
    assert network.mean[4:].tolist() == pytest.approx(SLOPES[1:], abs=0.03)


def test_images_are_needed() -> None:
    method = conv_method()
    assert method.needs_images
    with pytest.raises(ValueError, match="guidance needs images; this data source has prompts only"):
        method.loss(replace(CONV.batch(range(2)), x0=None), noise(n=2))


@pytest.mark.parametrize("scale", [1.0, 3.0, 7.5])
def test_it_is_sampled_as_the_teacher_is_in_half_the_passes(scale: float) -> None:
    family = sd.wrap(tiny.pipeline("v_prediction"))
    network, g = perturbed(family), torch.Generator().manual_seed(0)
    x_t, schedule = torch.randn(2, 4, 8, 8, generator=g), family.denoiser.schedule
    cond, rows = with_guidance(family.encode_prompts(PROMPTS), scale), []
    with torch.no_grad():
        ours = sample(family.denoiser.with_network(network), schedule, x_t, ddim_times(schedule, 8), cond, ddim)
    pipeline = family.pipeline(network, None)
    network.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    call = {"num_inference_steps": 8, "guidance_scale": scale, "latents": x_t, "output_type": "latent"}
    close(ours, pipeline(PROMPTS, **call).images)
    assert rows == [2] * 8


# Through a run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of guidance distillation, evaluated."""
    folder = tmp_path_factory.mktemp("guidance")
    command.teacher(folder / "teacher")
    command.images(folder / "images")
    tree = {
        "model": {"family": "sd", "path": str(folder / "teacher")},
        "method": {"name": "guidance", "guidance": {"low": 1, "high": 8, "default": 2.5}},
        "data": {"source": "images", "path": str(folder / "images")},
        "optim": {"student": {"lr": 0.01}},
        "run": {"out": str(folder / "run"), "steps": 2, "batch_size": 2},
        "eval": {
            "metrics": ["latency"],
            "reference": {"source": "images", "path": str(folder / "images")},
            "num_images": 2,
            "repeats": 1,
            "comparison": 0,
            "teacher_steps": [2],
            "teacher_guidance": 2.5,
        },
    }
    (folder / "run.yaml").write_text(json.dumps(tree))
    command.done("train", folder / "run.yaml")
    command.done("evaluate", folder / "run")
    return folder / "run"


def test_it_is_exported_and_judged_as_a_student_guided_once(run: Path) -> None:
    card = read_card(run / "pipeline")
    assert (card["method"], card["guidance_scale"]) == ("guidance", 2.5)
    assert "num_inference_steps" not in card
    teacher, student = [row for row in json.loads((run / "results.json").read_text()) if row["role"] != "data"]
    assert (teacher["role"], teacher["steps"], teacher["network_evaluations"]) == ("teacher", 2, 4)
    assert (student["name"], student["role"]) == ("guidance", "student")
    assert (student["guidance_scale"], student["steps"], student["network_evaluations"]) == (2.5, 50, 50)


def test_fastgen_s_own_call_gives_the_student_s_default_scale(run: Path) -> None:
    options = {"num_inference_steps": 2, "output_type": "latent"}
    images = []
    for open_, call in (
        (fastgen.load, {}),
        (DiffusionPipeline.from_pretrained, {"guidance_scale": 2.5}),
        (DiffusionPipeline.from_pretrained, {}),
    ):
        pipeline = open_(run / "pipeline")
        pipeline.set_progress_bar_config(disable=True)
        images.append(pipeline(PROMPTS, generator=torch.Generator().manual_seed(0), **options, **call).images)
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_a_run_s_own_pictures_are_the_student_s_at_its_default_scale(run: Path) -> None:
    """By the trainer's sampler, one pass a step."""
    session = training.build(recipe_of(run))
    rows: list[int] = []
    session.method.networks["student"].register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    session.images(PROMPTS, range(2))
    assert rows == [2] * training.TEACHER_STEPS


def test_a_student_starts_from_it_if_it_takes_the_scale_too(run: Path) -> None:
    chosen = recipe_of(run)
    init = replace(chosen.student, init=str(run / "pipeline"))
    session = training.build(replace(chosen, student=init))
    projection = session.method.networks["student"].time_embedding.cond_proj.weight
    assert projection.abs().max() > 0
    assert "time_embedding.cond_proj.weight" in session.engine.parameters["student"]
    family = training.started_from(session.family, sd, str(run / "pipeline"), torch.device("cpu"))
    family.student(embed_guidance=True)
    with pytest.raises(ValueError, match=r"takes the guidance scale as an input \(time_embedding.cond_proj.weight\)"):
        family.student()


def recipe_of(run: Path) -> recipe.Recipe:
    return recipe.decode(config.read(run / "config.yaml"), "config.yaml")
