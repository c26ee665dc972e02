"""HPS v2.1: open_clip's CLIP and Transformers' give the same scores, and what a wrong checkpoint is told."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastgen.evaluation import hpsv2, preference
from fastgen.evaluation.context import Context, Seen
from tests import tiny
from tests.rows import images, same_however_seen

WIDTH, HEADS, DEPTH, PATCH, TOKENS, SHARED = 32, 16, 2, 56, 12, 10
PROMPTS = ("a red apple", "a dog", "a cat left of a dog", "a dog", "a red dog " * 20, "an apple")


class Block(nn.Module):
    """A residual block with open_clip's names."""

    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(WIDTH, 40), "c_proj": nn.Linear(40, WIDTH)})

    def forward(self, x, mask=None):
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Vision(nn.Module):
    """open_clip's image tower."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn((224 // PATCH) ** 2 + 1, WIDTH))
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(Block() for _ in range(DEPTH))})
        self.proj = nn.Parameter(torch.randn(WIDTH, SHARED))

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer["resblocks"]:
            x = block(x)
        return normalize(self.ln_post(x[:, 0]) @ self.proj)


class OpenClip(nn.Module):
    """open_clip's CLIP, with its names and its forward pass, padded by 0 and read out at the highest token."""

    def __init__(self, words):
        super().__init__()
        self.visual, self.logit_scale = Vision(), nn.Parameter(torch.tensor(4.6))
        self.token_embedding = nn.Embedding(words, WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(TOKENS, WIDTH))
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(Block() for _ in range(DEPTH))})
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.randn(WIDTH, SHARED))

    def text(self, tokens):
        x = self.token_embedding(tokens) + self.positional_embedding
        mask = torch.full((TOKENS, TOKENS), -torch.inf).triu(1)
        for block in self.transformer["resblocks"]:
            x = block(x, mask)
        return normalize(self.ln_final(x)[torch.arange(len(x)), tokens.argmax(1)] @ self.text_projection)

    @torch.no_grad()
    def scores(self, images: Tensor, tokens: Tensor) -> Tensor:
        pixels = preference.coloured(preference.resized(images, 224))
        return 100 * (self.visual(pixels) * self.text(tokens)).sum(1)


@pytest.fixture(scope="module")
def words():
    return tiny.words()


@pytest.fixture(scope="module")
def theirs(words):
    torch.manual_seed(0)
    made = OpenClip(len(words)).eval()
    for name, parameter in made.named_parameters():
        if "ln_" in name or name.endswith("bias"):
            nn.init.normal_(parameter, mean=float("weight" in name), std=0.3)
    return made


@pytest.fixture(scope="module")
def checkpoint(theirs, words, tmp_path_factory):
    """The checkpoint's file, with the tokenizer beside it."""
    folder = tmp_path_factory.mktemp("hps")
    save_file(theirs.state_dict(), folder / "hps.safetensors")
    words.save_pretrained(folder)
    return folder / "hps.safetensors"


def tokens(words, prompts):
    """As open_clip's tokenizer gives them: cut with the end kept, and padded by 0."""
    rows = [words(prompt).input_ids for prompt in prompts]
    rows = [row if len(row) <= TOKENS else [*row[: TOKENS - 1], words.eos_token_id] for row in rows]
    return torch.tensor([row + [0] * (TOKENS - len(row)) for row in rows])


