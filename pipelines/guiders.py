"""Guiders: guidance without training for stock pipelines, switched on by one ``with`` line, off on leaving it.

    with guiders.nasa(student, "blurry", scale=0.1) as count:
        image = student("a red apple", num_inference_steps=1).images[0]

Each takes a pipeline from plain ``DiffusionPipeline.from_pretrained`` whose denoising network is a U-Net, works within
the pipeline's own call and yields a ``Count`` of network evaluations. ``cfgpp``, ``adaptive`` and ``linear`` take the
place of classifier-free guidance: the U-Net's call with its two halves is answered by a guider of ``fastgen.guiders``.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from fastgen.denoiser import Cond, Denoise
from fastgen.guiders import (
    Coefficients,
    Recording,
    adaptive_once,
    cfgpp_scale,
    check_intervals,
    guided_by_time,
    linear_once,
    read_coefficients,
    recorded,
)
from fastgen.guiders import fit as fit_recording
from fastgen.prediction import Kind, Prediction
from fastgen.schedule import TabulatedVP

from .nasa import NasaProcessor, plain
from .vp import KINDS, kind_of

Make = Callable[[Denoise, Cond, float], Denoise]
"""(denoiser, uncond, guidance_scale of the call) -> the guider of one trajectory."""
_TEXT = "encoder_hidden_states"
_OF_THE_STUDENT = ("num_inference_steps", "timesteps", "sigmas", "guidance_scale", "eta")
_OF_THE_RESULT = (
    "output_type",
    "return_dict",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
)


@dataclass
class Count:
    """Network evaluations: rows that the denoising networks were given, so that guided steps count twice."""

    evaluations: int = 0


@contextmanager
def nasa(pipeline: Any, negative_prompt: str, scale: float = 0.1) -> Iterator[Count]:
    """Steer cross-attention away from a negative prompt: for students, whose calls know no guidance (2412.02687).

    scale: the paper's alpha: 0.1 for SD 1.5, 0.2 for SD 2.1. Where classifier-free guidance is on, both its halves
    are steered. Raises ValueError if the U-Net's cross-attention is of another kind than Stable Diffusion's.
    """
    unet = _unet(pipeline)
    layers = {name: unet.get_submodule(name.removesuffix(".processor")) for name in unet.attn_processors}
    steered = {name: attn for name, attn in layers.items() if attn.is_cross_attention}
    for name, attn in steered.items():
        if not plain(attn):
            raise ValueError(
                f"NASA does not know the attention of {name} ({type(attn.processor).__name__}); it needs plain "
                "cross-attention, without adapters of its own: pipeline.unet.set_default_attn_processor()"
            )
    if not steered:
        raise ValueError(f"{type(unet).__name__} has no cross-attention that NASA could steer")
    with torch.no_grad():
        embedded = pipeline.encode_prompt(
            prompt=negative_prompt,
            device=pipeline.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )[0]
    kept = dict(unet.attn_processors)
    with _counting(unet) as count:
        try:
            for attn in steered.values():
                attn.set_processor(NasaProcessor(embedded, scale))
            yield count
        finally:
            for name, attn in layers.items():
                attn.set_processor(kept[name])


@contextmanager
def cfgpp(pipeline: Any, scale: float = 0.6) -> Iterator[Count]:
    """CFG++ in the place of classifier-free guidance, whatever guidance_scale above 1 the call names (2406.08070).

    scale: 0 to 1. Raises ValueError unless the scheduler is DDIM without clipping and, in use, unless eta is 0.
    """
    scheduler = pipeline.scheduler
    if not isinstance(scheduler, DDIMScheduler) or scheduler.config.clip_sample or scheduler.config.thresholding:
        raise ValueError(
            f"CFG++ is defined on DDIM without clipping, not on this {type(scheduler).__name__}; set "
            "pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)"
        )
    schedule, _ = _terms(pipeline)
    one = torch.ones(1, dtype=torch.float64)
    cfgpp_scale(scale, schedule(one), None)  # out of range is known now

    def make(denoiser: Denoise, uncond: Cond, guidance_scale: float) -> Denoise:
        stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        clean = None if scheduler.config.set_alpha_to_one else schedule(0 * one)
        scales = {}
        for t in scheduler.timesteps.tolist():  # DDIM steps by a stride, which need not be the grid's next time
            to = schedule((t - stride) * one) if t >= stride else clean
            scales[float(t)] = cfgpp_scale(scale, schedule(t * one), to)
        return guided_by_time(denoiser, uncond, scales)

    def step(
        original: Any, model_output: Tensor, timestep: Any, sample: Tensor, eta: float = 0.0, **named: Any
    ) -> Any:
        if eta:
            raise ValueError(f"CFG++ is defined on DDIM at eta 0, got {eta:g}; leave eta out")
        return original(model_output, timestep, sample, eta=eta, **named)

    with _guiding(pipeline, make) as count, _replaced(scheduler, "step", step):
        yield count


@contextmanager
def adaptive(pipeline: Any, gamma: float = 0.99, compared: Kind = "x0") -> Iterator[Count]:
    """Classifier-free guidance by the call's own scale until cos(cond, uncond) >= gamma (2312.12487).

    From then on a sample's unconditional half is not evaluated. gamma: -1 never guides, above 1 always does.
    compared: of what the cosine is, see ``fastgen.guiders.adaptive``.
    """

    def make(denoiser: Denoise, uncond: Cond, scale: float) -> Denoise:
        return adaptive_once(denoiser, uncond, scale, gamma, compared)

    with _guiding(pipeline, make) as count:
        yield count


@contextmanager
def linear(pipeline: Any, coefficients: Coefficients) -> Iterator[Count]:
    """LinearAG: most unconditional halves by regression on what is known, with coefficients from ``fit`` (2312.12487).

    The call's steps and guidance_scale must be those of the fit; else it raises ValueError.
    """

    def make(denoiser: Denoise, uncond: Cond, scale: float) -> Denoise:
        if scale != coefficients.guidance_scale:
            raise ValueError(
                f"LinearAG was fitted at guidance_scale {coefficients.guidance_scale:g}, the call has {scale:g}; "
                "call with the fit's, or fit again"
            )
        return linear_once(denoiser, uncond, coefficients)

    with _guiding(pipeline, make) as count:
        yield count


def fit(pipeline: Any, prompts: Sequence[str], guidance_scale: float, **call: Any) -> Coefficients:
    """Coefficients for ``linear``, from one call of the pipeline on these prompts, guided as ever.

    call: the further arguments of the pipeline's call, such as num_inference_steps and generator. A few dozen prompts
    are enough: every element of their latents is an observation.
    """
    recording = Recording()

    def make(denoiser: Denoise, uncond: Cond, scale: float) -> Denoise:
        return recorded(denoiser, uncond, scale, recording)

    with _guiding(pipeline, make):
        pipeline(prompt=list(prompts), guidance_scale=guidance_scale, output_type="latent", **call)
    return fit_recording(recording, guidance_scale)


@contextmanager
def diversity(
    student: Any, teacher: Any, intervals: int = 1, num_inference_steps: int = 20, guidance_scale: float = 7.5
) -> Iterator[Count]:
    """The teacher's pipeline for the first of the student's intervals, the student for the rest (2503.10637).

    The student is called as ever; prompts, noise, sizes and negative prompts of the call go to the teacher too. It
    hands its latents over at that of its own times which is nearest to the student's.

    Args:
        student: pipeline of a few steps, with LCMScheduler, TCDScheduler or another that takes ``timesteps``.
        teacher: pipeline on the same latents.
        intervals: of the student's that the teacher takes: 0 is the student alone, all of them the teacher alone.
        num_inference_steps: of the teacher, from pure noise to clean; the default meets the times of students of 1, 2
            and 4 steps.
        guidance_scale: of the teacher.

    Raises:
        ValueError: if a scheduler does not fit, and in use if the student has fewer intervals.
    """
    if "timesteps" not in inspect.signature(student.scheduler.set_timesteps).parameters:
        raise ValueError(
            f"the student's {type(student.scheduler).__name__} takes no timesteps to go on from; it needs one that "
            "does, such as LCMScheduler or TCDScheduler"
        )
    for name, pipeline in (("student", student), ("teacher", teacher)):
        if float(pipeline.scheduler.init_noise_sigma) != 1:
            raise ValueError(
                f"the {name}'s {type(pipeline.scheduler).__name__} scales its latents, so that they cannot be handed "
                f"over; set {name}.scheduler = DDIMScheduler.from_config({name}.scheduler.config)"
            )
    unets = _unet(student), _unet(teacher)
    signature = inspect.signature(type(student).__call__)
    wanted = inspect.signature(type(teacher).__call__).parameters

    def call(original: Any, *args: Any, **named: Any) -> Any:
        if intervals == 0:
            return original(*args, **named)
        given = dict(signature.bind_partial(student, *args, **named).arguments)
        given.pop(next(iter(given)))  # self
        given |= given.pop("kwargs", {})
        grid = _times(student.scheduler, given)
        check_intervals(intervals, len(grid))
        both = {name: value for name, value in given.items() if name not in (*_OF_THE_STUDENT, *_OF_THE_RESULT)}
        first = {name: value for name, value in both.items() if name in wanted}
        first |= {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        if intervals == len(grid):
            return teacher(**first, **{name: given[name] for name in _OF_THE_RESULT if name in given})

        def stop(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            times = pipeline.scheduler.timesteps.tolist()
            if step + 1 == nearest(times, grid[intervals]):
                pipeline._interrupt = True  # Diffusers' own way to leave the loop
            return {}

        latents = teacher(**first, output_type="latent", callback_on_step_end=stop).images
        rest = {name: value for name, value in given.items() if name not in ("num_inference_steps", "latents")}
        with _no_word_of_custom_timesteps(student.scheduler):
            return original(**rest | {"latents": latents, "timesteps": grid[intervals:]})

    with _counting(*unets) as count, _replaced(student, "__call__", call):
        yield count


@contextmanager
def _no_word_of_custom_timesteps(scheduler: Any) -> Iterator[None]:
    """Within it, the scheduler does not warn that a grid which is only gone on with does not begin at its start."""
    logger = logging.getLogger(type(scheduler).__module__)

    def keep(record: logging.LogRecord) -> bool:
        return "custom timestep schedule" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


@dataclass(frozen=True)
class Choice:
    """A guider by its name, with what the command line says of it. Raises ValueError if that does not go together."""

    name: Literal["cfgpp", "adaptive", "linear", "nasa"]
    scale: float | None = None
    negative_prompt: str | None = None
    coefficients: Path | None = None

    def __post_init__(self) -> None:
        """Check."""
        if self.name == "nasa" and self.negative_prompt is None:
            raise ValueError("guider nasa steers away from a negative prompt; give --negative-prompt")
        if (self.name == "linear") != (self.coefficients is not None):
            raise ValueError("guider linear and --coefficients belong together; give both or neither")
        if self.name == "linear" and self.scale is not None:
            raise ValueError("guider linear has the scale of its coefficients; leave out --guider-scale")
        self.call()  # a file that cannot be read is told before a pipeline loads

    def call(self) -> dict[str, Any]:
        """What the pipeline's call needs besides: the steps and the scale that coefficients were fitted on."""
        if self.coefficients is None:
            return {}
        fitted = read_coefficients(self.coefficients)
        return {"num_inference_steps": len(fitted.times), "guidance_scale": fitted.guidance_scale}

    def switched_on(self, pipeline: Any) -> AbstractContextManager[Count]:
        """The guider's context."""
        scale = () if self.scale is None else (self.scale,)
        if self.coefficients is not None:
            return linear(pipeline, read_coefficients(self.coefficients))
        if self.name == "nasa":
            return nasa(pipeline, self.negative_prompt or "", *scale)
        return cfgpp(pipeline, *scale) if self.name == "cfgpp" else adaptive(pipeline, *scale)


