"""What a model family gives the toolkit: one loaded pipeline, spoken to in the paper's terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from .denoiser import Cond, Denoiser
from .prediction import Kind
from .sampling import Sampler


@dataclass(frozen=True)
class About:
    """What a user knows a family by; each family's module has one, called ``ABOUT``.

    Attributes:
        pipelines: the classes that it takes.
        kinds: of output that a teacher's network may have.
        schedulers: class that a student's pipeline leaves with, by its sampler.
        lora: whether the pipelines load LoRA files.
    """

    pipelines: Sequence[str]
    kinds: Sequence[Kind]
    schedulers: Mapping[Sampler, str]
    lora: bool


@dataclass(frozen=True)
class Block:
    """A block of the network whose output a discriminator may read: its module name, channels and shorter side."""

    name: str
    channels: int
    size: int


class MakePipeline(Protocol):
    """How a family puts a network in the teacher's place."""

    def __call__(self, network: nn.Module, num_steps: int | None, sampler: Sampler = "renoise", /) -> Any:
        """The stock pipeline, ready to save."""
        ...


class Run(Protocol):
    """How a family calls a stock pipeline of its class."""

    def __call__(
        self,
        pipeline: Any,
        prompts: Sequence[str],
        num_steps: int,
        generator: torch.Generator,
        guidance_scale: float | None = None,
        **more: Any,
    ) -> Tensor:
        """The latents that the call ends with, as the denoiser sees them: [B, ...].

        The first that it draws from the generator is the noise it begins with, [B, *latent_shape]. guidance_scale:
        None leaves the call its own default. more: further arguments of the call, such as a callback; with another
        output_type it gives what that says.
        """
        ...


class MakeStudent(Protocol):
    """How a family makes a student's network."""

    def __call__(self, embed_guidance: bool = False) -> nn.Module:
        """A trainable copy of the teacher's network, safe in a stock call.

        embed_guidance: it learns to take the guidance scale as an input, and is its teacher until it does. Else it has
        what makes the stock call neither guide it twice nor give it a scale.
        """
        ...


@dataclass(frozen=True)
class Family:
    """One pipeline, loaded.

    Attributes:
        denoiser: the teacher's; schedule and kind are read from the pipeline's scheduler config.
        latent_shape: of one sample, (C, H, W), or as the pipeline lays videos out, such as (C, F, H, W).
        encode_prompts: prompts -> Cond, batch first; longer prompts than the tokenizer takes are cut with a warning.
        uncond: () -> the one-row Cond that guidance subtracts.
        encode: pixels [B, 3, H, W] in [-1, 1] -> latents as the denoiser sees them. A family of videos takes
            [B, 3, F, H, W], too, and an image as a clip that stands still.
        decode: latents -> pixels, in [-1, 1] but for what the decoder overshoots; the gradient passes through. Of
            videos [B, 3, F, H, W].
        student: a trainable copy of the teacher's network, with what a student needs to be safe in a stock call.
        student_times: num_steps -> the falling times of the scheduler that ``pipeline`` will ship; the student meets
            pure noise at the first, which need not be the schedule's last.
        blocks: where a discriminator can take features, shallow to deep.
        pipeline: (network, num_steps, sampler) -> the stock pipeline with this network in the teacher's place, ready
            to save; num_steps and sampler are a student's, None keeps the teacher's scheduler.
        image_size: (height, width) in pixels.
        run: calls a stock pipeline of this class, the teacher's or a student's.
        told: num_steps -> what a stock call of such a student must be told besides their number, as ``run`` does.
        step_noise: where a student's stochastic scheduler draws from in that call: the call's generator, or torch's
            global one, since the pipeline hands no generator on.
        global_noise: latents -> noise as that scheduler draws it from the global one, seen as latents: [B, ...]. It
            matters where the pipeline packs its latents.
        unguided: guidance_scale at which the stock call does not guide a student; None: at any.
        stock_guidance: guidance_scale of a stock call that names none; None: the pipeline cannot give it to a network.
        fix_guidance: (scale) lets the teacher's network, which takes the guidance scale as an input, always do what it
            does at this one; None: it takes none. Until then it is called at ``unguided`` where there is one.
        component: what the pipeline calls the network, as LoRA files name it; empty: it takes no such files.
        routed_by: the condition by which a pipeline of several students routes; empty: it has no place for several.
        experts: of a teacher of several, what the pipeline calls each, and what ``load_lora_weights`` is told besides
            to load a LoRA file into it.
        whole: a family made of this one -> with all parts of the pipeline in memory, where ``load`` left some out.
    """

    denoiser: Denoiser
    latent_shape: tuple[int, ...]
    encode_prompts: Callable[[Sequence[str]], Cond]
    uncond: Callable[[], Cond]
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    student: MakeStudent
    student_times: Callable[[int], list[float]]
    blocks: Sequence[Block]
    pipeline: MakePipeline
    image_size: tuple[int, int]
    run: Run
    told: Callable[[int], Mapping[str, Any]] = lambda num_steps: {}
    step_noise: Literal["generator", "global"] = "generator"
    global_noise: Callable[[Tensor], Tensor] = torch.randn_like
    unguided: float | None = 1.0
    stock_guidance: float | None = None
    fix_guidance: Callable[[float], None] | None = None
    component: str = ""
    routed_by: str = ""
    experts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    whole: Callable[[Family], Family] = lambda family: family
