"""TrigFlow and rectified flow as other schedules see them: the same sample, the same noise, another clock."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastgen.coordinates import Coordinates, rectified, trigflow
from fastgen.prediction import KINDS, Kind, Prediction, combine
from fastgen.schedule import Flow, Level, Schedule
from tests.oracle import Gaussian, schedules, sd_schedule

G = Gaussian(0.3, 0.5)
TO: dict[str, Callable[[Level], Coordinates]] = {
    "trigflow": trigflow,
    "trigflow-0.5": lambda at: trigflow(at, 0.5),
    "rectified": rectified,
}


def world(schedule: Schedule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x0, eps: [9, 3]; t: [9] between the table's entries; x_t: [9, 3]; all float64."""
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 9, 3, generator=g, dtype=torch.float64)
    share = torch.tensor([0.001, 0.0137, 0.1, 0.2, 0.31, 0.5, 0.77, 0.9, 0.9999], dtype=torch.float64)
    t = schedule.t_min + share * (schedule.t_max - schedule.t_min)
    at = schedule(t).like(x0)
    return x0, eps, t, at.alpha * x0 + at.sigma * eps


own = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch.func's own decompositions
CASES = [pytest.param(s, to, id=f"{type(s).__name__}-{to}") for s in schedules() for to in TO]


@pytest.mark.parametrize(("schedule", "to"), CASES)
def test_it_is_the_sample_of_that_schedule_at_the_same_snr(schedule: Schedule, to: str) -> None:
    x0, eps, t, x_t = world(schedule)
    at = schedule(t).like(x_t)
    here = TO[to](at)
    torch.testing.assert_close(here.scale * x_t, here.level.alpha * x0 + here.level.sigma * eps, rtol=0, atol=1e-14)
    torch.testing.assert_close(here.level.log_snr, at.log_snr, rtol=1e-12, atol=1e-12)


def test_levels_are_their_schedules_own() -> None:
    """The cosine and sine of TrigFlow's time, and rectified flow's 1 - s and s, with their derivatives."""
    x0, _, t, _ = world(sd_schedule())
    at = sd_schedule()(t).like(x0)
    for std in (1.0, 0.5):
        here = trigflow(at, std)
        cos, sin = here.clock.cos(), here.clock.sin()
        found = (here.level.alpha, here.level.sigma, here.level.d_alpha, here.level.d_sigma)
        for one, two in zip(found, (cos, std * sin, -sin, std * cos), strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-14)
    here, flow = rectified(at), Flow()(rectified(at).clock)
    for name in ("alpha", "sigma", "d_alpha", "d_sigma"):
        torch.testing.assert_close(getattr(here.level, name), getattr(flow, name), rtol=0, atol=1e-14)


def test_on_its_own_schedule_nothing_changes() -> None:
    x0, eps, t, _ = world(Flow())
    here = rectified(Flow()(t).like(x0))
    for found, expected in ((here.clock.flatten(), t), (here.scale, 1.0), (here.rate, 1.0)):
        torch.testing.assert_close(found, torch.as_tensor(expected, dtype=t.dtype).expand_as(found))
    torch.testing.assert_close(here.velocity(x0, eps), eps - x0)


@own
@pytest.mark.parametrize(("schedule", "to"), CASES)
def test_the_rate_is_the_derivative_of_the_clock(schedule: Schedule, to: str) -> None:
    _, _, t, x_t = world(schedule)

    def clock(t: Tensor) -> Tensor:
        return TO[to](schedule(t).like(x_t)).clock.flatten()

    _, exact = torch.func.jvp(clock, (t,), (torch.ones_like(t),))
    rate = TO[to](schedule(t).like(x_t)).rate.flatten()
    torch.testing.assert_close(rate, exact, rtol=1e-12, atol=1e-14)
    assert (rate > 0).all()  # noise grows with both


@own
@pytest.mark.parametrize(("schedule", "to"), CASES)
def test_the_flow_there_is_the_flow_here_along_the_other_clock(schedule: Schedule, to: str) -> None:
    """d(scale x_t)/dt = velocity d clock/dt, for the exact probability flow of a Gaussian."""
    _, _, t, x_t = world(schedule)

    def moved(t: Tensor) -> Tensor:
        return TO[to](schedule(t).like(x_t)).scale

    _, d_scale = torch.func.jvp(moved, (t,), (torch.ones_like(t),))
    at = schedule(t).like(x_t)
    here = TO[to](at)
    expected = d_scale * x_t + here.scale * G.flow(x_t, at)
    torch.testing.assert_close(
        here.velocity(G.x0(x_t, at), G.eps(x_t, at)) * here.rate, expected, rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("schedule", "to"), CASES)
def test_there_and_back_is_the_identity(schedule: Schedule, to: str, kind: Kind) -> None:
    """A network's output -> velocity there -> the same output."""
    x0, eps, t, x_t = world(schedule)
    at = schedule(t).like(x_t)
    here = TO[to](at)
    pred = Prediction(combine(kind, x0, eps, at), kind, x_t, at)
    there = Prediction(here.velocity(pred.x0, pred.eps), "flow", here.scale * x_t, here.level)
    torch.testing.assert_close(combine(kind, there.x0, there.eps, at), pred.y, rtol=1e-9, atol=1e-9)


def test_rectified_flow_to_trigflow_is_sana_sprint_s_transform() -> None:
    """F = ((1 - 2 t) x + (1 - 2 t + 2 t^2) v) / sqrt(t^2 + (1 - t)^2), (Chen et al. 2025, arXiv 2503.09641)."""
    x0, eps, t, x_t = world(Flow())
    here, s = trigflow(Flow()(t).like(x_t)), t[:, None]
    norm = (s.square() + (1 - s).square()).sqrt()
    torch.testing.assert_close(here.scale * norm, torch.ones_like(s))
    expected = ((1 - 2 * s) * x_t + (1 - 2 * s + 2 * s.square()) * (eps - x0)) / norm
    torch.testing.assert_close(here.velocity(x0, eps), expected)


def test_a_variance_preserving_v_is_trigflow_s_velocity() -> None:
    x0, eps, t, x_t = world(sd_schedule())
    at = sd_schedule()(t).like(x_t)
    here = trigflow(at)
    torch.testing.assert_close(here.scale, torch.ones_like(here.scale))
    torch.testing.assert_close(here.velocity(x0, eps), Prediction(x0, "x0", x_t, at).v, rtol=1e-9, atol=1e-9)
