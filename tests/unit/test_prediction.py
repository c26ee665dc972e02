"""The prediction algebra: four kinds, one pair of equations."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fastgen.prediction import KINDS, Kind, Prediction, coefficients, combine
from fastgen.schedule import Level, Schedule
from tests.oracle import Gaussian, schedules


def draw(schedule: Schedule, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Level]:
    """x0, eps, x_t, level: of random float64 samples at times from near 0 to near t_max."""
    g = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(6, 3, 2, generator=g).double(), torch.randn(6, 3, 2, generator=g).double()
    at = schedule(torch.linspace(0.05, 0.95, 6, dtype=torch.float64) * schedule.t_max).like(x0)
    return x0, eps, at.alpha * x0 + at.sigma * eps, at


@pytest.mark.parametrize("schedule", schedules())
@pytest.mark.parametrize(("a", "b"), list(itertools.product(KINDS, KINDS)))
def test_kind_to_kind_to_kind_is_the_identity(schedule: Schedule, a: Kind, b: Kind) -> None:
    _, _, x_t, at = draw(schedule)
    y = torch.randn(x_t.shape, dtype=torch.float64, generator=torch.manual_seed(1))
    there = Prediction(y, a, x_t, at).as_kind(b)
    torch.testing.assert_close(Prediction(there, b, x_t, at).as_kind(a), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", schedules())
@pytest.mark.parametrize("kind", KINDS)
def test_combine_is_read_back_as_x0_and_eps(schedule: Schedule, kind: Kind) -> None:
    x0, eps, x_t, at = draw(schedule)
    pred = Prediction(combine(kind, x0, eps, at), kind, x_t, at)
    torch.testing.assert_close(pred.x0, x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(pred.eps, eps, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", schedules())
@pytest.mark.parametrize("kind", KINDS)
def test_every_reading_equals_its_formula(schedule: Schedule, kind: Kind) -> None:
    x0, eps, x_t, at = draw(schedule)
    pred = Prediction(combine(kind, x0, eps, at), kind, x_t, at)
    torch.testing.assert_close(pred.v, at.alpha * eps - at.sigma * x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(pred.flow, at.d_alpha * x0 + at.d_sigma * eps, rtol=1e-9, atol=1e-9)
    assert pred.as_kind(kind) is pred.y


@pytest.mark.parametrize("schedule", schedules())
@pytest.mark.parametrize("kind", KINDS)
def test_the_gaussian_posterior_is_the_same_in_every_kind(schedule: Schedule, kind: Kind) -> None:
    _, _, x_t, at = draw(schedule)
    world = Gaussian(0.3, 0.5)
    pred = Prediction(combine(kind, world.x0(x_t, at), world.eps(x_t, at), at), kind, x_t, at)
    torch.testing.assert_close(pred.flow, world.flow(x_t, at), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(-pred.eps / at.sigma, world.score(x_t, at), rtol=1e-9, atol=1e-9)


def test_on_flow_the_velocity_is_eps_minus_x0() -> None:
    x0, eps, _, at = draw(schedules()[1])
    torch.testing.assert_close(combine("flow", x0, eps, at), eps - x0)


@pytest.mark.parametrize("kind", KINDS)
def test_two_predictions_differ_as_N1_says(kind: Kind) -> None:
    """x0_q - x0_p = (sigma / alpha) (eps_p - eps_q) = sigma (v_p - v_q) on a variance-preserving schedule."""
    _, _, x_t, at = draw(schedules()[0])
    p = Prediction(torch.randn(x_t.shape, dtype=torch.float64, generator=torch.manual_seed(1)), kind, x_t, at)
    q = Prediction(torch.randn(x_t.shape, dtype=torch.float64, generator=torch.manual_seed(2)), kind, x_t, at)
    torch.testing.assert_close(q.x0 - p.x0, at.sigma / at.alpha * (p.eps - q.eps), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(q.x0 - p.x0, at.sigma * (p.v - q.v), rtol=1e-9, atol=1e-9)


def test_an_unknown_kind_is_refused_and_the_known_are_named() -> None:
    x0, eps, x_t, at = draw(schedules()[0])
    with pytest.raises(ValueError, match="unknown prediction kind 'epsilon'; choose one of x0, eps, v, flow"):
        coefficients("epsilon", at)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown prediction kind"):
        combine("velocity", x0, eps, at)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown prediction kind"):
        Prediction(x0, "x0", x_t, at).as_kind("noise")  # type: ignore[arg-type]
