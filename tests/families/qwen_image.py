"""The family ``qwen_image`` for the contract."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .parts import WIDTH, Case, flow_scheduler


def words() -> Qwen2Tokenizer:
    """Of single bytes, and the words of the pipeline's template; a new one each time, since other cases change it."""
    letters = sorted(bytes_to_unicode().values())
    vocab = {token: i for i, token in enumerate(["<|endoftext|>", *letters])}
    return Qwen2Tokenizer(vocab=vocab, merges=[])


def text_encoder() -> Qwen2_5_VLForConditionalGeneration:
    attention = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    rotary = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={**attention, "num_key_value_heads": 2, "vocab_size": len(words()), "rope_parameters": rotary},
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 16,
            },
        )
    )


def pipeline(seed: int) -> QwenImagePipeline:
    torch.manual_seed(seed)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 2, 2),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.5, 2.0, 1.5, 1.0],
    )
    return QwenImagePipeline(
        transformer=transformer,
        scheduler=flow_scheduler(use_dynamic_shifting=True, max_shift=0.9, shift_terminal=0.02),
        vae=vae,
        text_encoder=text_encoder(),
        tokenizer=words(),
    )


CASE = Case(
    pipeline,
    image_size=(16, 16),
    image_sizes=[(16, 24), (32, 16)],
    guiding=lambda scale: {"true_cfg_scale": scale, "negative_prompt": [" ", " "]},
)
