"""Rectified-flow schedules of stock schedulers, the schedulers that students on them are shipped with, and families.

The student's times are shift(1), shift(1 - 1/N), ..., shift(1/N). Pipelines ask ``FlowMatchEulerDiscreteScheduler``
for N steps in two ways: with the sigmas 1, 1 - 1/N, ..., 1/N, which it shifts, or with the number alone. Then it takes
N even steps down to 1/1000, which wastes the last, and a config that yields the right times has to be found for N.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn

from fastgen.denoiser import Cond, Denoiser
from fastgen.family import Block, Family
from fastgen.sampling import Sampler, ddim_times
from fastgen.schedule import Flow

from . import stock

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
"""Of all students, with noise added between the steps or without."""
Ask = Callable[[Any, int], None]
"""(scheduler, num_steps): what a pipeline does to its scheduler before the first step."""


def by_number(scheduler: Any, num_steps: int) -> None:
    """Ask as SD3, Sana and Wan do."""
    scheduler.set_timesteps(num_steps)


def by_sigmas(scheduler: Any, num_steps: int) -> None:
    """Ask as Flux, Qwen-Image, Z-Image and LTX do. mu is for dynamic shifting, which students do without."""
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=0.0)


def schedule_of(scheduler: Any, mu: float | None = None) -> Flow:
    """The schedule of a teacher's scheduler. mu: what its pipeline gives it at this image size, where it shifts by it.

    Raises ValueError if it is not of rectified flow.
    """
    config = scheduler.config
    if config.get("use_dynamic_shifting"):
        if mu is None:
            raise ValueError(
                f"{type(scheduler).__name__} shifts its times by the image size, which this family does not"
            )
        return Flow(shift=math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return Flow(shift=config.shift)
    if config.get("use_flow_sigmas"):
        return Flow(shift=config.get("flow_shift") or 1.0)
    raise ValueError(
        f"scheduler {type(scheduler).__name__} is not of rectified flow; this family needs "
        "FlowMatchEulerDiscreteScheduler, or one with use_flow_sigmas"
    )


def mu_of(scheduler: Any, tokens: int) -> float:
    """What Flux, Qwen-Image and Z-Image give a scheduler that shifts by the image size. tokens: of the image."""
    config = scheduler.config
    found: float = calculate_shift(
        tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
    return found


def student_scheduler(
    num_steps: int, sampler: Sampler, shift: float, ask: Ask, start: float = 1.0
) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler shipped with a student of ``num_steps``: x0 noised afresh, or Euler steps.

    Asked by number it yields the times for that number alone. Raises ValueError if ``start`` is not 1, which no config
    of it says.
    """
    if start != 1.0:
        raise ValueError(f"student.start {start:g} cannot be told a flow pipeline's scheduler; leave it out")
    config: dict[str, Any] = {"shift": shift}
    if ask is by_number and num_steps > 1:
        config = _config_by_number(num_steps, shift)
    made = FlowMatchEulerDiscreteScheduler(**config, stochastic_sampling=sampler == "renoise")
    wanted = ddim_times(Flow(shift=shift), num_steps)
    found = times(made, num_steps, ask)
    if max(abs(a - b) for a, b in zip(wanted, found, strict=True)) > 1e-6:
        raise ValueError(f"no scheduler's config yields the times {wanted}, the nearest gives {found}")
    return made


def _config_by_number(num_steps: int, shift: float, count: int = 1000) -> dict[str, float]:
    """The config that yields the times if only their number is asked for.

    The scheduler shifts twice, from 1 to 1/count, and then stretches so that the last is ``shift_terminal``. All three
    are Moebius maps of the even grid that keep 1, so that the first may be solved for.
    """
    n = num_steps
    k = (shift - 1) * (n - 1) / (n + shift - 1)
    b = count - 1 - 2 * k
    extra = (b - math.sqrt(b * b - 4 * k * k * count)) / (2 * k) if k else 0.0
    return {"shift": 1 + extra, "shift_terminal": shift / (n + shift - 1)}


def times(scheduler: Any, num_steps: int, ask: Ask) -> list[float]:
    """Those at which a pipeline with this scheduler, asked in this way, calls its network."""
    made = copy.deepcopy(scheduler)
    ask(made, num_steps)
    found: torch.Tensor = made.sigmas[:-1]
    return [float(t) for t in found.double()]


def family(
    pipeline: Any,
    denoiser: Denoiser,
    encode_prompts: Callable[[Sequence[str]], Cond],
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    latent_shape: tuple[int, ...],
    size: Mapping[str, Any],
    blocks: Sequence[Block],
    ask: Ask,
    start: float,
    unpack: Callable[[Tensor], Tensor] = lambda latents: latents,
    shift: Callable[[int], float] | None = None,
    parts: Callable[[nn.Module], Mapping[str, Any]] = lambda network: {"transformer": network},
    settings: Mapping[str, Any] | None = None,
) -> Family:
    """The family of a pipeline round a transformer, whose students are copies of the teacher's network.

    What a family has otherwise it replaces. size: what the call is told of it, height and width in pixels among them.
    ask: how the pipeline asks its scheduler. unpack: of the latents that the call gives. shift: num_steps -> that of a
    student's times; None: the teacher's. parts: of the pipeline that the network becomes. settings: of a student's
    pipeline.
    """
    schedule: Any = denoiser.schedule

    def scheduler(num_steps: int, sampler: Sampler = "renoise") -> Any:
        return student_scheduler(num_steps, sampler, shift(num_steps) if shift else schedule.shift, ask, start)

    def with_network(network: nn.Module, num_steps: int | None, sampler: Sampler = "renoise") -> Any:
        new = {} if num_steps is None else {"scheduler": scheduler(num_steps, sampler), **(settings or {})}
        return stock.rebuilt(pipeline, **parts(network), **new)

    return Family(
        denoiser=denoiser,
        latent_shape=latent_shape,
        encode_prompts=encode_prompts,
        uncond=lambda: encode_prompts([""]),
        encode=encode,
        decode=decode,
        student=lambda embed_guidance=False: copy.deepcopy(denoiser.network).requires_grad_(True),
        student_times=lambda n: times(scheduler(n), n, ask),
        blocks=blocks,
        pipeline=with_network,
        image_size=(size["height"], size["width"]),
        run=stock.caller(unpack, **size),
        step_noise="global",
        component="transformer",
    )
