"""The family ``dit`` for the contract."""

from __future__ import annotations

import torch
from diffusers import DiTPipeline, DiTTransformer2DModel

from tests import tiny

from .parts import Case, autoencoder

LABELS = {"1": "goldfish", "2": "great white shark, white shark"}


def pipeline(seed: int) -> DiTPipeline:
    torch.manual_seed(seed)
    transformer = DiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        attention_bias=True,
        num_embeds_ada_norm=1000,  # the number that the stock call takes for the null class
    )
    made = DiTPipeline(transformer, autoencoder(), tiny.scheduler(beta_schedule="linear", beta_end=0.02), LABELS)
    made.register_to_config(id2label=LABELS)  # as published pipelines have it; the class itself does not keep it
    return made


CASE = Case(pipeline, prompts=["white shark", "7"])
