"""Adapter guidance distillation: what it is trained on, what it costs, and that adapters alone take guidance on."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen import lora
from fastgen.denoiser import guided
from fastgen.engine import Engine
from fastgen.guidance import Scales, with_guidance
from fastgen.lora import Lora, View
from fastgen.pipelines import sd
from fastgen.rng import Noise
from fastgen.schedule import Flow, Schedule, add_noise
from fastgen.trainers.agd import Config, Method
from tests import tiny
from tests.oracle import (
    Gaussian,
    Samples,
    conv_family,
    gaussian_family,
    moved,
    optims,
    same,
    sd_schedule,
    states,
    train,
)

CONV = Samples((2, 8, 8), images=False)
ONE = Scales(low=1.0, high=1.0, embed=False)


def noise(n: int = 4, step: int = 0) -> Noise:
    return Noise(range(n), 0, step, "student")


def conv_method(**options: Any) -> Method:
    torch.manual_seed(0)
    return Method(Config(**{"lora": Lora(rank=4), **options}), conv_family(), 1)


# What it is trained on


@pytest.mark.parametrize("schedule", [sd_schedule(), Flow()])
def test_times_fall_from_the_noisiest_and_are_one_from_each_part(schedule: Schedule) -> None:
    method, n = conv_method(states=5), 500
    grid = method.times(schedule, noise(n).uniform())
    assert len(grid) == 5
    assert (grid[0] == schedule.t_max).all()
    for i, t in enumerate(grid[1:]):
        share = t / schedule.t_max
        assert share.min() >= 1 - (i + 1) / 4 - 1e-3
        assert share.max() <= 1 - i / 4 + 1e-3
        assert share.max() - share.min() > 0.23  # all of the part
    assert all((a >= b).all() for a, b in itertools.pairwise(grid))


def gaussian(scales: Scales, num: int) -> Any:
    """The method on an exact teacher; its student, which Gaussians cannot lend adapters, is not used."""
    made = conv_method(guidance=scales, states=num)
    made.teacher, made.shape = gaussian_family((0.3, 1.0, -0.5), (0.5,) * 3, shape=(2, 2)).denoiser, (2, 2)
    return made


def test_the_way_is_the_guided_teacher_s_ddim_and_the_target_its_output() -> None:
    """With equal deviations the guided Gaussian is one of mean m_u + w (m_c - m_u): DDIM's step in closed form."""
    n, num = 6, 7
    method = gaussian(Scales(low=2.0, high=6.0, embed=False), num)
    batch = Samples((2, 2), images=False, captions=("left",)).batch(range(n))
    scale = noise(n).uniform() * 4 + 2
    x_t, t, target = method.way(batch, scale, noise(n))
    assert x_t.shape == target.shape == (num * n, 2, 2)
    rows: list[Tensor] = [*x_t.split(n)]
    times, outputs = t.split(n), target.split(n)
    assert torch.equal(rows[0], noise(n).normal((2, 2)))
    schedule = sd_schedule()
    for i in range(num):
        at = schedule(times[i]).like(rows[i])
        mean = (0.3 + scale * 0.7).float().reshape(-1, 1, 1)
        centred = (rows[i] - at.alpha * mean) / Gaussian(0.0, 0.5).variance(at)
        x0, eps = mean + at.alpha * 0.25 * centred, at.sigma * centred
        torch.testing.assert_close(outputs[i], at.alpha * eps - at.sigma * x0, rtol=1e-3, atol=1e-3)
        if i + 1 < num:
            torch.testing.assert_close(rows[i + 1], add_noise(schedule, x0, eps, times[i + 1]), rtol=1e-3, atol=2e-3)


def test_states_of_the_way_are_not_noised_images() -> None:
    """At a strong scale they lie far from alpha m_c, where noised images would."""
    method = gaussian(Scales(low=8.0, high=8.0, embed=False), 8)
    batch = Samples((2, 2), images=False, captions=("left",)).batch(range(64))
    x_t, t, _ = method.way(batch, torch.full((64,), 8.0), noise(64))
    last, at = x_t[-64:], sd_schedule()(t[-64:])
    assert (last.mean((1, 2)) / at.alpha).mean() > 3.0


# The loss


def test_without_guidance_a_new_student_is_its_teacher_to_the_bit() -> None:
    method = conv_method(guidance=ONE)
    assert method.loss(CONV.batch(range(4)), noise())["guidance"].abs().max() == 0


