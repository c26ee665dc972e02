"""How a denoiser's output changes along a direction: exactly, in forward mode, or by finite differences."""

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

Derivative = Literal["jvp", "finite_differences"]

SPAN = 3e-4
"""Half of the finite difference, in units of the direction. Its error falls with the square. A timestep embedding
turns by up to a radian a timestep, which on TrigFlow's clock is a thousand radians a unit: an untrained U-Net is
off by 2 % at 1e-3 and by 0.2 % here, and rounding in float32 shows below 1e-4.

The true derivative in t may not be the one that is wanted: a network that was trained at whole timesteps is bound by
nothing between them. Two thirds of the emoji teacher's are such ripples at timestep 400, which are gone at 1e-2, some
three timesteps to each side; at 800 they are not gone before 3e-2, some six."""


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
    ends: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """d/dh of read(denoiser(x_t + h dx, t + h dt)) at h = 0, without gradient: [B, ...].

    x_t, dx: [B, ...]; t, dt: [B], on the denoiser's own clock. Computed in the weights' own precision: autocast does
    not cast what forward mode carries, and differences of bfloat16 outputs are noise. Forward mode costs about three
    passes and takes the math kernel of attention; finite differences cost two passes, ``span`` to either side but not
    beyond ``ends``, the lowest and highest time for each sample, [B] each; None: the schedule's. Raises ValueError if
    the network has an operation without a forward derivative.
    """
    exact = replace(denoiser, autocast=None)

    def f(x_t: Tensor, t: Tensor) -> Tensor:
        return read(exact(x_t, t, cond))

    dt = dt.to(t)
    if how == "finite_differences":
        low, high = ends or (denoiser.schedule.t_min, denoiser.schedule.t_max)
        ahead, back = (reach(t, way, low, high, span) for way in (dt, -dt))
        far, near = (h.to(x_t).reshape(-1, *[1] * (x_t.ndim - 1)) for h in (ahead, back))
        return (f(x_t + far * dx, t + ahead * dt) - f(x_t - near * dx, t - back * dt)) / (far + near)
    try:
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            # PyTorch's own first use of forward mode scripts its decompositions, and warns of that
            warnings.filterwarnings("ignore", ".torch.jit.script. is deprecated")
            return torch.func.jvp(f, (x_t, t), (dx, dt))[1]  # type: ignore[no-any-return]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # NotImplementedError, of a kernel, is one too
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"derivative 'jvp' does not go through this network ({reason}); "
            "set method.derivative finite_differences, or model.attention sdpa or eager"
        ) from error


def reach(t: Tensor, dt: Tensor, low: Tensor | float, high: Tensor | float, span: float) -> Tensor:
    """The largest h <= span at which t + h dt is still within [low, high], where t is: [B]."""
    room = torch.where(dt > 0, high - t, t - low)
    return torch.where(dt == 0, span, room / dt.abs()).clamp(max=span)
