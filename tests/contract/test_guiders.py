"""Guiders in stock pipelines: what the pipeline's own call computes with them, what it costs, and no trace after."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionXLPipeline,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, IPAdapterAttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from fastgen import export, guiders, registry
from fastgen.denoiser import Denoise, guided
from fastgen.family import Family
from fastgen.pipelines import guiders as stock
from fastgen.pipelines import nasa, sd
from fastgen.recipe import locate
from fastgen.sampling import Sampler, ddim, ddim_times, sample
from tests import tiny
from tests.command import Result, done, fastgen

PROMPTS = ["a red apple", "a dog left of a cat"]
TYPES = ["epsilon", "v_prediction", "sample"]
IN_DIFFUSERS = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
"""Its Euler and DPM-Solver schedulers hand tensors to NumPy: https://github.com/huggingface/diffusers"""
DOCUMENT = Path(__file__).parents[2] / "docs" / "guiders.md"


def noise(seed: int = 0, n: int = 2) -> Tensor:
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def lively(pipeline: Any, by: float = 0.1) -> Any:
    """With weights and prompts that differ enough for guidance to show: untrained ones hardly read the prompt."""
    g = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, p in pipeline.unet.named_parameters():
            p += (3 if "attn2" in name else 1) * by * torch.randn(p.shape, generator=g)
    return pipeline


def teacher(prediction_type: str = "v_prediction", **changes: Any) -> Any:
    return lively(tiny.pipeline(prediction_type, **changes))


def draw(pipeline: Any, num_steps: int = 4, scale: float = 3.0, seed: int = 0, **more: Any) -> Tensor:
    """The stock call: latents [B, 4, 8, 8]."""
    call = {"num_inference_steps": num_steps, "guidance_scale": scale, "output_type": "latent"}
    return pipeline(**{"prompt": PROMPTS, "latents": noise(seed)} | call | more).images


def by_hand(pipeline: Any, wrap: Callable[[Family], Denoise], num_steps: int, seed: int = 0) -> Tensor:
    """The toolkit's sampler with a guided denoiser."""
    family = sd.wrap(pipeline)
    with torch.no_grad():
        times = ddim_times(family.denoiser.schedule, num_steps)
        return sample(wrap(family), family.denoiser.schedule, noise(seed), times, family.encode_prompts(PROMPTS), ddim)


@contextmanager
def rows_seen(unet: nn.Module) -> Iterator[list[int]]:
    """The rows of each pass, counted inside the network, where no wrapper reaches."""
    rows: list[int] = []
    handle = unet.conv_in.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        yield rows
    finally:
        handle.remove()


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    assert torch.isfinite(ours).all()
    assert (ours - theirs).abs().max() <= tolerance * max(1.0, theirs.abs().max().item())


def traces(pipeline: Any) -> tuple[object, ...]:
    """What a guider touches, to be compared before and after."""
    parts = (pipeline, pipeline.unet, pipeline.scheduler)
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in pipeline.unet.modules())
    return (*(type(p) for p in parts), hooks, *map(id, pipeline.unet.attn_processors.values()))


def test_guiders_are_no_model_families() -> None:
    assert not {"guiders", "nasa"} & set(registry.names("family"))
    with pytest.raises(ValueError, match="unknown family 'guiders'"):
        registry.find("family", "guiders")


@pytest.mark.parametrize(
    "switch", [stock.cfgpp, lambda p: stock.adaptive(p, 0.5), lambda p: stock.nasa(p, "a dog", 0.5)]
)
def test_nothing_is_left_of_a_guider_also_after_an_error(switch: Callable[[Any], Any]) -> None:
    pipeline = teacher()
    before, wanted = traces(pipeline), draw(pipeline)
    with switch(pipeline):
        assert traces(pipeline) != before
        assert not torch.equal(draw(pipeline), wanted)
    assert traces(pipeline) == before
    assert torch.equal(draw(pipeline), wanted)
    with pytest.raises(KeyError, match="within"), switch(pipeline):
        raise KeyError("within")
    assert traces(pipeline) == before


def test_a_pipeline_is_saved_as_ever_within_a_guider(tmp_path: Path) -> None:
    pipeline = teacher()
    with stock.cfgpp(pipeline):
        pipeline.save_pretrained(tmp_path)
    close(draw(DiffusionPipeline.from_pretrained(tmp_path)), draw(pipeline), 0)


