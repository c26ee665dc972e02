"""ImageReward: how much people would like an image for its prompt, by a BLIP that reads the prompt with the image.

    f = the text encoder's output at the prompt's first token, attending to the ViT-L/16 features of the image
    image_reward = (mlp(f) - 0.1672) / 1.0333,  mlp: 768 -> 1024 -> 128 -> 64 -> 16 -> 1, linear throughout

Xu et al. 2023, arXiv 2304.05977: mean and deviation make the authors' data mean 0 and deviation 1. The networks are
Transformers' BlipVisionModel and BlipTextModel with the names of the authors' checkpoint turned into theirs; a prompt
is cut or padded to 35 tokens, and images come by Pillow's bicubic to 224 pixels, as in the authors' code. The
tokenizer is bert-base-uncased's: it is read from the folder of the checkpoint, or from ``eval.weights.bert``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import weights
from .context import About, Context
from .preference import Preference, coloured, filled, resized_in_steps, vocabulary

ABOUT = About(title="ImageReward", needs=("image_reward", "bert"), values=("image_reward",), better="high")
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the reward on the authors' data, from their code."""
TOKENS = 35
HEADS, TEXT_HEADS = 16, 12
"""Of the attention of ViT-L and of the text encoder; the shapes of weights do not tell it."""
HEAD = (0, 2, 4, 6, 7)
"""Numbers of the linear layers; dropout lies between them."""
VISION = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)
"""The authors' names of the image tower, below ``blip.visual_encoder.``, and Transformers'; the text has the same."""


class Reward(nn.Module):
    """The three parts; vision and text are Transformers' own."""

    vision: Any
    text: Any

    def __init__(self, vision: nn.Module, text: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.vision, self.text, self.head = vision, text, head

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """pixels: [B, 3, H, W]; tokens, mask: [B, L] -> rewards [B, 1]."""
        image = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(input_ids=tokens, attention_mask=mask, encoder_hidden_states=image).last_hidden_state
        found: Tensor = (self.head(read[:, 0]) - MEAN) / STD
        return found


def below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, without it, float32."""
    return {name.removeprefix(prefix): value.float() for name, value in state.items() if name.startswith(prefix)}


def vision_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image tower's tensors by their names in Transformers."""
    found = {}
    for name, value in state.items():
        for pattern, new in VISION:
            name, changed = re.subn(pattern, new, name)
            if changed:
                break
        found[name] = value
    return found


def network(state: Mapping[str, Tensor], heads: int = HEADS, text_heads: int = TEXT_HEADS) -> Reward:
    """The reward with the weights of the authors' state dict; its sizes are theirs. Raises ValueError."""
    from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    vision, text = vision_names(below(state, "blip.visual_encoder.")), below(state, "blip.text_encoder.")
    layers = below(state, "mlp.layers.")
    try:
        patches, words = vision["embeddings.patch_embedding.weight"], text["embeddings.word_embeddings.weight"]
        side = round((vision["embeddings.position_embedding"].shape[1] - 1) ** 0.5)
        image = BlipVisionConfig(
            hidden_size=len(patches),
            intermediate_size=len(vision["encoder.layers.0.mlp.fc1.bias"]),
            num_hidden_layers=depth(vision, "encoder.layers."),
            num_attention_heads=heads,
            image_size=side * patches.shape[-1],
            patch_size=patches.shape[-1],
            layer_norm_eps=1e-6,  # Transformers' own is 1e-5
        )
        prompt = BlipTextConfig(
            vocab_size=len(words),
            hidden_size=words.shape[1],
            encoder_hidden_size=len(patches),
            intermediate_size=len(text["encoder.layer.0.intermediate.dense.bias"]),
            num_hidden_layers=depth(text, "encoder.layer."),
            num_attention_heads=text_heads,
            max_position_embeddings=len(text["embeddings.position_embeddings.weight"]),
            bos_token_id=None,
            eos_token_id=None,
            sep_token_id=None,
        )
        head = nn.Sequential(*(_linear(layers[f"{i}.weight"], layers[f"{i}.bias"]) for i in HEAD))
        tower = filled(lambda: BlipVisionModel(image), vision)
        reader = filled(lambda: BlipTextModel(prompt, add_pooling_layer=False), text)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"not ImageReward's state dict ({' '.join(str(error).split())[:200]})") from None
    return Reward(tower, reader, head).requires_grad_(False).eval()


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    with torch.device("meta"):
        made = nn.Linear(weight.shape[1], len(weight))
    made.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    return made


def depth(state: Mapping[str, Tensor], prefix: str) -> int:
    """The number of blocks below a prefix."""
    return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix))


class Rewards:
    """ImageReward of images with their prompts: an extractor."""

    def __init__(self, reward: Reward, tokenizer: Any, sha256: str, device: str) -> None:
        """tokenizer: BERT's; sha256: of the checkpoint."""
        self._network, self._tokenizer, self._sha256, self._device = reward.to(device), tokenizer, sha256, device
        self._size: int = reward.vision.config.image_size
        self.key = f"image_reward-{sha256[:16]}"

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """uint8 [B, 3, H, W], [B] -> [B, 1]."""
        tokens = self._tokenizer(
            list(prompts), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
        ).to(self._device)
        pixels = coloured(resized_in_steps(images, self._size)).to(self._device)
        found: Tensor = self._network(pixels, tokens.input_ids, tokens.attention_mask)
        return found.cpu()

    def protocol(self) -> dict[str, Any]:
        """Name, hash of the weights and resize."""
        return {
            "extractor": "ImageReward v1.0",
            "sha256": self._sha256,
            "resize": f"short side to {self._size}, Pillow bicubic, middle cut out",
            "score": f"(reward - {MEAN:.4f}) / {STD:.4f}",
        }


@functools.lru_cache(maxsize=1)
def load(file: Path, bert: str | None, device: str) -> Rewards:
    """The extractor of a checkpoint; bert: ``eval.weights.bert``. Raises ValueError if it or the tokenizer is none."""
    from transformers import BertTokenizer

    source = weights.known("image_reward").source
    state = weights.tensors(file, f"fetch it again from {source}")
    try:
        made = network(state)
    except ValueError as error:
        raise ValueError(f"{file}: {error}; fetch it again from {source}") from None
    words = vocabulary(
        BertTokenizer,
        file.parent,
        ("tokenizer.json", "vocab.txt"),
        lambda: weights.find("bert", bert),
        # two of the checkpoint's tokens, [DEC] and [ENC], are BLIP's own; no prompt has them
        [made.text.config.vocab_size - 2, made.text.config.vocab_size],
    )
    return Rewards(made, words, weights.sha256(file), device)


class Metric(Preference):
    """``image_reward``, the mean over the images seen."""

    def __init__(self, context: Context) -> None:
        """Raises ValueError if the weights are missing."""
        file = weights.find("image_reward", context.weights.get("image_reward"))
        super().__init__("image_reward", load(file, context.weights.get("bert"), str(context.device)))
