"""Small untrained parts of the real classes, from which the families' tests put their pipelines together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from fastgen.sampling import Sampler, Step, ddim
from tests import tiny

PROMPTS = ["a red apple", "a dog left of a cat"]
WIDTH = 16
"""Of every text encoder."""


@dataclass(frozen=True)
class Case:
    """What the contract needs to know of a family; ``tests/families/<family>.py`` has it as ``CASE``.

    It may have further ones, by name, in ``MORE``: other classes that the family takes.

    Attributes:
        pipeline: (seed) -> the stock pipeline, the same for the same seed, with a scheduler of first order, whose
            steps are ours, and the last of which ends on x0.
        guidance_scale: at which the teachers are compared; one whose passes differ from no guidance. None: these
            cannot be guided.
        image_sizes: (height, width) in pixels, besides its own.
        prompts: two, as the family takes them.
        image_size: (height, width) in pixels, where the pipeline's own is not small; None: its own.
        num_frames: of a family of videos.
        guiding: scale -> the arguments by which the stock call does what our guidance by it does.
        renoising_class: of the pipeline of a student that renoises; empty: its teacher's.
        exported: settings of the pipeline that a student's leaves with, other than its teacher's.
        step: the teacher's; one that draws noise is that of the students, on their times.
        samplers: that the pipeline has a scheduler for.
    """

    pipeline: Callable[[int], Any]
    guidance_scale: float | None = 4.0
    image_sizes: Sequence[tuple[int, int]] = ()
    prompts: Sequence[str] = tuple(PROMPTS)
    image_size: tuple[int, int] | None = None
    num_frames: int | None = None
    guiding: Callable[[float], Mapping[str, Any]] = lambda scale: {"guidance_scale": scale}
    renoising_class: str = ""
    exported: Mapping[str, Any] = field(default_factory=dict)
    step: Step = ddim
    samplers: Sequence[Sampler] = ("renoise", "ddim")


def clip(projection: bool = False, layers: int = 2) -> Any:
    """A CLIP text encoder for ``tiny.words()``, perhaps with a projection."""
    found = tiny.words()
    config = CLIPTextConfig(
        vocab_size=len(found),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=found.model_max_length,
        projection_dim=WIDTH,
        bos_token_id=found.bos_token_id,
        eos_token_id=found.eos_token_id,
        pad_token_id=found.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


@functools.cache
def t5_words() -> T5Tokenizer:
    """A T5 tokenizer of single letters."""
    letters = [(chr(code), -3.0) for code in range(ord("a"), ord("z") + 1)]
    made = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), *letters], extra_ids=0)
    made.model_max_length = 32
    return made


def t5(width: int = WIDTH) -> T5EncoderModel:
    """A T5 encoder for ``t5_words()``."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(t5_words()),
            d_model=width,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            relative_attention_num_buckets=8,
        )
    )


def autoencoder(channels: int = 4, **changes: Any) -> AutoencoderKL:
    """An image autoencoder of 2 pixels a latent."""
    config = {
        "sample_size": 16,
        "latent_channels": channels,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "scaling_factor": 0.4,
    }
    return AutoencoderKL(**{**config, **changes})


def flow_scheduler(shift: float = 3.0, **changes: Any) -> FlowMatchEulerDiscreteScheduler:
    """Euler's steps on rectified flow."""
    return FlowMatchEulerDiscreteScheduler(shift=shift, **changes)