def nearest(times: Sequence[float], t: float) -> int:
    """The index, past the first, of the time that is nearest to t."""
    return min(range(1, len(times)), key=lambda i: abs(times[i] - t))


def _times(scheduler: Any, given: dict[str, Any]) -> list[int]:
    """The times at which a student's call will evaluate it. Raises ValueError if it does not say how many."""
    if given.get("timesteps") is not None:
        return list(given["timesteps"])
    count = given.get("num_inference_steps") or scheduler.config.get("original_inference_steps")
    if not count:
        raise ValueError("the number of the student's steps is not known; give num_inference_steps")
    scheduler.set_timesteps(count)
    return scheduler.timesteps.tolist()


@contextmanager
def _guiding(pipeline: Any, make: Make) -> Iterator[Count]:
    """Let a guider answer for both halves of what classifier-free guidance asks of the U-Net."""
    unet, (schedule, kind) = _unet(pipeline), _terms(pipeline)
    grid: Any = None
    guide: Any = None

    def call(
        original: Any,
        sample: Tensor,
        timestep: Any,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        nonlocal grid, guide
        if not pipeline.do_classifier_free_guidance:
            raise ValueError(
                "a guider takes the place of classifier-free guidance, which this call does not do; give a "
                "guidance_scale above 1 (a student's pipeline has no guidance: there is nasa)"
            )

        def denoise(x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
            rest = {name: value for name, value in cond.items() if name != _TEXT}
            y = original(
                x_t,
                t.float(),
                encoder_hidden_states=cond[_TEXT],
                cross_attention_kwargs=cross_attention_kwargs,
                added_cond_kwargs=rest or None,
                return_dict=False,
            )[0]
            return Prediction(y, kind, x_t, schedule(t).like(x_t))

        halves = {
            name: value.chunk(2) for name, value in {_TEXT: encoder_hidden_states, **(added_cond_kwargs or {})}.items()
        }
        if grid is not pipeline.scheduler.timesteps:  # which every call of the pipeline sets anew
            grid = pipeline.scheduler.timesteps
            guide = make(denoise, {name: half[0] for name, half in halves.items()}, pipeline.guidance_scale)
        x_t = sample.chunk(2)[1]
        t = torch.as_tensor(timestep, dtype=torch.float64, device=x_t.device).expand(len(x_t))
        y = guide(x_t, t, {name: half[1] for name, half in halves.items()}).y.to(sample.dtype)
        return (torch.cat([y, y]),)  # between equal halves, guidance of any scale does nothing

    with _counting(unet) as count, _replaced(unet, "__call__", call):
        yield count


def _unet(pipeline: Any) -> Any:
    """The pipeline's U-Net. Raises ValueError if it has none."""
    if pipeline.components.get("unet") is None:
        raise ValueError(f"{type(pipeline).__name__} has no U-Net; guiders know pipelines like Stable Diffusion's")
    return pipeline.unet


def _terms(pipeline: Any) -> tuple[TabulatedVP, Any]:
    """The schedule and the kind that the U-Net was trained with. Raises ValueError if the scheduler does not say."""
    config = pipeline.scheduler.config
    known = config.get("prediction_type", "epsilon") in KINDS
    if "alphas_cumprod" not in vars(pipeline.scheduler) or not known:
        raise ValueError(
            f"{type(pipeline.scheduler).__name__} has no table of alphas_cumprod, or predicts what is not known; "
            "guiders need one like DDIMScheduler"
        )
    return TabulatedVP(pipeline.scheduler.alphas_cumprod), kind_of(pipeline.scheduler)


@contextmanager
def _counting(*networks: Any) -> Iterator[Count]:
    """Within it, the rows of the networks' calls are added up."""
    count = Count()

    def hook(network: Any, args: tuple[Any, ...]) -> None:
        count.evaluations += len(args[0])

    handles = [network.register_forward_pre_hook(hook) for network in networks]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _replaced(thing: Any, method: str, call: Callable[..., Any]) -> Iterator[None]:
    """Within it, thing.method(...) is call(original method, ...), by a class of the same name in its class's place."""
    own = type(thing)
    original = getattr(own, method)

    @functools.wraps(original)
    def replacement(self: Any, *args: Any, **named: Any) -> Any:
        return call(functools.partial(original, self), *args, **named)

    thing.__class__ = type(own.__name__, (own,), {method: replacement, "__module__": own.__module__})
    try:
        yield
    finally:
        thing.__class__ = own
