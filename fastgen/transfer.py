"""Tensors on their way from the CPU to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(value: Tensor, device: torch.device | str) -> Tensor:
    """``value`` on ``device``, without waiting for what the device still has to do.

    A copy to CUDA from ordinary memory waits until all that is queued has run; one from pinned memory is queued behind
    it, and torch keeps that memory until then.
    """
    # not of a subclass: fake tensors (``fastgen estimate``) have no memory to pin
    if torch.device(device).type == "cuda" and value.device.type == "cpu" and type(value) is Tensor:
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)
