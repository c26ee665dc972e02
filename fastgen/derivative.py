"""A denoiser's output, and how it changes along a direction: exactly, in forward mode, or by finite differences."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .denoiser import Cond, Denoiser
from .prediction import Prediction
from .schedule import Schedule

Derivative = Literal["jvp", "finite_differences"]

SPAN = 3e-4
"""Of the finite difference, in units of the direction. Its error falls with it. A timestep embedding turns by up to a
radian a timestep, which on TrigFlow's clock is a thousand radians a unit: an untrained U-Net is off by 4 % here, and
rounding in float32 shows below 1e-4.

The true derivative in t may not be the one that is wanted: a network that was trained at whole timesteps is bound by
nothing between them. Two thirds of the emoji teacher's are such ripples at timestep 400, which are gone over six
timesteps, a span of 2e-2; at 800 they are not gone below twelve, 6e-2."""


@torch.no_grad()
def along(
    denoiser: Denoiser,
    read: Callable[[Prediction], Tensor],
    x_t: Tensor,
    t: Tensor,
    cond: Cond,
    dx: Tensor,
    dt: Tensor,
    how: Derivative = "jvp",
    span: float = SPAN,
) -> tuple[Tensor, Tensor]:
    """read(denoiser(x_t + h dx, t + h dt)) at h = 0, and its derivative in h there, both without gradient: [B, ...].

    x_t, dx: [B, ...]; t, dt: [B], on the denoiser's own clock. Computed in the weights' own precision: autocast does
    not cast what forward mode carries, and differences of bfloat16 outputs are noise. Forward mode costs about three
    passes and takes the math kernel of attention; finite differences cost two passes.

    These look back by ``span``: a consistency loss carries what is known at cleaner times on to noisier ones, and of
    the ways to step such a transport the difference against its stream damps what the network adds between the two
    times, where a central one, like the derivative itself, does not see it or lets it grow. Where less than half of
    the span is left above the schedule's end they look ahead.

    Raises ValueError if the network has an operation without a forward derivative.
    """
    exact = replace(denoiser, autocast=None)

    def f(x_t: Tensor, t: Tensor) -> Tensor:
        return read(exact(x_t, t, cond))

    dt = dt.to(t)
    if how == "finite_differences":
        ahead, back = (reach(denoiser.schedule, t, way, span) for way in (dt, -dt))
        h = torch.where(back >= span / 2, -back, ahead)
        far = h.to(x_t).reshape(-1, *[1] * (x_t.ndim - 1))
        value = f(x_t, t)
        return value, (f(x_t + far * dx, t + h * dt) - value) / far
    try:
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            # PyTorch's own first use of forward mode scripts its decompositions, and warns of that
            warnings.filterwarnings("ignore", ".torch.jit.script. is deprecated")
            return torch.func.jvp(f, (x_t, t), (dx, dt))  # type: ignore[return-value]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # NotImplementedError, of a kernel, is one too
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"derivative 'jvp' does not go through this network ({reason}); "
            "set method.derivative finite_differences, or model.attention sdpa or eager"
        ) from error


def reach(schedule: Schedule, t: Tensor, dt: Tensor, span: float) -> Tensor:
    """The largest h <= span at which t + h dt is still one of the schedule's times; t, dt: [B] -> [B]."""
    room = torch.where(dt > 0, schedule.t_max - t, t - schedule.t_min)
    return torch.where(dt == 0, span, room / dt.abs()).clamp(max=span)
