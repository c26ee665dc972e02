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
off by 2 % at 1e-3 and by 0.2 % here, and rounding in float32 shows below 1e-4."""


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
) -> Tensor:
    """d/dh of read(denoiser(x_t + h dx, t + h dt)) at h = 0, without gradient: [B, ...].

    x_t, dx: [B, ...]; t, dt: [B], on the denoiser's own clock. Computed in the weights' own precision: autocast does
    not cast what forward mode carries, and differences of bfloat16 outputs are noise. Forward mode costs about three
    passes and takes the math kernel of attention; finite differences cost two passes. Raises ValueError if the
    network has an operation without a forward derivative.
    """
    exact = replace(denoiser, autocast=None)

    def f(x_t: Tensor, t: Tensor) -> Tensor:
        return read(exact(x_t, t, cond))

    dt = dt.to(t)
    if how == "finite_differences":
        return (f(x_t + span * dx, t + span * dt) - f(x_t - span * dx, t - span * dt)) / (2 * span)
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
