"""The oracle itself: closed forms that agree with each other and with numerical integration."""

from __future__ import annotations

import pytest
import torch

from fastgen.schedule import Schedule
from tests.oracle import Gaussian, hermite, schedules

WORLD = Gaussian(0.3, 0.5)


def at(schedule: Schedule, t: float):
    return schedule(torch.tensor([t], dtype=torch.float64))


def test_hermite_integrates_the_normal_distribution() -> None:
    z, w = hermite()
    moments = [(w * z**k).sum().item() for k in range(7)]
    assert moments == pytest.approx([1, 0, 1, 0, 3, 0, 15], abs=1e-12)


@pytest.mark.parametrize("schedule", schedules())
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_score_is_minus_eps_over_sigma_and_x_t_is_recombined(schedule: Schedule, share: float) -> None:
    level = at(schedule, share * schedule.t_max)
    x_t = torch.linspace(-2, 2, 5, dtype=torch.float64)
    torch.testing.assert_close(WORLD.score(x_t, level), -WORLD.eps(x_t, level) / level.sigma)
    torch.testing.assert_close(level.alpha * WORLD.x0(x_t, level) + level.sigma * WORLD.eps(x_t, level), x_t)


@pytest.mark.parametrize("schedule", schedules())
def test_flow_map_solves_the_probability_flow_ode(schedule: Schedule) -> None:
    start, end, steps = 0.9 * schedule.t_max, 0.1 * schedule.t_max, 400
    x = x_t = torch.linspace(-2, 2, 5, dtype=torch.float64)
    for t in torch.linspace(start, end, steps + 1, dtype=torch.float64)[:-1].tolist():
        h = (end - start) / steps  # Runge-Kutta of order 4
        k1 = WORLD.flow(x, at(schedule, t))
        k2 = WORLD.flow(x + h / 2 * k1, at(schedule, t + h / 2))
        k3 = WORLD.flow(x + h / 2 * k2, at(schedule, t + h / 2))
        k4 = WORLD.flow(x + h * k3, at(schedule, t + h))
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    exact = WORLD.flow_map(x_t, at(schedule, start), at(schedule, end))
    assert (x - exact).abs().max() < 1e-3  # a table's derivatives jump at its entries
    assert (x_t - exact).abs().max() > 0.5