def test_the_loss_is_the_mean_error_over_the_states() -> None:
    """A new student is the teacher without guidance, at any scale."""
    method = conv_method(guidance=Scales(low=2.0, high=8.0), states=3)
    batch, rng = CONV.batch(range(4)), noise()
    found = method.loss(batch, noise())["guidance"]
    scale = method.config.guidance.draw(rng)
    x_t, t, target = method.way(batch, scale, rng)
    total = torch.zeros(4)
    for x, at, y in zip(x_t.split(4), t.split(4), target.split(4), strict=True):
        torch.testing.assert_close(guided(method.teacher, batch.uncond, scale)(x, at, batch.cond).y, y)
        total += (method.teacher(x, at, batch.cond).y - y).square().flatten(1).mean(1)
    torch.testing.assert_close(found, total / 3)
    assert found.min() > 1e-4


@pytest.mark.parametrize(("scales", "rows"), [(Scales(low=2.0, high=8.0), 8), (ONE, 4)])
def test_a_state_costs_one_guided_pass_of_the_teacher_and_one_of_the_student(scales: Scales, rows: int) -> None:
    method = conv_method(guidance=scales, states=3)
    seen: list[tuple[str, int]] = []
    networks = {"teacher": method.teacher.network, "student": lora.plain(method.student.network)}
    for name, network in networks.items():
        network.register_forward_pre_hook(lambda _, args, name=name: seen.append((name, len(args[0]))))
    method.loss(CONV.batch(range(4)), noise())
    assert seen == [("teacher", rows)] * 3 + [("student", 12)]


# Who learns


def test_only_adapters_learn_and_the_scale_s_way_in_is_among_them() -> None:
    method = conv_method(lora=Lora(rank=2, targets=["mid.0"]))
    student = method.networks["student"]
    assert {name.partition(".lora_")[0] for name in student.state_dict()} == {"mid.0", "label"}
    before = states(method)
    train(Engine(method, CONV, optims(method, lr=1e-2), batch_size=2, steps=2), range(2))
    after = states(method)
    assert same(before["teacher"], after["teacher"])
    assert moved(before["student"], after["student"]) == set(before["student"])


def test_adapters_of_the_recipe_take_the_place_of_the_method_s_own() -> None:
    family = lora.adapted(conv_family(), Lora(rank=3), share_backbone=True)
    method = Method(Config(), family, 1)
    assert isinstance(method.student.network, View)
    assert method.student.network.lora.rank == 3
    assert isinstance(method.teacher.network, View)


def test_the_default_adapters_are_a_small_part_of_the_network() -> None:
    family = sd.wrap(tiny.pipeline())
    chosen = Lora(rank=1, targets=["to_q", "to_k", "to_v", "to_out.0"])
    method = Method(Config(lora=chosen), family, 1)
    trained, whole = (sum(p.numel() for p in method.networks[r].parameters()) for r in ("student", "teacher"))
    assert trained < 0.03 * whole
    assert {n.partition(".lora_")[0] for n in method.networks["student"].state_dict() if "time_embedding" in n} == {
        "time_embedding.cond_proj"
    }


# End to end


def test_adapters_learn_guidance_and_tell_its_scales_apart() -> None:
    method = conv_method(guidance=Scales(low=4.0, high=8.0), states=3, lora=Lora(rank=8))
    steps = 120
    optim = optims(method, lr=1e-2, schedule="cosine", weight_decay=0.0, betas=(0.9, 0.99))
    train(Engine(method, CONV, optim, batch_size=4, steps=steps), range(steps))
    batch = CONV.batch(range(64))
    for scale, other in ((4.0, 8.0), (6.0, 4.0), (8.0, 4.0)):
        x_t, t, target = method.way(batch, torch.full((64,), scale), noise(64, step=999))
        cond = {"label": batch.cond["label"].repeat(3, 1)}
        with torch.no_grad():
            guesses = [method.student(x_t, t, with_guidance(cond, w)).y for w in (scale, other)]
            error, of_other, at_start = (
                (y - target).square().mean() for y in (*guesses, method.teacher(x_t, t, cond).y)
            )
        assert error < 0.15 * at_start
        assert error < 0.5 * of_other


# Mistakes


def test_a_network_that_takes_no_adapter_is_told() -> None:
    with pytest.raises(ValueError, match="Affine has no linear or convolution layer; train it without adapters"):
        Method(Config(), gaussian_family(), 1)
