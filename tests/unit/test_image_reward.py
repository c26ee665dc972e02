"""ImageReward: BLIP as its authors' code has it and Transformers' give the same rewards."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, linear

from fastgen.evaluation import image_reward, preference
from fastgen.evaluation.context import Context, Seen
from tests.rows import images, same_however_seen

VISION, TEXT, DEPTH, PATCH, SIZE = 32, 24, 2, 8, 32
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "dog", "cat", "apple", "left", "of"]
MORE = 2
"""Tokens that the authors add to the vocabulary, which no prompt has."""
PROMPTS = ("a red apple", "a dog", "a cat left of a dog", "a dog", "a red dog " * 20, "apple")


def shapes() -> dict[str, tuple[int, ...]]:
    """The authors' names, and the sizes of a small one."""
    found: dict[str, tuple[int, ...]] = {}

    def layer(name: str, out: int, into: int) -> None:
        found.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

    def norm(name: str, width: int) -> None:
        found.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    eye = "blip.visual_encoder"
    found[f"{eye}.cls_token"] = (1, 1, VISION)
    found[f"{eye}.pos_embed"] = (1, (SIZE // PATCH) ** 2 + 1, VISION)
    found |= {f"{eye}.patch_embed.proj.weight": (VISION, 3, PATCH, PATCH), f"{eye}.patch_embed.proj.bias": (VISION,)}
    for i in range(DEPTH):
        at = f"{eye}.blocks.{i}"
        norm(f"{at}.norm1", VISION)
        norm(f"{at}.norm2", VISION)
        layer(f"{at}.attn.qkv", 3 * VISION, VISION)
        layer(f"{at}.attn.proj", VISION, VISION)
        layer(f"{at}.mlp.fc1", 40, VISION)
        layer(f"{at}.mlp.fc2", VISION, 40)
    norm(f"{eye}.norm", VISION)
    read = "blip.text_encoder"
    found[f"{read}.embeddings.position_ids"] = (1, 48)
    found[f"{read}.embeddings.word_embeddings.weight"] = (len(WORDS) + MORE, TEXT)
    found[f"{read}.embeddings.position_embeddings.weight"] = (48, TEXT)
    norm(f"{read}.embeddings.LayerNorm", TEXT)
    for i in range(DEPTH):
        at = f"{read}.encoder.layer.{i}"
        for attention, width in (("attention", TEXT), ("crossattention", VISION)):
            layer(f"{at}.{attention}.self.query", TEXT, TEXT)
            layer(f"{at}.{attention}.self.key", TEXT, width)
            layer(f"{at}.{attention}.self.value", TEXT, width)
            layer(f"{at}.{attention}.output.dense", TEXT, TEXT)
            norm(f"{at}.{attention}.output.LayerNorm", TEXT)
        layer(f"{at}.intermediate.dense", 30, TEXT)
        layer(f"{at}.output.dense", TEXT, 30)
        norm(f"{at}.output.LayerNorm", TEXT)
    layer("blip.vision_proj", 6, VISION)
    layer("blip.text_proj", 6, TEXT)
    for number, (out, into) in zip((0, 2, 4, 6, 7), ((10, TEXT), (8, 10), (6, 8), (4, 6), (1, 4)), strict=True):
        layer(f"mlp.layers.{number}", out, into)
    return found


@pytest.fixture(scope="module")
def state():
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(shape, generator=generator) * 0.4 for name, shape in shapes().items()}
    for name in made:
        if "norm" in name.lower() and name.endswith("weight"):
            made[name] += 1
    made["blip.text_encoder.embeddings.position_ids"] = torch.arange(48)[None]
    return made


@pytest.fixture(scope="module")
def checkpoint(state, tmp_path_factory):
    """The checkpoint's file, with BERT's words beside it."""
    folder = tmp_path_factory.mktemp("reward")
    save_file(state, folder / "reward.safetensors")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return folder / "reward.safetensors"


def rewards(state: dict[str, Tensor], pixels: Tensor, prompts: list[list[int]]) -> Tensor:
    """The authors' forward pass, prompt by prompt without padding: [B]."""

    def apply(x: Tensor, name: str) -> Tensor:
        return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return (weights @ v).transpose(0, 1).flatten(1)

    eye, read, found = "blip.visual_encoder", "blip.text_encoder", []
    for pixel, tokens in zip(pixels, prompts, strict=True):
        at = f"{eye}.patch_embed.proj"
        x = conv2d(pixel[None], state[f"{at}.weight"], state[f"{at}.bias"], stride=PATCH)[0].flatten(1).T
        x = torch.cat([state[f"{eye}.cls_token"][0], x]) + state[f"{eye}.pos_embed"][0]
        for i in range(DEPTH):
            at = f"{eye}.blocks.{i}"
            x = x + apply(
                attend(*apply(norm(x, f"{at}.norm1", 1e-6), f"{at}.attn.qkv").chunk(3, -1), 16), f"{at}.attn.proj"
            )
            x = x + apply(gelu(apply(norm(x, f"{at}.norm2", 1e-6), f"{at}.mlp.fc1")), f"{at}.mlp.fc2")
        image = norm(x, f"{eye}.norm", 1e-6)
        at = f"{read}.embeddings"
        x = state[f"{at}.word_embeddings.weight"][tokens] + state[f"{at}.position_embeddings.weight"][: len(tokens)]
        x = norm(x, f"{at}.LayerNorm", 1e-12)
        for i in range(DEPTH):
            for attention, seen in (("attention", None), ("crossattention", image)):
                at = f"{read}.encoder.layer.{i}.{attention}"
                source = x if seen is None else seen
                parts = (
                    apply(x, f"{at}.self.query"),
                    apply(source, f"{at}.self.key"),
                    apply(source, f"{at}.self.value"),
                )
                x = norm(x + apply(attend(*parts, 12), f"{at}.output.dense"), f"{at}.output.LayerNorm", 1e-12)
            at = f"{read}.encoder.layer.{i}"
            h = apply(gelu(apply(x, f"{at}.intermediate.dense")), f"{at}.output.dense")
            x = norm(x + h, f"{at}.output.LayerNorm", 1e-12)
        h = x[0]
        for number in (0, 2, 4, 6, 7):
            h = apply(h, f"mlp.layers.{number}")
        found.append((h[0] - 0.16717362830052426) / 1.0333394966054072)
    return torch.stack(found)


def tokens(prompt: str) -> list[int]:
    """BERT's of a prompt of known words, cut to 35 with both ends kept."""
    inner = [WORDS.index(word) for word in prompt.split()][:33]
    return [WORDS.index("[CLS]"), *inner, WORDS.index("[SEP]")]


def test_rewards_are_those_of_the_authors_code(state, checkpoint):
    metric = image_reward.Metric(Context(weights={"image_reward": str(checkpoint)}))
    [eyes] = metric.extractors
    for pictures in (images(len(PROMPTS), 40, 60), images(len(PROMPTS), 32, 32)):
        pixels = preference.coloured(preference.resized_in_steps(pictures, SIZE))
        want = rewards(state, pixels, [tokens(prompt) for prompt in PROMPTS])
        rows = eyes(pictures, PROMPTS)
        torch.testing.assert_close(rows[:, 0], want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(eyes(pictures[1:2], PROMPTS[1:2]), rows[1:2], rtol=1e-4, atol=1e-4)
        got = metric.compute(Seen(PROMPTS, {eyes.key: rows}))
        assert got == {"image_reward": pytest.approx(float(want.mean()), abs=1e-4)}
        assert want.std() > 0.05
    assert (eyes(images(2), ["a dog", "a dog"])[0] - eyes(images(2), ["a cat", "a dog"])[0]).abs() > 0.01


def test_image_names_go_over_and_back(state):
    """Every tensor has one place of its own in Transformers' network, with its numbers."""
    own = image_reward.below(state, "blip.visual_encoder.")
    found = image_reward.vision_names(own)
    assert len(found) == len(own)
    assert [v.data_ptr() for v in found.values()] == [v.data_ptr() for v in own.values()]
    made = image_reward.network(state).vision.state_dict()
    assert made.keys() == found.keys()
    assert all(torch.equal(made[name], value) for name, value in found.items())


def test_the_true_architecture_has_these_names():
    """ViT-L/16 and BERT-base without memory."""
    from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    with torch.device("meta"):
        vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224
            )
        )
        text = BlipTextModel(BlipTextConfig(vocab_size=30524, encoder_hidden_size=1024), add_pooling_layer=False)
        wanted = {
            "vision": {name: value.shape for name, value in vision.state_dict().items()},
            "text": {name: value.shape for name, value in text.state_dict().items()},
        }
        places = {"embeddings.class_embedding": "cls_token", "embeddings.position_embedding": "pos_embed"}
        state = {}
        for name, shape in wanted["vision"].items():
            old = places.get(name, name)
            for new, authors in (
                ("embeddings.patch_embedding", "patch_embed.proj"),
                ("post_layernorm", "norm"),
                ("encoder.layers", "blocks"),
                ("layer_norm", "norm"),
                ("self_attn.projection", "attn.proj"),
                ("self_attn.qkv", "attn.qkv"),
            ):
                old = old.replace(new, authors)
            state[f"blip.visual_encoder.{old}"] = torch.empty(shape)
        state |= {f"blip.text_encoder.{name}": torch.empty(shape) for name, shape in wanted["text"].items()}
        for number, (out, into) in zip(
            image_reward.HEAD, ((1024, 768), (128, 1024), (64, 128), (16, 64), (1, 16)), strict=True
        ):
            state |= {
                f"mlp.layers.{number}.weight": torch.empty(out, into),
                f"mlp.layers.{number}.bias": torch.empty(out),
            }
    made = image_reward.network(state)
    assert {name: value.shape for name, value in made.vision.state_dict().items()} == wanted["vision"]
    assert {name: value.shape for name, value in made.text.state_dict().items()} == wanted["text"]
    assert made.vision.config.layer_norm_eps == 1e-6
    assert made.text.config.layer_norm_eps == 1e-12
    assert sum(p.numel() for p in made.parameters()) == sum(v.numel() for v in state.values())