def test_scores_are_those_of_open_clip(theirs, words, checkpoint):
    metric = hpsv2.Metric(Context(weights={"hpsv2": str(checkpoint)}))
    [eyes] = metric.extractors
    for pictures in (images(len(PROMPTS), 100, 80), images(len(PROMPTS), 256, 256)):
        rows = eyes(pictures, PROMPTS)
        want = theirs.scores(pictures, tokens(words, PROMPTS))
        torch.testing.assert_close(rows[:, 0], want, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(eyes(pictures[2:3], PROMPTS[2:3]), rows[2:3], rtol=1e-4, atol=1e-3)
        got = metric.compute(Seen(PROMPTS, {eyes.key: rows}))
        assert got == {"hpsv2": pytest.approx(float(want.mean()), rel=1e-3, abs=1e-3)}
        assert want.std() > 1


def test_names_go_over_and_back(theirs):
    """Every tensor of the checkpoint comes to one place, whole; a query, key and value to one each."""
    state = {name: value.detach() for name, value in theirs.state_dict().items()}
    found = hpsv2.transformers_names(state)
    assert sum(v.numel() for v in found.values()) == sum(v.numel() for v in state.values())
    back = {}
    for old, new in hpsv2.TOP.items():
        back[old] = found.pop(new).T if old in hpsv2.TRANSPOSED else found.pop(new)
    for prefix, tower in hpsv2.TOWERS.items():
        for i in range(DEPTH):
            place = f"{tower}.encoder.layers.{i}"
            for kind in ("weight", "bias"):
                for old, new in hpsv2.BLOCK.items():
                    back[f"{prefix}{i}.{old}.{kind}"] = found.pop(f"{place}.{new}.{kind}")
                thirds = [found.pop(f"{place}.self_attn.{letter}_proj.{kind}") for letter in "qkv"]
                back[f"{prefix}{i}.attn.in_proj_{kind}"] = torch.cat(thirds)
    assert not found
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_half_precision_becomes_single(theirs):
    found = hpsv2.transformers_names({name: value.half() for name, value in theirs.state_dict().items()})
    assert {value.dtype for value in found.values()} == {torch.float32}


def test_the_true_architecture_has_these_names():
    """ViT-H/14 without memory: of its open_clip state dict the network of that size is filled entirely."""
    with torch.device("meta"):
        shapes = {"visual.positional_embedding": (257, 1280), "visual.conv1.weight": (1280, 3, 14, 14)}
        shapes |= {"visual.class_embedding": (1280,), "visual.proj": (1280, 1024), "text_projection": (1024, 1024)}
        shapes |= {"positional_embedding": (77, 1024), "token_embedding.weight": (49408, 1024), "logit_scale": ()}
        for name, width in (("visual.ln_pre", 1280), ("visual.ln_post", 1280), ("ln_final", 1024)):
            shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
        for prefix, count, w in (("visual.transformer", 32, 1280), ("transformer", 24, 1024)):
            for i in range(count):
                at = f"{prefix}.resblocks.{i}"
                for name in ("ln_1", "ln_2"):
                    shapes |= {f"{at}.{name}.weight": (w,), f"{at}.{name}.bias": (w,)}
                shapes |= {f"{at}.attn.in_proj_weight": (3 * w, w), f"{at}.attn.in_proj_bias": (3 * w,)}
                for name, out, into in (("attn.out_proj", w, w), ("mlp.c_fc", 4 * w, w), ("mlp.c_proj", w, 4 * w)):
                    shapes |= {f"{at}.{name}.weight": (out, into), f"{at}.{name}.bias": (out,)}
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
    made = hpsv2.network(state)
    assert sum(p.numel() for p in made.parameters()) == sum(v.numel() for v in state.values()) == 986_109_441
    text, vision = made.config.text_config, made.config.vision_config
    assert (text.num_hidden_layers, text.num_attention_heads, text.hidden_act, text.eos_token_id) == (
        24,
        16,
        "gelu",
        49407,
    )
    assert (vision.num_hidden_layers, vision.num_attention_heads, vision.image_size, vision.patch_size) == (
        32,
        16,
        224,
        14,
    )


def test_any_order_or_merge_gives_the_same_number(checkpoint):
    metric = hpsv2.Metric(Context(weights={"hpsv2": str(checkpoint)}))
    [eyes] = metric.extractors
    what = Seen(PROMPTS, {eyes.key: eyes(images(len(PROMPTS), 60, 60), PROMPTS)})
    values = same_however_seen(metric, what)
    assert set(values) == {"hpsv2"}
    assert metric.compute(what.take(range(5))) != values
    told = metric.protocol()
    assert (told["extractor"], len(told["sha256"])) == ("HPS v2.1", 64)
    with pytest.raises(ValueError, match="hpsv2 needs at least 1 image, got 0"):
        metric.compute(what.take([]))


def test_the_tokenizer_is_beside_the_checkpoint_or_the_clips(theirs, words, tmp_path):
    file = tmp_path / "alone" / "hps.safetensors"
    file.parent.mkdir()
    save_file(theirs.state_dict(), file)
    with pytest.raises(ValueError, match="none: no such folder; weights of clip come from"):
        hpsv2.Metric(Context(weights={"hpsv2": str(file), "clip": str(tmp_path / "none")}))
    words.save_pretrained(tmp_path / "clip")
    metric = hpsv2.Metric(Context(weights={"hpsv2": str(file), "clip": str(tmp_path / "clip")}))
    assert metric.extractors[0](images(1), ["a dog"]).shape == (1, 1)
    (tmp_path / "other").mkdir()
    other = {"hpsv2": str(file), "clip": str(tmp_path / "other")}
    with pytest.raises(
        ValueError, match=r"other: holds no CLIPTokenizer; put tokenizer\.json or vocab\.json there or in"
    ):
        hpsv2.Metric(Context(weights=other))
    (tmp_path / "other" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"other: no CLIPTokenizer \("):
        hpsv2.Metric(Context(weights=other))
    torch.manual_seed(0)
    save_file(OpenClip(len(words) + 3).state_dict(), tmp_path / "more.safetensors")
    wrong = rf"clip: its CLIPTokenizer has {len(words)} tokens, the checkpoint {len(words) + 3}; put the right one's"
    with pytest.raises(ValueError, match=wrong):
        hpsv2.Metric(Context(weights={"hpsv2": str(tmp_path / "more.safetensors"), "clip": str(tmp_path / "clip")}))


def test_wrong_checkpoints(theirs, tmp_path):
    state = dict(theirs.state_dict())
    for lacking, message in (("ln_final.bias", r"lacks 'text_model\.final"), ("visual.proj", r"'visual\.proj'")):
        file = tmp_path / f"{lacking}.safetensors"
        save_file({name: value for name, value in state.items() if name != lacking}, file)
        with pytest.raises(ValueError, match=rf"not an open_clip state dict of a CLIP \(.*{message}.*fetch it again"):
            hpsv2.Metric(Context(weights={"hpsv2": str(file)}))
    for name in ("head.weight", "transformer.resblocks.0.attn.gate", "visual.transformer.resblocks.0.ln_3.bias"):
        with pytest.raises(ValueError, match=f"'{name}' is no tensor of open_clip's CLIP"):
            hpsv2.transformers_names({name: torch.zeros(1)})
    with pytest.raises(ValueError, match="none: no such file; weights of hpsv2 come from https"):
        hpsv2.Metric(Context(weights={"hpsv2": str(tmp_path / "none")}))
