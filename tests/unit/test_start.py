"""Where a student first meets pure noise: what is missing there, and one rule for all that learn from noised data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgen import times
from fastgen.denoiser import Denoiser
from fastgen.engine import Engine
from fastgen.export import export
from fastgen.family import Family
from fastgen.method import Batch
from fastgen.pipelines import sd
from fastgen.rng import Noise
from fastgen.sampling import ddim_times, sample_student
from fastgen.schedule import Flow, TabulatedVP
from tests import tiny
from tests.golden import record
from tests.oracle import Map, Samples, call, conv_family, labels, optims, scaled_linear, sd_schedule, train

FROM_DATA = ("consistency", "lcm", "meanflow", "pcm", "scm")
"""Methods whose students learn at their first time from noised data and not from pure noise."""
SD_TIMES = {3: 998.0, 6: 995.0, 7: 993.0}


def family_starting(times_of: Any) -> Family:
    return replace(conv_family(), student_times=times_of)


# What is missing


def test_stable_diffusion_s_students_of_3_6_and_7_steps_begin_a_little_below_the_last_time() -> None:
    family = sd.wrap(tiny.pipeline())
    assert {n: family.student_times(n)[0] for n in range(1, 9)} == {n: SD_TIMES.get(n, 999.0) for n in range(1, 9)}


@pytest.mark.parametrize(("first", "more"), [(998.0, 0.0004), (995.0, 0.0017), (993.0, 0.0025), (399.0, 0.58)])
def test_what_pure_noise_lacks_is_hardly_more_there_than_at_the_last_time(first: float, more: float) -> None:
    """alpha x0, for latents of deviation 1; all of these fit the numbers that the rule's text gives."""
    alpha = sd_schedule()(torch.tensor([first, 999.0])).alpha
    assert alpha[1].item() == pytest.approx(0.068, abs=5e-4)
    assert (alpha[0] - alpha[1]).item() == pytest.approx(more, rel=0.05)


@pytest.mark.parametrize("first", [999.0, 998.0, 995.0, 993.0])
def test_the_exact_map_from_pure_noise_errs_by_what_is_missing(first: float) -> None:
    """Of N(m, s^2): its mean by -alpha m s / root(alpha^2 s^2 + sigma^2), at 993 only 4 % more than at 999."""
    m, s, schedule = 1.0, 0.5, sd_schedule()
    denoiser = Denoiser(Map((m,) * 3, (s,) * 3, schedule, "v"), schedule, "v", call)
    eps = torch.randn(4000, 4, 4, generator=torch.Generator().manual_seed(0))
    eps = (eps - eps.mean()) / eps.std()
    with torch.no_grad():
        x0 = sample_student(denoiser, schedule, eps, [first], labels(["left"] * len(eps)), "renoise")
    at = schedule(torch.tensor([first]))
    spread = (at.alpha * s).square() + at.sigma.square()
    assert x0.mean().item() == pytest.approx((m - at.alpha * m * s / spread.sqrt()).item(), abs=1e-4)
    assert x0.mean().item() == pytest.approx(m - 0.0342, abs=0.0013)
    assert x0.std().item() == pytest.approx(s, abs=1e-3)


# The rule


@pytest.mark.parametrize("schedule", [sd_schedule(), Flow()])
def test_the_bound_is_a_hundredth_more_signal_than_at_the_last_time(schedule: Any) -> None:
    span = torch.linspace(schedule.t_min, schedule.t_max, 20001, dtype=torch.float64)
    alpha = schedule(span).alpha
    fits = span[alpha <= alpha[-1] + 0.01]
    lowest = fits[0].item()
    assert lowest < fits[-1].item()
    times.check_start(schedule, [lowest, schedule.t_min])
    with pytest.raises(ValueError, match="meets pure noise at time"):
        times.check_start(schedule, [lowest - 1e-3 * (schedule.t_max - schedule.t_min)])


def test_it_says_where_the_student_begins_what_is_left_there_and_what_would_do() -> None:
    with pytest.raises(
        ValueError,
        match=r"^this student meets pure noise at time 999, not 399; set student\.start 1, and student\.steps to a "
        r"number whose times begin near the last, such as 1: at 399 65% of the image is still there$",
    ):
        times.check_start(sd_schedule(), [399.0])
    short = TabulatedVP(scaled_linear(20))  # of whose 20 times 8 steps take 15, 13, ...
    with pytest.raises(ValueError, match=r"meets pure noise at time 19, not 15; .* such as 1: at 15 "):
        times.check_start(short, [15.0, 13.0])
    times.check_start(short, [19.0])


@pytest.mark.parametrize("name", FROM_DATA)
def test_every_method_that_learns_from_noised_data_keeps_it(name: str) -> None:
    module: Any = record.methods()[name]
    for first in SD_TIMES.values():
        module.Method(module.Config(), family_starting(lambda n, t=first: [t, 499.0]), 2)
    with pytest.raises(ValueError, match=r"meets pure noise at time 999, not 899"):
        module.Method(module.Config(), family_starting(lambda n: [899.0, 499.0]), 2)


@pytest.mark.parametrize("name", ["dmd2", "kd", "sid"])
def test_others_learn_from_pure_noise_at_their_first_time_and_may_begin_anywhere(name: str) -> None:
    module: Any = record.methods()[name]
    module.Method(module.Config(), family_starting(lambda n: ddim_times(sd_schedule(), n, 0.4)), 1)


@pytest.mark.parametrize("name", FROM_DATA)
def test_they_make_students_of_1_to_8_steps_and_say_so(name: str) -> None:
    """On Stable Diffusion's own table and scheduler."""
    family, module = sd.wrap(tiny.pipeline()), record.methods()[name]
    assert list(module.ABOUT.steps) == [1, 2, 3, 4, 5, 6, 7, 8]
    for num_steps in module.ABOUT.steps:
        assert module.Method(module.Config(), family, num_steps).num_steps == num_steps


# Trained so


@pytest.mark.parametrize("num_steps", [3, 7])
@pytest.mark.parametrize("name", ["consistency", "meanflow", "scm"])
def test_a_student_of_3_or_7_steps_trains_and_leaves_through_the_gate(
    name: str, num_steps: int, tmp_path: Path
) -> None:
    family, module = sd.wrap(tiny.pipeline("v_prediction")), record.methods()[name]
    cond, uncond, latents = family.encode_prompts(tiny.PROMPTS[:2]), family.uncond(), Samples(family.latent_shape)

    class Data:
        def batch(self, samples: Any) -> Batch:
            return replace(latents.batch(samples), cond=cond, uncond=uncond)

    method = module.Method(module.Config(), family, num_steps)
    train(Engine(method, Data(), optims(method, lr=1e-3), batch_size=2, steps=2), range(2))
    network = method.networks[method.exported]
    export(family, network, num_steps, tmp_path / "out", prompts=["a red apple"], card={}, sampler=method.sampler)
    assert (tmp_path / "out" / "model_index.json").is_file()


@pytest.mark.parametrize("first", [999.0, 993.0])
def test_scm_s_discriminator_judges_the_student_at_its_own_first_time(first: float) -> None:
    module: Any = record.methods()["scm"]
    seen: list[torch.Tensor] = []
    method = module.Method(module.Config(max_time=1.0), family_starting(lambda n: [first]), 1)
    method.student.network.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    with torch.no_grad():
        method.generate(Samples((2, 8, 8)).batch(range(4)), Noise(range(4), 0, 0, "discriminator"))
    assert seen[0].tolist() == [first] * 4
