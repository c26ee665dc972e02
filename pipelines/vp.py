"""Variance-preserving schedules of stock schedulers, and the schedulers that students on them are shipped with.

A student leaves with ``LCMScheduler(original_inference_steps=N)`` or, where it keeps its noise, ``TCDScheduler``:
their saved configs alone yield the trained times, and they refuse more than N steps.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, LCMScheduler, TCDScheduler

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
    """What the network gives, by its scheduler.

    Raises ValueError if that is not known, or if it is noise where the table's last entry is nothing but noise.
    """
    kind = KINDS.get(scheduler.config.get("prediction_type", "epsilon"))
    if kind is None:
        raise ValueError(f"prediction_type {scheduler.config['prediction_type']!r} is not one of {', '.join(KINDS)}")
    if kind == "eps" and float(scheduler.alphas_cumprod[-1]) == 0:
        raise ValueError(
            "prediction_type 'epsilon' names no image at a last alpha of 0; this scheduler needs v_prediction, or "
            "rescale_betas_zero_snr false"
        )
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
    settings = {
        "original_inference_steps": num_steps,
        "timestep_scaling": 1e4,
        "clip_sample": False,
        "thresholding": False,
        "rescale_betas_zero_snr": False,
    }
    made = cls.from_config(config, **settings)
    table = torch.as_tensor(teacher.alphas_cumprod).double()
    found, wanted = (torch.logit(values.double()) for values in (made.alphas_cumprod, table))
    if not torch.allclose(found, wanted, atol=1e-3):  # the teacher's is shifted or rescaled besides its betas
        made = cls.from_config(config, **settings, trained_betas=_betas(table))
    count = len(made.betas)
    left = round(start * count)
    if left == count:
        return made
    if left < num_steps:
        raise ValueError(f"student.start {start:g} leaves {left} of {count} times for {num_steps} steps; raise it")
    return cls.from_config(made.config, num_train_timesteps=left, trained_betas=made.betas[:left].tolist())


def plain_student_scheduler(
    teacher: Any, num_steps: int, sampler: Sampler = "renoise", start: float = 1.0
) -> LCMScheduler | DDIMScheduler:
    """The same on the same times for a pipeline that hands its scheduler no eta: TCD's own default adds noise.

    A student that keeps its noise leaves with ``DDIMScheduler`` on the trailing grid. Unlike the others it does not
    refuse more steps than it was trained for.
    """
    made = student_scheduler(teacher, num_steps, start=start)
    if sampler == "renoise":
        return made
    config = {key: value for key, value in made.config.items() if key != "_use_default_values"}
    # cut to what N divides, since the scheduler counts its times from the table's end and its steps in whole entries
    left = len(made.betas) // num_steps * num_steps
    if left < len(made.betas):
        config |= {"num_train_timesteps": left, "trained_betas": made.betas[:left].tolist()}
    return DDIMScheduler.from_config(config, timestep_spacing="trailing", set_alpha_to_one=False)


def _betas(alphas_cumprod: torch.Tensor) -> list[float]:
    """Those whose table this is."""
    table = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod])
    found: list[float] = (1 - table[1:] / table[:-1]).tolist()
    return found


def times(scheduler: LCMScheduler | TCDScheduler, num_steps: int) -> list[float]:
    """Those at which a student with this scheduler is called."""
    scheduler.set_timesteps(num_steps)
    return [float(t) for t in scheduler.timesteps]