# CFG++


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("num_steps", [1, 4, 10])
def test_cfgpp_in_the_stock_call_is_the_toolkit_s(prediction_type: str, num_steps: int) -> None:
    pipeline = teacher(prediction_type)

    def wrap(family: Family) -> Denoise:
        schedule = family.denoiser.schedule
        return guiders.cfgpp(family.denoiser, family.uncond(), 0.6, schedule, ddim_times(schedule, num_steps))

    with stock.cfgpp(pipeline, 0.6) as count:
        found = draw(pipeline, num_steps)
        assert torch.equal(found, draw(pipeline, num_steps, scale=9.0))  # the call's own scale does nothing
    close(found, by_hand(pipeline, wrap, num_steps))
    assert count.evaluations == 2 * num_steps * 2 * 2
    assert num_steps == 1 or (found - draw(pipeline, num_steps)).abs().max() > 1e-2


@pytest.mark.parametrize("config", [{"set_alpha_to_one": False}, {"timestep_spacing": "leading"}, {}])
def test_cfgpp_steps_where_ddim_steps(config: dict[str, Any]) -> None:
    """7 steps: DDIM goes down by 1000 // 7, which is not the grid's distance, and ends where its config says."""
    pipeline = teacher()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **config)
    with stock.cfgpp(pipeline, 0.6):
        found = draw(pipeline, 7)
    family, scheduler, x_t = sd.wrap(pipeline), pipeline.scheduler, noise()
    table = scheduler.alphas_cumprod.double()
    for t in scheduler.timesteps.tolist():
        with torch.no_grad():
            at = torch.full((2,), float(t))
            pos = family.denoiser(x_t, at, family.encode_prompts(PROMPTS)).eps.double()
            neg = family.denoiser(x_t, at, family.encode_prompts(["", ""])).eps.double()
        x0 = (x_t - (1 - table[t]).sqrt() * (neg + 0.6 * (pos - neg))) / table[t].sqrt()
        after = table[t - 142] if t >= 142 else scheduler.final_alpha_cumprod.double()
        x_t = (after.sqrt() * x0 + (1 - after).sqrt() * neg).float()
    close(found, x_t)


def test_cfgpp_of_scale_zero_is_the_stock_call_without_a_prompt() -> None:
    pipeline = teacher()
    with stock.cfgpp(pipeline, 0.0):
        found = draw(pipeline)
    close(found, draw(pipeline, scale=1.0, prompt=["", ""]))


def test_cfgpp_renoises_with_the_negative_prompt_in_the_place_of_none() -> None:
    pipeline = teacher()
    with stock.cfgpp(pipeline, 0.0):
        found = draw(pipeline, negative_prompt=PROMPTS[::-1])
    close(found, draw(pipeline, scale=1.0, prompt=PROMPTS[::-1]))


# Adaptive guidance


@IN_DIFFUSERS
@pytest.mark.parametrize(
    "cls", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, PNDMScheduler, LCMScheduler]
)
def test_adaptive_guidance_that_never_stops_is_the_stock_call_whatever_the_scheduler(cls: type) -> None:
    pipeline = teacher()
    pipeline.scheduler = cls.from_config(pipeline.scheduler.config)
    wanted = draw(pipeline, generator=torch.Generator().manual_seed(0))
    with stock.adaptive(pipeline, 2.0) as count:
        found = draw(pipeline, generator=torch.Generator().manual_seed(0))
    close(found, wanted, 1e-5)
    assert count.evaluations == 2 * 2 * len(pipeline.scheduler.timesteps)


def test_adaptive_guidance_that_never_starts_is_the_conditional_call_at_its_cost() -> None:
    pipeline = teacher()
    with stock.adaptive(pipeline, -1.0) as count, rows_seen(pipeline.unet) as rows:
        found = draw(pipeline)
    close(found, draw(pipeline, scale=1.0), 1e-5)
    assert rows == [2] * 4
    assert count.evaluations == 8