def test_any_order_or_merge_gives_the_same_number(checkpoint):
    metric = image_reward.Metric(Context(weights={"image_reward": str(checkpoint)}))
    [eyes] = metric.extractors
    what = Seen(PROMPTS, {eyes.key: eyes(images(len(PROMPTS)), PROMPTS)})
    values = same_however_seen(metric, what)
    assert set(values) == {"image_reward"}
    assert metric.compute(what.take(range(5))) != values
    assert metric.protocol()["resize"] == "short side to 32, Pillow bicubic, middle cut out"
    with pytest.raises(ValueError, match="image_reward needs at least 1 image, got 0"):
        metric.compute(what.take([]))


def test_the_tokenizer_is_beside_the_checkpoint_or_berts(state, tmp_path):
    file = tmp_path / "alone" / "reward.safetensors"
    file.parent.mkdir()
    save_file(state, file)
    with pytest.raises(ValueError, match="none: no such folder; weights of bert come from"):
        image_reward.Metric(Context(weights={"image_reward": str(file), "bert": str(tmp_path / "none")}))
    (tmp_path / "bert").mkdir()
    with pytest.raises(
        ValueError, match=r"bert: holds no BertTokenizer; put tokenizer\.json or vocab\.txt there or into"
    ):
        image_reward.Metric(Context(weights={"image_reward": str(file), "bert": str(tmp_path / "bert")}))
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(WORDS))
    metric = image_reward.Metric(Context(weights={"image_reward": str(file), "bert": str(tmp_path / "bert")}))
    assert metric.extractors[0](images(1), ["a dog"]).shape == (1, 1)


def test_wrong_checkpoints(state, tmp_path):
    for lacking in (
        "mlp.layers.7.bias",
        "blip.visual_encoder.norm.bias",
        "blip.text_encoder.embeddings.LayerNorm.bias",
    ):
        file = tmp_path / f"{lacking}.safetensors"
        save_file({name: value for name, value in state.items() if name != lacking}, file)
        with pytest.raises(ValueError, match=r"not ImageReward's state dict \(.*; fetch it again from https"):
            image_reward.Metric(Context(weights={"image_reward": str(file)}))
    with pytest.raises(ValueError, match="none: no such file; weights of image_reward come from https"):
        image_reward.Metric(Context(weights={"image_reward": str(tmp_path / "none")}))
