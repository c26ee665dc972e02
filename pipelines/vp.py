"""Variance-preserving schedules of stock schedulers, and the schedulers that students on them are shipped with.

A student leaves with ``LCMScheduler(original_inference_steps=N)`` or, where it keeps its noise, ``TCDScheduler``:
their saved configs alone yield the trained times, and they refuse more than N steps.
"""

from __future__ import annotations

from typing import Any

from diffusers import LCMScheduler, TCDScheduler

from fastgen.prediction import Kind
from fastgen.sampling import Sampler
from fastgen.schedule import TabulatedVP

KINDS: dict[str, Kind] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
"""What a scheduler's config calls the network's output -> what we do."""


def schedule_of(scheduler: Any) -> TabulatedVP:
    """The schedule of a teacher's scheduler. Raises ValueError if it has none of this sort."""
    if not hasattr(scheduler, "alphas_cumprod"):
        name = type(scheduler).__name__
        raise ValueError(
            f"scheduler {name} has no table of alphas_cumprod; this family needs one, such as DDIMScheduler"
        )
    return TabulatedVP(scheduler.alphas_cumprod)


def kind_of(scheduler: Any) -> Kind:
    """What the network gives, by its scheduler. Raises ValueError if that is not known."""
    kind = KINDS.get(scheduler.config.get("prediction_type", "epsilon"))
    if kind is None:
        raise ValueError(f"prediction_type {scheduler.config['prediction_type']!r} is not one of {', '.join(KINDS)}")
    return kind


def student_scheduler(
    teacher: Any, num_steps: int, sampler: Sampler = "renoise", start: float = 1.0
) -> LCMScheduler | TCDScheduler:
    """The scheduler shipped with a student of ``num_steps``; more steps than that are an error at the call.

    LCM's boundary scaling is raised until c_skip vanishes in float32, so that each step uses x0 itself. TCD at the
    pipeline's own default, eta 0, keeps the predicted noise: DDIM on the same times. A start below 1 cuts the table
    of betas after that share: what remains is the teacher's noise to the bit, and the scheduler's first time, at which
    the stock pipeline feeds pure noise, is its last. Raises ValueError if fewer times remain than steps.
    """
    # all of the teacher's values: what it left at its class's default, from_config would take for LCM's
    config = {key: value for key, value in teacher.config.items() if key != "_use_default_values"}
    cls = {"renoise": LCMScheduler, "ddim": TCDScheduler}[sampler]
    made = cls.from_config(
        config,
        original_inference_steps=num_steps,
        timestep_scaling=1e4,
        clip_sample=False,
        thresholding=False,
        rescale_betas_zero_snr=False,
    )
    count = len(made.betas)
    left = round(start * count)
    if left == count:
        return made
    if left < num_steps:
        raise ValueError(f"student.start {start:g} leaves {left} of {count} times for {num_steps} steps; raise it")
    return cls.from_config(made.config, num_train_timesteps=left, trained_betas=made.betas[:left].tolist())


def times(scheduler: LCMScheduler | TCDScheduler, num_steps: int) -> list[float]:
    """Those at which a student with this scheduler is called."""
    scheduler.set_timesteps(num_steps)
    return [float(t) for t in scheduler.timesteps]
