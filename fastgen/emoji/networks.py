"""The emoji world's untrained networks, all of stock classes, and how they are put together as a pipeline."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextModel, CLIPTokenizer

SIZE = 32
"""Image side in pixels."""
TOKENS = 16
"""Longest prompt in tokens, begin and end included."""
LATENT_CHANNELS = 12
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def tokenizer(captions: Iterable[str], folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair vocabulary is learnt from the captions; its files go to ``folder``.

    Files that are there already are used as they are: the trainer breaks ties by the order of a hash table, so a
    vocabulary learnt anew would number its tokens otherwise.
    """
    if not (folder / "vocab.json").is_file():
        _learn(captions, folder)
    result: CLIPTokenizer = CLIPTokenizer.from_pretrained(
        folder, model_max_length=TOKENS, pad_token=EOS, bos_token=BOS, eos_token=EOS, unk_token=EOS
    )
    return result


def _learn(captions: Iterable[str], folder: Path) -> None:
    """Write vocab.json and merges.txt."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=EOS))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=1,
        special_tokens=[],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(sorted(set(captions)), trainer)
    learnt = json.loads(bpe.to_str())["model"]
    vocabulary = sorted(learnt["vocab"], key=learnt["vocab"].get)
    # a byte that ends a word needs its own entry, or an unseen word would have no token
    vocabulary += [
        b + "</w>" for b in sorted(pre_tokenizers.ByteLevel.alphabet()) if b + "</w>" not in learnt["vocab"]
    ]
    vocabulary += [BOS, EOS]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    merges = [" ".join(m) if isinstance(m, list) else m for m in learnt["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")


def clip(words: CLIPTokenizer) -> tuple[CLIPModel, CLIPProcessor]:
    """A small CLIP: two towers 128 wide, 64 image tokens of 4 x 4 pixels."""
    shared = {
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    text = {
        "vocab_size": len(words),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": TOKENS,
        "projection_dim": 128,
        **shared,
    }
    vision = {
        "image_size": SIZE,
        "patch_size": 4,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "projection_dim": 128,
    }
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=128, **shared)
    images = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return CLIPModel(config), CLIPProcessor(image_processor=images, tokenizer=words)


def autoencoder() -> AutoencoderKL:
    """32 x 32 pixels to 8 x 8 latents of 12 channels."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        sample_size=SIZE,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=16,
        scaling_factor=1.0,
    )


def unet() -> UNet2DConditionModel:
    """The denoiser: two levels, 8 x 8 and 4 x 4, cross-attention at both."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(96, 192),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=(3, 6),
        norm_num_groups=16,
    )


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, v prediction, DDIM on the trailing grid."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        steps_offset=1,
        prediction_type="v_prediction",
    )


def whiten(vae: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Fold a per-channel affine map into the two 1 x 1 convolutions, so that latents have mean 0 and deviation 1.

    mean, std: [C] of the latents as they are. The decoder's output does not change.
    """
    c = vae.config["latent_channels"]
    with torch.no_grad():
        into, out = vae.quant_conv, vae.post_quant_conv
        out.bias += (out.weight[:, :, 0, 0] * mean).sum(1)
        out.weight *= std.reshape(1, c, 1, 1)
        into.weight[:c] /= std.reshape(c, 1, 1, 1)
        into.bias[:c] = (into.bias[:c] - mean) / std
        into.bias[c:] -= 2 * std.log()


def assemble(
    clip_folder: Path, vae_folder: Path, unet_folder: Path | None = None, seed: int = 0
) -> StableDiffusionPipeline:
    """A stock StableDiffusionPipeline with trained text encoder and autoencoder, its U-Net untrained if none is given.

    All float32, as they are trained.
    """
    torch.manual_seed(seed)
    full = {"torch_dtype": torch.float32}
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(vae_folder, **full),
        text_encoder=CLIPTextModel.from_pretrained(clip_folder, dtype=torch.float32),
        tokenizer=CLIPTokenizer.from_pretrained(clip_folder),
        unet=UNet2DConditionModel.from_pretrained(unet_folder, **full) if unet_folder else unet(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