@pytest.mark.parametrize("kind", ["x0", "eps"])
def test_adaptive_guidance_in_the_stock_call_is_the_toolkit_s_and_saves_the_passes(kind: Any) -> None:
    pipeline, gamma, seen = teacher(), {"x0": 0.9, "eps": 0.97}[kind], []

    def wrap(family: Family) -> Denoise:
        def counting(x_t: Tensor, t: Tensor, cond: Any) -> Any:
            seen.append(len(x_t))
            return family.denoiser(x_t, t, cond)

        return guiders.adaptive(counting, family.uncond(), 3.0, gamma, kind)

    with stock.adaptive(pipeline, gamma, kind) as count, rows_seen(pipeline.unet) as rows:
        found = draw(pipeline, 8)
    close(found, by_hand(pipeline, wrap, 8))
    assert rows == seen
    assert count.evaluations == sum(rows)
    assert 16 < sum(rows) < 32
    with stock.adaptive(pipeline, gamma, kind), rows_seen(pipeline.unet) as again:
        for _ in range(2):
            assert torch.equal(draw(pipeline, 8), found)  # each call begins guided
    assert again == rows * 2


# LinearAG


def fitted(pipeline: Any, num_steps: int = 8, scale: float = 3.0) -> guiders.Coefficients:
    prompts = ["a red apple", "a dog left of a cat", "a dog", "a cat"] * 4
    generator = torch.Generator().manual_seed(5)
    return stock.fit(pipeline, prompts, scale, num_inference_steps=num_steps, generator=generator)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_linear_guidance_errs_less_than_none_at_fewer_passes_than_all(prediction_type: str) -> None:
    """On noise that the fit has not seen."""
    pipeline = teacher(prediction_type)
    found, before = fitted(pipeline), traces(pipeline)
    assert found.times == tuple(ddim_times(sd.wrap(pipeline).denoiser.schedule, 8))
    wanted, without = draw(pipeline, 8, seed=3), draw(pipeline, 8, scale=1.0, seed=3)
    with stock.linear(pipeline, found) as count, rows_seen(pipeline.unet) as rows:
        ours = draw(pipeline, 8, seed=3)
    assert rows == [4, 2, 4, 2, 2, 2, 2, 2]
    assert count.evaluations == sum(rows)
    assert (without - wanted).square().mean() > 1e-3
    # a network of random weights is as far from linear as can be; trained ones do better
    assert (ours - wanted).square().mean() < 0.8 * (without - wanted).square().mean()
    assert traces(pipeline) == before


def test_linear_guidance_in_the_stock_call_is_the_toolkit_s() -> None:
    pipeline = teacher()
    found = fitted(pipeline)
    with stock.linear(pipeline, found):
        ours = draw(pipeline, 8)
    close(ours, by_hand(pipeline, lambda f: guiders.linear(f.denoiser, f.uncond(), found), 8))


def test_fitting_runs_the_stock_call_and_changes_nothing_of_it() -> None:
    pipeline, recording = teacher(), guiders.Recording()
    with stock._guiding(pipeline, lambda d, u, w: guiders.recorded(d, u, w, recording)):
        found = draw(pipeline)
    close(found, draw(pipeline), 1e-5)
    close(found, by_hand(pipeline, lambda f: guided(f.denoiser, f.uncond(), 3.0), 4))
    assert [c.shape for c in recording.cond] == [u.shape for u in recording.uncond] == [(2, 4, 8, 8)] * 4


# NASA


def student(
    prediction_type: str = "v_prediction", num_steps: int = 1, sampler: Sampler = "renoise", start: float = 1.0
) -> Any:
    """An exported student's pipeline, no longer its teacher."""
    family = sd.wrap(teacher(prediction_type), start=start)
    network = tiny.perturbed(family.student(), seed=4)
    return family.pipeline(network.requires_grad_(False), num_steps, sampler)


def cross_attention(pipeline: Any) -> Any:
    return pipeline.unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn2")


