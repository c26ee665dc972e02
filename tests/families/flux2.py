"""The family ``flux2`` for the contract: klein, and dev."""

from __future__ import annotations

from dataclasses import replace

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from .parts import Case, flow_scheduler
from .qwen_image import words
from .z_image import chat

WIDTH = 8
SMALL = {
    "hidden_size": WIDTH,
    "intermediate_size": 16,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
"""Of a language model, whose layers are named by number."""


def transformer(guidance_embeds: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance_embeds,
    )


def autoencoder() -> AutoencoderKLFlux2:
    made = AutoencoderKLFlux2(
        latent_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
    )
    made.bn.running_mean.normal_()
    made.bn.running_var.uniform_(0.5, 2.0)
    return made


def klein(seed: int) -> Flux2KleinPipeline:
    torch.manual_seed(seed)
    return Flux2KleinPipeline(
        transformer=transformer(guidance_embeds=False),
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        vae=autoencoder(),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(vocab_size=len(chat()), num_hidden_layers=28, **SMALL)),
        tokenizer=chat(),
    )


def processor() -> PixtralProcessor:
    """Of single bytes, with a template for chats."""
    made = words()
    made.add_tokens(["[IMG]", "[IMG_BREAK]", "[IMG_END]"], special_tokens=True)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content[0].text }}\n{% endfor %}"
    return PixtralProcessor(PixtralImageProcessor(), made, patch_size=2, chat_template=template)


def dev(seed: int) -> Flux2Pipeline:
    torch.manual_seed(seed)
    text = {"model_type": "mistral", "vocab_size": 512, "num_hidden_layers": 31, **SMALL}
    vision = {
        "model_type": "pixtral",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 8,
        "patch_size": 2,
    }
    return Flux2Pipeline(
        transformer=transformer(guidance_embeds=True),
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        vae=autoencoder(),
        text_encoder=Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision)),
        tokenizer=processor(),
    )


CASE = Case(klein, image_size=(16, 16), image_sizes=[(16, 24), (32, 16)], exported={"is_distilled": True})
MORE = {"dev": replace(CASE, pipeline=dev, guidance_scale=None, exported={})}
