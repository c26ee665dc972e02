"""Schedules: the table of Diffusers, the identities of a variance-preserving schedule, and exact derivatives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, DDPMScheduler

from fastgen.pipelines.vp import KINDS
from fastgen.prediction import Kind, Prediction, combine
from fastgen.sampling import ddim
from fastgen.schedule import Flow, Level, Schedule, TabulatedVP, add_noise
from tests.oracle import schedules, sd_schedule

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def clock(schedule: Schedule, num: int = 101) -> torch.Tensor:
    return torch.linspace(schedule.t_min, schedule.t_max, num, dtype=torch.float64)


@pytest.mark.parametrize("cls", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("config", [{}, SD, {"beta_schedule": "squaredcos_cap_v2"}], ids=["linear", "sd", "cosine"])
def test_integer_times_give_the_diffusers_table(cls: type, config: dict) -> None:
    table = cls(**config).alphas_cumprod.double()
    level = TabulatedVP(table)(torch.arange(len(table)))
    torch.testing.assert_close(level.alpha.square(), table, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(level.sigma.square(), 1 - table, rtol=1e-9, atol=1e-15)


def test_tabulated_is_variance_preserving_between_entries_too() -> None:
    schedule = sd_schedule()
    level = schedule(clock(schedule, 1234))
    torch.testing.assert_close(level.alpha**2 + level.sigma**2, torch.ones(1234, dtype=torch.float64))


@pytest.mark.parametrize("schedule", schedules())
def test_signal_to_noise_falls_strictly_with_t(schedule: Schedule) -> None:
    level = schedule(clock(schedule, 3001))
    ratio = level.alpha / level.sigma
    assert (ratio[1:] < ratio[:-1]).all()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch.func's own decompositions
@pytest.mark.parametrize("schedule", schedules())
def test_derivatives_equal_forward_mode_autodiff(schedule: Schedule) -> None:
    t = clock(schedule, 98)[:-1] + 1e-3 * schedule.t_max  # off the table's corners
    _, (d_alpha, d_sigma) = torch.func.jvp(
        lambda t: (schedule(t).alpha, schedule(t).sigma), (t,), (torch.ones_like(t),)
    )
    torch.testing.assert_close(schedule(t).d_alpha, d_alpha, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(schedule(t).d_sigma, d_sigma, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("schedule", schedules())
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_levels_are_float64_whatever_t_is(schedule: Schedule, dtype: torch.dtype) -> None:
    level = schedule(torch.ones(3, dtype=dtype))
    assert {level.alpha.dtype, level.sigma.dtype, level.d_alpha.dtype, level.d_sigma.dtype} == {torch.float64}


def test_flow_is_a_straight_line() -> None:
    t = torch.tensor([0.0, 0.25, 1.0])
    level = Flow()(t)
    assert level.alpha.tolist() == [1, 0.75, 0]
    assert level.sigma.tolist() == [0, 0.25, 1]
    assert level.d_alpha.tolist() == [-1] * 3
    assert level.d_sigma.tolist() == [1] * 3


def test_draw_gives_every_integer_time_its_share() -> None:
    schedule = TabulatedVP(torch.linspace(0.9, 0.1, 10))
    drawn = schedule.draw(torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1])
    assert drawn.unique().tolist() == list(range(10))
    assert (drawn.long().bincount() == 100).all()
    assert schedule.draw(torch.tensor([1.0])).item() == 9


def test_draw_of_flow_is_the_identity() -> None:
    u = torch.tensor([0.0, 0.3, 0.999], dtype=torch.float64)
    assert torch.equal(Flow().draw(u), u)


def test_log_snr_is_the_logit_of_alphas_cumprod() -> None:
    table = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    torch.testing.assert_close(TabulatedVP(table)(torch.arange(3)).log_snr, torch.logit(table))


def test_like_shapes_a_level_against_a_sample_and_first_takes_rows() -> None:
    level = Flow()(torch.tensor([0.1, 0.2, 0.3]))
    like = level.like(torch.zeros(3, 4, 5, 5, dtype=torch.bfloat16))
    assert like.alpha.shape == (3, 1, 1, 1)
    assert like.alpha.dtype == torch.float32
    assert level.like(torch.zeros(3, 2, dtype=torch.float64)).sigma.dtype == torch.float64
    assert level.first(2).sigma.tolist() == pytest.approx([0.1, 0.2])


def test_add_noise_is_the_definition() -> None:
    x0, eps = torch.randn(2, 3, 4, generator=torch.manual_seed(0)), torch.ones(2, 3, 4)
    x_t = add_noise(Flow(), x0, eps, torch.tensor([0.25, 1.0]))
    torch.testing.assert_close(x_t[0], 0.75 * x0[0] + 0.25)
    assert torch.equal(x_t[1], eps[1])


def test_levels_are_differentiable_in_t() -> None:
    t = torch.tensor([10.5], dtype=torch.float64, requires_grad=True)
    level: Level = sd_schedule()(t)
    (d_alpha,) = torch.autograd.grad(level.alpha.sum(), t)
    torch.testing.assert_close(d_alpha, level.d_alpha.detach())


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([0.5], r"at least 2 numbers, got shape \(1,\)"),
        ([[0.9, 0.1]], r"at least 2 numbers, got shape \(1, 2\)"),
        ([0.9, 0.9, 0.1], "must fall strictly"),
        ([1.0, 0.5], "stay within"),
        ([0.9, 0.0, 0.0], "must fall strictly"),
        ([0.5, 0.1, -0.1], "stay within"),
        ([0.1, 0.9], r"got 0\.1 \.\.\. 0\.9"),
    ],
)
def test_a_bad_table_is_refused(table: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TabulatedVP(table)


# A table that ends in nothing but noise


def to_noise() -> TabulatedVP:
    return TabulatedVP(DDIMScheduler(**SD, rescale_betas_zero_snr=True).alphas_cumprod)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(**SD, rescale_betas_zero_snr=True),
        CogVideoXDDIMScheduler(rescale_betas_zero_snr=True, snr_shift_scale=3.0),
    ],
    ids=["ddim", "cogvideox"],
)
def test_a_table_may_end_in_exactly_zero(scheduler: Any) -> None:
    table = scheduler.alphas_cumprod.double()
    assert table[-1] == 0
    level = TabulatedVP(table)(torch.arange(len(table)))
    torch.testing.assert_close(level.alpha.square(), table, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(level.sigma.square(), 1 - table, rtol=1e-9, atol=1e-15)
    assert (level.alpha[-1].item(), level.sigma[-1].item()) == (0, 1)


def test_before_a_last_zero_the_angle_grows_evenly() -> None:
    schedule = to_noise()
    t = 998 + torch.linspace(0, 1, 5, dtype=torch.float64)
    level = schedule(t)
    angle = torch.atan2(level.sigma, level.alpha)
    torch.testing.assert_close(angle.diff(), (math.pi / 2 - angle[0]).expand(4) / 4)
    torch.testing.assert_close(level.alpha**2 + level.sigma**2, torch.ones(5, dtype=torch.float64))
    assert (level.log_snr.diff() < 0).all()
    assert level.log_snr[-1] == -math.inf
    below = schedule(torch.tensor([998 - 1e-9, 998 + 1e-9], dtype=torch.float64))  # no jump where they meet
    torch.testing.assert_close(below.alpha[0], below.alpha[1], rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_derivatives_up_to_a_last_zero_are_exact_and_finite() -> None:
    schedule = to_noise()
    t = torch.tensor([3.5, 997.5, 998.0, 998.25, 998.999, 999.0], dtype=torch.float64)
    _, found = torch.func.jvp(lambda t: (schedule(t).alpha, schedule(t).sigma), (t,), (torch.ones_like(t),))
    level = schedule(t)
    torch.testing.assert_close((level.d_alpha, level.d_sigma), found, rtol=1e-10, atol=1e-14)
    assert level.d_alpha[-1] < 0
    leaf = t.requires_grad_(True)
    (gradient,) = torch.autograd.grad(schedule(leaf).alpha.sum(), leaf)
    torch.testing.assert_close(gradient, level.d_alpha)


def test_up_to_the_entry_before_a_last_zero_all_is_as_without_it() -> None:
    """To the bit: what the last interval needs touches no other."""
    whole = to_noise()
    without = TabulatedVP(whole.alphas_cumprod[:-1])
    t = torch.linspace(0, 997.999, 501, dtype=torch.float64)
    ours, theirs = whole(t), without(t)
    for name in ("alpha", "sigma", "d_alpha", "d_sigma"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize("kind", ["v", "x0", "flow"])
def test_at_pure_noise_a_prediction_still_names_the_image(kind: Kind) -> None:
    """The noise is x_t itself; the image is what the network says."""
    g = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(2, 3, 4, 4, generator=g) for _ in range(2))
    schedule, t = to_noise(), torch.tensor([999.0, 998.5])
    x_t = add_noise(schedule, x0, eps, t)
    assert torch.equal(x_t[0], eps[0])
    at = schedule(t).like(x_t)
    found = Prediction(combine(kind, x0, eps, at), kind, x_t, at)
    torch.testing.assert_close(found.x0, x0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.eps, eps, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_our_steps_from_pure_noise_are_those_of_diffusers(kind: str) -> None:
    scheduler = DDIMScheduler(
        **SD, rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False, prediction_type=kind
    )
    scheduler.set_timesteps(4)
    schedule, x = to_noise(), torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    ours, theirs = x, x
    for t, r in zip(scheduler.timesteps, [*scheduler.timesteps[1:], None], strict=True):
        theirs = scheduler.step(theirs.sin(), t, theirs).prev_sample
        at = schedule(t[None].float()).like(ours)
        pred = Prediction(ours.sin(), KINDS[kind], ours, at)
        ours = pred.x0 if r is None else ddim(pred, r[None].float(), schedule, lambda: x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
