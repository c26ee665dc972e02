"""HPS v2.1: how much people would prefer an image for its prompt.

    hpsv2 = 100 cos(image, prompt),  by a CLIP ViT-H/14 trained on people's rankings (HPD v2)

Wu et al. 2023, arXiv 2306.09341, with the checkpoint of version 2.1; the mean over images, about 25 to 33, as the
authors' benchmark prints it (its own prompts, 800 in each of 4 styles, are not shipped here). The checkpoint is
open_clip's, whose names ``transformers_names`` turns into those of Transformers' CLIPModel. Its text tokenizer is that
of every CLIP of OpenAI: it is read from the folder of the checkpoint, or from ``eval.weights.clip``. Images come to
224 pixels as in the authors' package with a torchvision of today (>= 0.17: antialiased); with those of its time they
were not, so that older numbers differ a little.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from . import weights
from .context import About, Context
from .preference import ClipScores, Preference, coloured, filled, resized, vocabulary

ABOUT = About(title="HPS v2.1", needs=("hpsv2", "clip"), values=("hpsv2",), better="high")
HEADS = 16
"""Of the attention of both towers of ViT-H/14; the shapes of weights do not tell it."""
TOP = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
TRANSPOSED = ("text_projection", "visual.proj")
TOWERS = {"transformer.resblocks.": "text_model", "visual.transformer.resblocks.": "vision_model"}


def transformers_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's tensors of a CLIP by their names in Transformers' CLIPModel, float32. Raises ValueError."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        tensor = value.float()
        if name in TOP:
            found[TOP[name]] = (tensor.T if name in TRANSPOSED else tensor).contiguous()
            continue
        prefix = next((p for p in TOWERS if name.startswith(p)), None)
        number, _, rest = name.removeprefix(prefix or "").partition(".")
        part, _, kind = rest.rpartition(".")
        place = f"{TOWERS[prefix]}.encoder.layers.{number}" if prefix else ""
        if prefix and rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                found[f"{place}.self_attn.{letter}_proj.{rest.removeprefix('attn.in_proj_')}"] = third.contiguous()
        elif prefix and part in BLOCK:
            found[f"{place}.{BLOCK[part]}.{kind}"] = tensor
        else:
            raise ValueError(f"{name!r} is no tensor of open_clip's CLIP")
    return found


def network(state: Mapping[str, Tensor], heads: int = HEADS) -> Any:
    """A CLIPModel with the weights of an open_clip state dict; its sizes are theirs. Raises ValueError."""
    from transformers import CLIPConfig, CLIPModel

    try:
        words, patches = state["token_embedding.weight"], state["visual.conv1.weight"]
        side = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
        text = {
            "vocab_size": len(words),
            "hidden_size": words.shape[1],
            "intermediate_size": len(state["transformer.resblocks.0.mlp.c_fc.bias"]),
            "num_hidden_layers": depth(state, "transformer.resblocks."),
            "max_position_embeddings": len(state["positional_embedding"]),
            # the last token of CLIP's vocabulary, at which the text is read out
            "bos_token_id": len(words) - 2,
            "eos_token_id": len(words) - 1,
            "pad_token_id": len(words) - 1,
        }
        vision = {
            "hidden_size": len(patches),
            "intermediate_size": len(state["visual.transformer.resblocks.0.mlp.c_fc.bias"]),
            "num_hidden_layers": depth(state, "visual.transformer.resblocks."),
            "image_size": side * patches.shape[-1],
            "patch_size": patches.shape[-1],
        }
        shared = {"num_attention_heads": heads, "hidden_act": "gelu"}
        config = CLIPConfig(
            text_config=text | shared,
            vision_config=vision | shared,
            projection_dim=state["visual.proj"].shape[1],
        )
        return filled(lambda: CLIPModel(config), transformers_names(state))
    except (KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"not an open_clip state dict of a CLIP ({' '.join(str(error).split())[:200]})") from None


def depth(state: Mapping[str, Tensor], prefix: str) -> int:
    """The number of blocks below a prefix."""
    return 1 + max(int(n.removeprefix(prefix).split(".")[0]) for n in state if n.startswith(prefix))


@functools.lru_cache(maxsize=1)
def load(file: Path, clip: str | None, device: str) -> ClipScores:
    """The extractor of a checkpoint; clip: ``eval.weights.clip``. Raises ValueError if it or the tokenizer is none."""
    from transformers import CLIPTokenizer

    source = weights.known("hpsv2").source
    state = weights.tensors(file, f"fetch it again from {source}")
    try:
        made = network(state)
    except ValueError as error:
        raise ValueError(f"{file}: {error}; fetch it again from {source}") from None
    told = {
        "extractor": "HPS v2.1",
        "sha256": weights.sha256(file),
        "resize": "short side to 224, bicubic with antialias, middle cut out",
        "score": "100 cos",
    }
    words = vocabulary(
        CLIPTokenizer,
        file.parent,
        ("tokenizer.json", "vocab.json"),
        lambda: weights.find("clip", clip),
        [made.config.text_config.vocab_size],
    )
    return ClipScores("hpsv2", made, words, prepare, 100.0, told, device)


def prepare(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> [B, 3, 224, 224]."""
    return coloured(resized(images, 224))


class Metric(Preference):
    """``hpsv2``, the mean over the images seen."""

    def __init__(self, context: Context) -> None:
        """Raises ValueError if the weights are missing."""
        file = weights.find("hpsv2", context.weights.get("hpsv2"))
        super().__init__("hpsv2", load(file, context.weights.get("clip"), str(context.device)))
