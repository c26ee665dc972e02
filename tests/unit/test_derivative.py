"""Derivatives along a direction, against closed forms and each other, also through the real U-Net."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgen import derivative
from fastgen.denoiser import Denoiser
from fastgen.pipelines import sd
from fastgen.prediction import Kind, Prediction
from fastgen.schedule import Flow, Schedule
from tests import tiny
from tests.oracle import Gaussian, Gaussians, Map, call, labels, schedules, sd_schedule

MEANS, STDS = (0.3, 1.0, -0.5), (0.5, 0.5, 0.3)
KIND: dict[type, Kind] = {Flow: "flow"}


def made(cls: type[Gaussians] | type[Map], schedule: Schedule) -> tuple[Denoiser, Tensor, Tensor]:
    """A denoiser in float64, x_t: [6, 3] and t: [6], half way between entries of the table."""
    kind = KIND.get(type(schedule), "v")
    g = torch.Generator().manual_seed(0)
    x_t = torch.randn(6, 3, generator=g, dtype=torch.float64)
    t = torch.tensor([50.5, 200.5, 400.5, 600.5, 750.5, 950.5], dtype=torch.float64) / 999 * schedule.t_max
    network = cls(MEANS, STDS, schedule, kind).double()
    with torch.no_grad():  # to the last bit, which float32 did not keep
        network.mean.copy_(torch.tensor(MEANS, dtype=torch.float64))
        network.log_std.copy_(torch.tensor(STDS, dtype=torch.float64).log())
    return Denoiser(network, schedule, kind, call), x_t, t


def read_x0(pred: Prediction) -> Tensor:
    return pred.x0


@pytest.mark.parametrize("schedule", schedules())
def test_the_consistency_function_does_not_change_along_its_flow_and_does_beside_it(schedule: Schedule) -> None:
    denoiser, x_t, t = made(Map, schedule)
    cond = labels(["left"] * 6, torch.float64)
    flow = Gaussian(1.0, 0.5).flow(x_t, schedule(t).like(x_t))
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    size = derivative.along(denoiser, read_x0, x_t, t, cond, torch.zeros_like(x_t), one)[1].abs().max()
    assert derivative.along(denoiser, read_x0, x_t, t, cond, flow, one)[1].abs().max() < 1e-12 * size
    across = derivative.along(denoiser, read_x0, x_t, t, cond, torch.ones_like(x_t), zero)[1]
    at = schedule(t).like(x_t)
    torch.testing.assert_close(across, (0.5 / Gaussian(1.0, 0.5).variance(at).sqrt()).expand_as(across))


@pytest.mark.parametrize("schedule", schedules())
def test_finite_differences_err_with_their_span(schedule: Schedule) -> None:
    """Along a direction that crosses no entry of the table, at which its log-SNR has a kink."""
    denoiser, x_t, t = made(Gaussians, schedule)
    cond, dx = labels(["right"] * 6, torch.float64), torch.ones_like(x_t)
    dt = torch.full_like(t, 30.0 if type(schedule) is not Flow else 1.0)

    def found(how: derivative.Derivative, span: float = 1.0) -> Tensor:
        return derivative.along(denoiser, read_x0, x_t, t, cond, dx, dt, how, span)[1]

    exact = found("jvp")
    errors = [(found("finite_differences", span) - exact).abs().max().item() for span in (1e-2, 1e-3, 1e-4)]
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.1)


def test_the_differences_look_back_and_stay_within_the_schedule() -> None:
    """As far as there is room, and where there is little ahead; the fourth goes against the clock."""
    denoiser, x_t, _ = made(Gaussians, sd_schedule())
    t = torch.tensor([0.0, 6.0, 300.0, 700.0, 996.0, 999.0], dtype=torch.float64)
    dt = torch.tensor([300.0, 300.0, 0.0, -300.0, 300.0, 300.0], dtype=torch.float64)
    cond, dx = labels(["right"] * 6, torch.float64), torch.ones_like(x_t)
    h = torch.tensor([0.03, -0.02, -0.03, -0.03, -0.03, -0.03], dtype=torch.float64)

    def at(h: Tensor) -> Tensor:
        return denoiser(x_t + h[:, None] * dx, t + h * dt, cond).x0

    with torch.no_grad():
        expected = (at(h) - at(0 * h)) / h[:, None]
    found = derivative.along(denoiser, read_x0, x_t, t, cond, dx, dt, "finite_differences", 0.03)[1]
    torch.testing.assert_close(found, expected)


# The real U-Net


def unet(autocast: torch.dtype | None = None) -> tuple[Denoiser, dict[str, Any]]:
    """The tiny one, and where and whereto: rows of two samples, a TrigFlow unit of time being some 300 timesteps."""
    family = sd.wrap(tiny.pipeline("v_prediction"), autocast)
    g = torch.Generator().manual_seed(0)
    x_t, dx = torch.randn(2, 2, 4, 8, 8, generator=g)
    where = {
        "x_t": x_t,
        "t": torch.tensor([300.3, 700.7], dtype=torch.float64),
        "cond": family.encode_prompts(tiny.PROMPTS[:2]),
        "dx": dx,
        "dt": torch.tensor([300.0, 200.0], dtype=torch.float64),
    }
    return family.denoiser, where


def read_v(pred: Prediction) -> Tensor:
    return pred.v


def test_forward_mode_goes_through_the_u_net_and_agrees_with_differences() -> None:
    denoiser, where = unet()
    exact = derivative.along(denoiser, read_v, **where)[1]
    assert exact.dtype == torch.float32
    assert not exact.requires_grad
    assert exact.norm() > 10  # and is not small itself

    def error(span: float) -> float:
        near = derivative.along(denoiser, read_v, **where, how="finite_differences", span=span)[1]
        return float((exact - near).norm() / exact.norm())

    assert error(derivative.SPAN) < 0.05
    assert error(derivative.SPAN) / error(derivative.SPAN / 3) == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize("how", ["jvp", "finite_differences"])
def test_autocast_does_not_touch_the_derivative(how: derivative.Derivative) -> None:
    plain, where = unet()
    cast, _ = unet(torch.bfloat16)
    found = derivative.along(cast, read_v, **where, how=how)[1]
    assert torch.equal(found, derivative.along(plain, read_v, **where, how=how)[1])
    with torch.no_grad():  # while a pass is cast
        assert not torch.equal(cast(where["x_t"], where["t"], where["cond"]).v, plain(*list(where.values())[:3]).v)


def test_a_pass_after_it_still_has_all_its_gradients() -> None:
    denoiser, where = unet(torch.bfloat16)
    denoiser.network.requires_grad_(True)
    derivative.along(denoiser, read_v, **where)[1]
    denoiser(where["x_t"], where["t"], where["cond"]).v.sum().backward()
    assert all(p.grad is not None for p in denoiser.network.parameters())


# What does not go


class _OneWay(torch.autograd.Function):
    """A kernel such as xformers': a backward pass, no forward derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Broken(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.act(x_t)


def along_broken(act: Callable[[Tensor], Tensor], how: derivative.Derivative) -> Tensor:
    denoiser, x_t, t = made(Gaussians, sd_schedule())
    broken = replace(denoiser, network=Broken(act))
    cond = labels(["left"] * 6)
    return derivative.along(broken, read_v, x_t, t, cond, torch.ones_like(x_t), torch.zeros_like(t), how)[1]


def test_a_kernel_without_a_forward_derivative_is_named_with_a_remedy() -> None:
    with pytest.raises(
        ValueError, match=r"derivative 'jvp' does not go .* finite_differences, or model\.attention sdpa"
    ):
        along_broken(_OneWay.apply, "jvp")
    found = along_broken(_OneWay.apply, "finite_differences")
    torch.testing.assert_close(found, torch.full_like(found, 2.0))


def test_running_out_of_memory_stays_what_it_is() -> None:
    def full(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError, match="full"):
        along_broken(full, "jvp")
