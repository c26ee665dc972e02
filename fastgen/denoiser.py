"""A network called in the paper's terms. Teacher, student and fake score are one class in different roles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .experts import Experts
from .prediction import Kind, Prediction
from .schedule import Schedule
from .students import Students

Cond = Mapping[str, Tensor]
"""Conditioning tensors by name, batch first."""

Call = Callable[[nn.Module, Tensor, Tensor, Cond], Tensor]
"""(network, x_t: [B, ...], t: [B], cond) -> y: [B, ...]: all that a model family must write."""


Guide = Callable[[Tensor, Tensor, Tensor | float], Tensor]
"""(the output with and without the condition, [B, ...]; scale, broadcasting) -> the guided output: [B, ...]."""


def classifier_free(pos: Tensor, neg: Tensor, scale: Tensor | float) -> Tensor:
    """The ``Guide`` of nearly all pipelines, neg + scale (pos - neg) (Ho & Salimans 2022, arXiv 2207.12598)."""
    return neg + scale * (pos - neg)


Read = Callable[[Any, Tensor], Tensor]
"""(a block's output, x_t: [B, ...]) -> its features as a map: [B, C, H, W]."""


def first(output: Any, x_t: Tensor) -> Tensor:
    """The output of a block that gives a map, or a tuple with one in front."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


class Denoise(Protocol):
    """Anything that denoises: a Denoiser, or a function wrapped round one."""

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """x_t: [B, ...]; t: [B] on the schedule's clock -> Prediction."""
        ...


@dataclass(frozen=True)
class Denoiser:
    """A network with the schedule and the kind of output it was trained for.

    ``autocast`` names the dtype its matrix products run in (None: the weights' own). Each call enters autocast anew:
    one context round a whole loss would cache casts made under no_grad and so drop gradients of later calls.
    ``read`` makes a feature map of what a block of the network gives. ``guide`` is how the pipeline guides it.
    """

    network: nn.Module
    schedule: Schedule
    kind: Kind
    call: Call
    autocast: torch.dtype | None = None
    read: Read = first
    guide: Guide = classifier_free

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """x_t: [B, ...]; t: [B] on the schedule's clock -> Prediction in float32 (float64 if x_t is)."""
        at = self.schedule(t).like(x_t)
        with torch.autocast(x_t.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            y = self._call(x_t, t, cond)
        return Prediction(y.to(at.alpha.dtype), self.kind, x_t.to(at.alpha.dtype), at)

    def _call(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The network's output, of several experts or students each one's for its own rows: [B, ...]."""
        network = self.network
        if not isinstance(network, Experts | Students):
            return self.call(network, x_t, t, cond)
        found = network.rows(t) if isinstance(network, Experts) else network.rows(cond)
        if len(found) == 1:
            return self.call(network[found[0][0]], x_t, t, cond)
        parts = [
            self.call(network[k], x_t[i], t[i], {name: value[i] for name, value in cond.items()}) for k, i in found
        ]
        return torch.cat(parts)[torch.cat([i for _, i in found]).argsort()]

    def with_network(self, network: nn.Module) -> Denoiser:
        """The same denoiser round another network, for a further role."""
        return replace(self, network=network)


def unconditional(uncond: Cond, cond: Cond) -> Cond:
    """``uncond`` for as many samples as ``cond`` holds; it may hold one row, which then serves them all.

    Raises ValueError if it lacks what ``cond`` holds: a model that was trained with its condition alone.
    """
    if cond.keys() - uncond.keys():
        raise ValueError(
            f"this model has no prediction without its {', '.join(sorted(cond.keys() - uncond.keys()))} to guide it "
            "by; set guidance scales to 1 and drop no captions"
        )
    return {name: uncond[name].expand_as(value) for name, value in cond.items()}


def guided(denoiser: Denoise, uncond: Cond, scale: float | Tensor) -> Denoise:
    """Guidance as a denoiser's pipeline does it: uncond + scale (cond - uncond), but for what its ``guide`` changes.

    A scale of 1.0 is no guidance and returns the denoiser itself; each other costs a second pass, and so does a scale
    for each sample, [B]. ``uncond`` may hold one row, which then serves the whole batch. Where nothing is a condition,
    guidance by any scale changes nothing and costs nothing. Raises ValueError as ``unconditional`` does.
    """
    if not isinstance(scale, Tensor) and scale == 1.0:
        return denoiser
    guide = denoiser.guide if isinstance(denoiser, Denoiser) else classifier_free

    def denoise(x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        if not cond:
            return denoiser(x_t, t, cond)
        rows = unconditional(uncond, cond)
        both = {name: torch.cat([cond[name], rows[name]]) for name in cond}
        out = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        pos, neg = out.y.chunk(2)
        weight = scale.to(neg).reshape(-1, *(1,) * (neg.ndim - 1)) if isinstance(scale, Tensor) else scale
        return Prediction(guide(pos, neg, weight), out.kind, out.x_t[: len(x_t)], out.at.first(len(x_t)))

    return denoise