def attended(attn: Any, hidden: Tensor, text: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V written out head by head: [B, N, C]."""
    query, key, value = attn.to_q(hidden), attn.to_k(text), attn.to_v(text)
    width = query.shape[2] // attn.heads
    parts = []
    for head in range(attn.heads):
        q, k, v = (z[..., head * width : (head + 1) * width] for z in (query, key, value))
        parts.append(torch.softmax(q @ k.transpose(1, 2) / width**0.5, -1) @ v)
    return torch.cat(parts, -1)


@pytest.fixture
def layer() -> tuple[Any, Tensor, Tensor, Tensor]:
    """A cross-attention in float64, its queries' input, text, and a negative prompt's text."""
    attn = cross_attention(teacher()).double()
    g = torch.Generator().manual_seed(1)
    made = [torch.randn(*shape, generator=g).double() for shape in ((3, 5, 16), (3, 7, 16), (1, 7, 16))]
    return (attn, *made)


@torch.no_grad()
def test_nasa_is_the_difference_of_two_attentions_before_the_projection(layer: Any) -> None:
    attn, hidden, text, negative = layer
    z = attended(attn, hidden, text) - 0.3 * attended(attn, hidden, negative.expand(3, -1, -1))
    found = nasa.NasaProcessor(negative, 0.3)(attn, hidden, text)
    torch.testing.assert_close(found, attn.to_out[0](z), rtol=1e-9, atol=1e-9)
    assert attn.to_out[0].bias.abs().max() > 0.1  # which is not scaled


@torch.no_grad()
@pytest.mark.parametrize("processor", [AttnProcessor(), AttnProcessor2_0()])
def test_nasa_of_scale_zero_is_the_attention_itself(layer: Any, processor: Any) -> None:
    attn, hidden, text, negative = layer
    found = nasa.NasaProcessor(negative, 0.0)(attn, hidden, text)
    torch.testing.assert_close(found, processor(attn, hidden, text), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_nasa_away_from_the_prompt_itself_keeps_one_minus_scale_of_it(layer: Any) -> None:
    attn, hidden, _, negative = layer
    text = negative.expand(3, -1, -1)
    found = nasa.NasaProcessor(negative, 0.3)(attn, hidden, text)
    torch.testing.assert_close(found, attn.to_out[0](0.7 * attended(attn, hidden, text)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "arguments",
    [
        {"encoder_hidden_states": None},
        {"attention_mask": torch.zeros(3, 1, 7)},
        {"hidden_states": torch.zeros(3, 16, 4, 4)},
    ],
)
def test_nasa_refuses_other_calls_than_those_to_text(layer: Any, arguments: dict[str, Any]) -> None:
    attn, hidden, text, negative = layer
    given = {"hidden_states": hidden, "encoder_hidden_states": text} | arguments
    with pytest.raises(ValueError, match="NASA steers cross-attention to unmasked text only"):
        nasa.NasaProcessor(negative, 0.3)(attn, **given)


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("num_steps", [1, 2])
def test_nasa_steers_a_student_in_its_stock_call(prediction_type: str, num_steps: int) -> None:
    """At the cost of no network evaluation, linearly in the scale where that is small."""
    pipeline = student(prediction_type, num_steps)

    def images(scale: float, negative: str = "a dog left of a cat") -> Tensor:
        with stock.nasa(pipeline, negative, scale) as count:
            found = draw(pipeline, num_steps, generator=torch.Generator().manual_seed(1))
        assert count.evaluations == 2 * num_steps
        return found

    plain = draw(pipeline, num_steps, generator=torch.Generator().manual_seed(1))
    close(images(0.0), plain, 1e-5)
    steered = images(0.5)
    assert (steered - plain).abs().max() > 1e-2
    assert not torch.equal(steered, images(0.5, "a red apple"))
    if num_steps == 1:
        small = [(images(s) - plain) / s for s in (1e-2, 2e-2)]
        assert (small[0] - small[1]).norm() < 0.1 * small[0].norm()


def test_nasa_touches_cross_attention_alone_and_gives_each_processor_back() -> None:
    pipeline = student()
    mixed = {n: AttnProcessor() if i % 2 else AttnProcessor2_0() for i, n in enumerate(pipeline.unet.attn_processors)}
    pipeline.unet.set_attn_processor(dict(mixed))

    def within() -> None:
        with stock.nasa(pipeline, "a dog"):
            now = pipeline.unet.attn_processors
            assert {n for n, p in now.items() if isinstance(p, nasa.NasaProcessor)} == {n for n in now if "attn2" in n}
            assert all(now[n] is mixed[n] for n in now if "attn1" in n)
            raise KeyError("within")

    with pytest.raises(KeyError, match="within"):
        within()
    assert pipeline.unet.attn_processors == mixed


def test_nasa_of_adapters_and_half_precision_runs() -> None:
    pipeline = student().to(dtype=torch.bfloat16)
    with stock.nasa(pipeline, "a dog", 0.2):
        assert torch.isfinite(draw(pipeline, 1, latents=noise().bfloat16())).all()


def test_nasa_refuses_attention_it_does_not_know() -> None:
    pipeline = student()
    cross_attention(pipeline).set_processor(IPAdapterAttnProcessor(16, 16))
    with pytest.raises(ValueError, match=r"attention of down_blocks.0.\S+ \(IPAdapterAttnProcessor\); it needs plain"):
        stock.nasa(pipeline, "a dog").__enter__()
    for attn in [m for m in pipeline.unet.modules() if hasattr(m, "is_cross_attention")]:
        attn.is_cross_attention = False
    with pytest.raises(ValueError, match="UNet2DConditionModel has no cross-attention that NASA could steer"):
        stock.nasa(pipeline, "a dog").__enter__()


# Diversity distillation


def first_input(pipeline: Any, seen: list[tuple[Tensor, float]]) -> Any:
    """A hook that keeps what the student is called on."""
    return pipeline.unet.register_forward_pre_hook(lambda _, args: seen.append((args[0], float(args[1]))))


@pytest.mark.parametrize("sampler", ["renoise", "ddim"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_teacher_of_no_interval_is_the_student_bit_for_bit_and_of_all_the_teacher(
    sampler: Sampler, seed: int
) -> None:
    pupil, other = student(num_steps=2, sampler=sampler), teacher()

    def images(**more: Any) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        return pupil(PROMPTS, num_inference_steps=2, generator=g, output_type="latent", **more).images

    alone = images()
    with stock.diversity(pupil, other, intervals=0) as count:
        assert torch.equal(images(), alone)
    assert count.evaluations == 4
    with stock.diversity(pupil, other, intervals=2, num_inference_steps=5, guidance_scale=3.0) as count:
        found = images()
    g = torch.Generator().manual_seed(seed)
    wanted = other(PROMPTS, num_inference_steps=5, guidance_scale=3.0, generator=g, output_type="latent").images
    assert torch.equal(found, wanted)
    assert count.evaluations == 2 * 5 * 2
    assert torch.equal(images(), alone)


@pytest.mark.parametrize("sampler", ["renoise", "ddim"])
@pytest.mark.parametrize(("num_steps", "intervals", "evaluations"), [(2, 1, 10), (4, 1, 5), (4, 3, 15)])
def test_latents_go_over_unchanged_at_the_student_s_own_time(
    sampler: Sampler, num_steps: int, intervals: int, evaluations: int
) -> None:
    """And all of it is what the toolkit's own sampler gives."""
    pupil, other, seen = student(num_steps=num_steps, sampler=sampler), teacher(), []
    handle = first_input(pupil, seen)
    with stock.diversity(pupil, other, intervals, 20, 3.0) as count:
        g = torch.Generator().manual_seed(2)
        found = pupil(PROMPTS, num_inference_steps=num_steps, generator=g, output_type="latent").images
    handle.remove()
    assert count.evaluations == 2 * (2 * evaluations + num_steps - intervals)
    family, own = sd.wrap(other), sd.wrap(pupil)
    schedule, times = family.denoiser.schedule, family.student_times(num_steps)
    assert [t for _, t in seen] == times[intervals:]
    g = torch.Generator().manual_seed(2)
    x_t = torch.randn(2, 4, 8, 8, generator=g)
    with torch.no_grad():
        cond, grid = family.encode_prompts(PROMPTS), ddim_times(schedule, 20)
        guide = guided(family.denoiser, family.uncond(), 3.0)
        left = sample(guide, schedule, x_t, grid[: grid.index(times[intervals])], cond, ddim, end=times[intervals])
        close(seen[0][0], left)
        wanted = guiders.sample_diverse(
            guide,
            own.denoiser,
            schedule,
            x_t,
            grid,
            times,
            cond,
            sampler,
            intervals,
            lambda: torch.randn(x_t.shape, generator=g),
        )
    close(found, wanted)


def test_a_student_that_calls_itself_and_one_whose_times_are_given_go_on_as_well(tmp_path: Path) -> None:
    student(num_steps=2).save_pretrained(tmp_path)
    (tmp_path / "fastgen.json").write_text('{"num_inference_steps": 2, "guidance_scale": 1.0}')
    pupil, other = export.load(tmp_path), teacher()
    for call in ({}, {"num_inference_steps": 2}, {"timesteps": [999, 499]}):
        with stock.diversity(pupil, other, 1, 4) as count:
            pupil("a dog", negative_prompt="a cat", generator=torch.Generator().manual_seed(0), **call)
        assert count.evaluations == 2 * 2 + 1


def test_a_student_of_an_earlier_start_takes_over_at_its_own_time() -> None:
    pupil, seen = student(num_steps=2, start=0.4), []
    handle = first_input(pupil, seen)
    with stock.diversity(pupil, teacher(), 1, 5) as count:
        draw(pupil, 2)
    handle.remove()
    assert [t for _, t in seen] == [199]
    assert count.evaluations == 2 * (2 * 4 + 1)


@IN_DIFFUSERS
def test_a_multistep_teacher_hands_over_at_its_nearest_time_and_nobody_warns(caplog: pytest.LogCaptureFixture) -> None:
    pupil, other = student(num_steps=2), teacher()
    other.scheduler = DPMSolverMultistepScheduler.from_config(other.scheduler.config)
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        with stock.diversity(pupil, other, 1, 7) as count:
            draw(pupil, 2)
    finally:
        logger.removeHandler(caplog.handler)
    times = other.scheduler.timesteps.tolist()
    before = count.evaluations // 2 - 1
    assert before % 2 == 0
    assert abs(times[before // 2] - 499) == min(abs(t - 499) for t in times)
    assert not [r for r in caplog.records if "timestep" in r.getMessage()]


@pytest.mark.parametrize("change", ["teacher", "student", "timesteps"])
def test_schedulers_that_do_not_fit_are_refused(change: str) -> None:
    pupil, other = student(num_steps=2), teacher()
    if change == "teacher":
        other.scheduler = EulerDiscreteScheduler.from_config(other.scheduler.config)
        message = r"the teacher's EulerDiscreteScheduler scales its latents.*set teacher.scheduler = DDIMScheduler"
    elif change == "student":
        pupil.scheduler = EulerDiscreteScheduler.from_config(other.scheduler.config)
        message = "the student's EulerDiscreteScheduler scales its latents"
    else:
        pupil.scheduler = other.scheduler
        message = "the student's DDIMScheduler takes no timesteps to go on from; it needs one that does, such as LCM"
    with pytest.raises(ValueError, match=message):
        stock.diversity(pupil, other).__enter__()


def test_more_intervals_than_the_student_has_and_unknown_steps_are_told() -> None:
    pupil, other = student(num_steps=2), teacher()
    with pytest.raises(ValueError, match="the teacher can take 0 to 2 of the 2 intervals of this student, got 3"):
        with stock.diversity(pupil, other, intervals=3):
            draw(pupil, 2)
    pupil.scheduler = DPMSolverMultistepScheduler.from_config(other.scheduler.config)
    with pytest.raises(ValueError, match="the number of the student's steps is not known; give num_inference_steps"):
        with stock.diversity(pupil, other):
            pupil("a dog")


# What they refuse


def no_guidance() -> Any:
    pipeline = teacher()
    with stock.adaptive(pipeline):
        return draw(pipeline, scale=1.0)


def a_student() -> Any:
    pipeline = student()
    pipeline.scheduler = tiny.scheduler("v_prediction")
    with stock.cfgpp(pipeline):
        return draw(pipeline, 1)


def eta() -> Any:
    pipeline = teacher()
    with stock.cfgpp(pipeline):
        return draw(pipeline, eta=0.5)


def scheduled(scheduler: Any, switch: Callable[[Any], Any]) -> Any:
    pipeline = teacher()
    pipeline.scheduler = scheduler
    return switch(pipeline).__enter__()


def linear(num_steps: int = 4, scale: float = 3.0) -> Any:
    pipeline = teacher()
    found = fitted(pipeline, 4)
    with stock.linear(pipeline, found):
        return draw(pipeline, num_steps, scale)


def without_unet() -> Any:
    pipeline = teacher()
    pipeline.unet = None
    return stock.adaptive(pipeline).__enter__()


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (no_guidance, "which this call does not do; give a guidance_scale above 1"),
        (a_student, r"a student's pipeline has no guidance: there is nasa"),
        (eta, r"CFG\+\+ is defined on DDIM at eta 0, got 0.5; leave eta out"),
        (lambda: stock.cfgpp(teacher(), 7.5).__enter__(), r"CFG\+\+ takes a scale from 0 to 1, got 7.5"),
        (
            lambda: scheduled(PNDMScheduler(), stock.cfgpp),
            r"defined on DDIM without clipping, not on this PNDMScheduler; set pipeline.scheduler = DDIMScheduler",
        ),
        (lambda: scheduled(DDIMScheduler(), stock.cfgpp), r"not on this DDIMScheduler; .* clip_sample=False"),
        (
            lambda: scheduled(FlowMatchEulerDiscreteScheduler(), stock.adaptive),
            "FlowMatchEulerDiscreteScheduler has no table of alphas_cumprod, or predicts what is not known; guiders",
        ),
        (lambda: linear(scale=7.5), "fitted at guidance_scale 3, the call has 7.5; call with the fit's, or fit again"),
        (lambda: linear(num_steps=5), r"LinearAG was fitted on 4 steps at \[999.0, .* but step 2 is at 799"),
        (without_unet, "StableDiffusionPipeline has no U-Net; guiders know pipelines like Stable Diffusion's"),
        (lambda: stock.Choice("nasa"), "guider nasa steers away from a negative prompt; give --negative-prompt"),
        (lambda: stock.Choice("linear"), "guider linear and --coefficients belong together; give both or neither"),
    ],
)
def test_what_a_guider_cannot_do_is_told(attempt: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attempt()


# Stable Diffusion XL, whose U-Net is also conditioned on a pooled text and on sizes


@pytest.fixture(scope="module")
def sdxl() -> Any:
    torch.manual_seed(0)
    found = tiny.words()
    config = CLIPTextConfig(**{**tiny.text_encoder().config.to_dict(), "projection_dim": 16})
    return lively(
        StableDiffusionXLPipeline(
            vae=tiny.autoencoder(),
            text_encoder=tiny.text_encoder(),
            text_encoder_2=CLIPTextModelWithProjection(config),
            tokenizer=found,
            tokenizer_2=found,
            unet=tiny.unet(
                cross_attention_dim=32,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=64,
            ),
            scheduler=tiny.scheduler("epsilon"),
            add_watermarker=False,
        )
    )


def test_guiders_work_on_stable_diffusion_xl(sdxl: Any) -> None:
    sdxl.set_progress_bar_config(disable=True)
    wanted, plain = draw(sdxl), draw(sdxl, scale=1.0)
    with stock.adaptive(sdxl, 2.0):
        close(draw(sdxl), wanted, 1e-5)
    with stock.adaptive(sdxl, -1.0):
        close(draw(sdxl), plain, 1e-5)
    with stock.adaptive(sdxl, 0.9) as count:
        draw(sdxl)
    assert 8 <= count.evaluations <= 16
    with stock.cfgpp(sdxl, 0.6):
        assert (draw(sdxl) - wanted).abs().max() > 1e-3
    with stock.nasa(sdxl, "a dog", 0.0):
        close(draw(sdxl, scale=1.0), plain, 1e-5)
    with stock.nasa(sdxl, "a dog", 0.3):
        assert (draw(sdxl, scale=1.0) - plain).abs().max() > 1e-3


# The command line


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """teacher/, one/ and two/: students of one and two steps, and linear.json."""
    folder = tmp_path_factory.mktemp("guiders")
    pipeline = teacher()
    pipeline.save_pretrained(folder / "teacher")
    fitted(pipeline, 4, 2.5).save(folder / "linear.json")
    for name, num_steps in (("one", 1), ("two", 2)):
        student(num_steps=num_steps).save_pretrained(folder / name)
        card = f'{{"num_inference_steps": {num_steps}, "guidance_scale": 1.0}}'
        (folder / name / "fastgen.json").write_text(card)
    return folder


def generated(folder: Path, out: Path, *words: object) -> tuple[bytes, str]:
    result = done("generate", folder, "-p", "a dog", "-o", out, *words)
    return (out / "0000_00.png").read_bytes(), result.out


def test_generate_switches_guiders_on(folders: Path, tmp_path: Path) -> None:
    four = ("--steps", 4, "--guidance-scale", 2.5)
    linear = ("--guider", "linear", "--coefficients", folders / "linear.json")
    calls: dict[str, tuple[tuple[object, ...], str]] = {
        "plain": (four, ""),
        "negative": ((*four, "--negative-prompt", "a cat"), ""),
        "cfgpp": ((*four, "--guider", "cfgpp"), "8"),
        "cfgpp 0.9": ((*four, "--guider", "cfgpp", "--guider-scale", 0.9), "8"),
        "adaptive": ((*four, "--guider", "adaptive", "--guider-scale", -1), "4"),
        "adaptive 2": ((*four, "--guider", "adaptive", "--guider-scale", 2), "8"),
        "linear": (linear, "5"),  # steps and scale are the file's
    }
    found = {}
    for name, (words, evaluations) in calls.items():
        found[name], said = generated(folders / "teacher", tmp_path / name, *words)
        told = re.findall(r"^(\S+) network evaluations an image$", said, re.M)
        assert told == ([evaluations] if evaluations else [])
    assert found.pop("adaptive 2") == found["plain"]
    assert len(set(found.values())) == len(found)


def test_generate_steers_students_and_lets_teachers_begin(folders: Path, tmp_path: Path) -> None:
    cat = ("--negative-prompt", "a cat")
    plain, _ = generated(folders / "one", tmp_path / "a")
    steered, said = generated(folders / "one", tmp_path / "b", "--guider", "nasa", *cat, "--guider-scale", 0.5)
    assert steered != plain
    assert "\n1 network evaluations an image" in said
    first = ("--teacher", folders / "teacher", "--teacher-steps", 4)
    alone, _ = generated(folders / "two", tmp_path / "c")
    begun, said = generated(folders / "two", tmp_path / "d", *first)
    assert "\n5 network evaluations an image" in said
    other, _ = generated(folders / "two", tmp_path / "e", *first, "--guidance-scale", 2)
    negative, _ = generated(folders / "two", tmp_path / "f", *first, *cat)
    both, _ = generated(folders / "two", tmp_path / "g", *first, *cat, "--guider", "nasa", "--guider-scale", 0.5)
    assert len({alone, begun, other, negative, both}) == 5


@pytest.mark.parametrize(
    ("pipeline", "words", "message"),
    [
        (
            "one",
            ["--teacher", "x"],
            "one: is a student of 1 step, which --teacher would replace; leave one out",
        ),
        ("one", ["--guider", "nasa"], "guider nasa steers away from a negative prompt; give --negative-prompt"),
        (
            "one",
            ["--negative-prompt", "a"],
            "one: is a student, whose call ignores a negative prompt; add --guider nasa",
        ),
        (
            "teacher",
            ["--negative-prompt", "a", "--guidance-scale", "1"],
            "does nothing at guidance scale 1; give more",
        ),
        ("teacher", ["--guider", "linear"], "guider linear and --coefficients belong together; give both or neither"),
        ("teacher", ["--guider", "cfgpp", "--coefficients", "x"], "guider linear and --coefficients belong together"),
        (
            "teacher",
            ["--guider-scale", "0.5"],
            "--guider-scale and --coefficients say more of a guider; give --guider",
        ),
        ("teacher", ["--coefficients", "x"], "--guider-scale and --coefficients say more of a guider; give --guider"),
        (
            "teacher",
            ["--guider", "linear", "--coefficients", "x"],
            r"x: holds no coefficients of LinearAG \(.*No such",
        ),
        (
            "teacher",
            ["--guider", "linear", "--coefficients", "x", "--guider-scale", "2"],
            "guider linear has the scale of its coefficients; leave out --guider-scale",
        ),
        (
            "teacher",
            ["--guider", "cfgpp", "--guider-scale", "2", "--steps", "2"],
            r"CFG\+\+ takes a scale from 0 to 1",
        ),
    ],
)
def test_options_that_do_not_go_together_are_one_line(
    folders: Path, tmp_path: Path, pipeline: str, words: list[str], message: str
) -> None:
    result: Result = fastgen("generate", folders / pipeline, "-p", "a dog", "-o", tmp_path, *words)
    assert result.code == 2
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert re.search(f"^fastgen: .*{message}", lines[0]), lines[0]


# The document


@pytest.mark.skipif(not DOCUMENT.is_file(), reason="not a checkout")
def test_the_document_s_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block as it stands, on the shipped teacher; students that a reader has trained are untrained here."""
    family = sd.load(locate("assets:emoji/teacher"))
    for path, num_steps in (("runs/emoji/dmd2/pipeline", 1), ("runs/emoji/pcm/pipeline", 4)):
        made = family.pipeline(family.student(), num_steps, "ddim" if num_steps > 1 else "renoise")
        made.save_pretrained(tmp_path / path)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) >= 5
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(DOCUMENT), "exec"), names)
