"""FD-DINOv2: the preparation of images, DINOv2 as its authors' code has it, and the distance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, interpolate, layer_norm, linear, scaled_dot_product_attention

from fastgen.evaluation import fd_dinov2
from fastgen.evaluation.context import Context, Seen
from tests.rows import Real, images, noise, same_however_seen, seen

WIDTH, HEADS, DEPTH, TABLE = 12, 2, 2, 37


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """DINOv2's true architecture, narrow, with its true table of 37 x 37 positions and random weights."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        image_size=14 * TABLE,
        patch_size=14,
        layerscale_value=0.7,
    )
    made = Dinov2Model(config)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=1.0)  # attention that looks here and there
    folder = tmp_path_factory.mktemp("weights") / "dinov2-tiny"
    made.save_pretrained(folder)
    return folder


def test_images_come_as_torchvision_resizes_floats():
    from torchvision.transforms.v2.functional import InterpolationMode, normalize, resize

    for height, width in ((64, 64), (300, 500), (224, 224)):
        pictures = images(2, height, width)
        want = resize(pictures.float(), [224, 224], InterpolationMode.BICUBIC, antialias=True) / 255
        want = normalize(want, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        torch.testing.assert_close(fd_dinov2.prepare(pictures), want, rtol=0, atol=1e-5)


def test_images_come_almost_as_pillow_resizes_them():
    """dgm-eval's way, rounded to 256 levels after each of two passes; here nothing is cut off at their ends."""
    import numpy as np
    from PIL import Image

    picture = images(1, 500, 300)[0] // 2 + 64
    resized = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC)
    levels = torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1).float()
    mean, std = (torch.tensor(v)[:, None, None] for v in (fd_dinov2.MEAN, fd_dinov2.STD))
    apart = (255 * (fd_dinov2.prepare(picture[None])[0] * std + mean) - levels).abs()
    assert apart.max() < 0.5 * 1.25 + 0.5  # the first rounding grows by at most the kernel's absolute sum
    assert apart.mean() < 0.5


def cubic(at: Tensor, table: Tensor) -> Tensor:
    """A table [n] at places between its entries: Keys' kernel with a = -3/4, the border repeated."""
    a, found = -0.75, torch.zeros_like(at)
    for step in (-1, 0, 1, 2):
        place = at.floor() + step
        d = (at - place).abs()
        near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
        found += torch.where(d <= 1, near, far) * table[place.clamp(0, len(table) - 1).long()]
    return found


def test_positions_are_looked_up_where_the_authors_code_does():
    """Patch i of 16 stands at (i + 1/2) 37 / 16.1 - 1/2, not at (i + 1/2) 37 / 16 - 1/2."""
    rows, columns = noise(2, 37)
    table = torch.stack([rows[:, None].expand(37, 37), columns.expand(37, 37)], -1).reshape(1, 37 * 37, 2)
    found = fd_dinov2.positions(torch.cat([torch.tensor([[[5.0, 7.0]]]), table], 1), 16)
    assert found.shape == (1, 257, 2)
    assert found[0, 0].tolist() == [5, 7]
    grid, at = found[0, 1:].unflatten(0, (16, 16)), (torch.arange(16) + 0.5) * 37 / 16.1 - 0.5
    torch.testing.assert_close(grid[:, 3, 0], cubic(at, rows), rtol=0, atol=1e-4)
    torch.testing.assert_close(grid[3, :, 1], cubic(at, columns), rtol=0, atol=1e-4)
    assert (grid[:, 3, 0] - cubic((torch.arange(16) + 0.5) * 37 / 16 - 0.5, rows)).abs().max() > 0.01
    same = noise(1, 257, 4)
    assert fd_dinov2.positions(same, 16) is same


def authors_features(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """facebookresearch/dinov2's forward pass, by Transformers' names of the weights."""

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    def apply(x: Tensor, name: str) -> Tensor:
        return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    at = "embeddings.patch_embeddings.projection"
    x = conv2d(pixels, state[f"{at}.weight"], state[f"{at}.bias"], stride=14).flatten(2).mT
    x = torch.cat([state["embeddings.cls_token"].expand(len(x), -1, -1), x], 1)
    table = state["embeddings.position_embeddings"]
    patches = table[:, 1:].reshape(1, TABLE, TABLE, WIDTH).permute(0, 3, 1, 2)
    patches = interpolate(patches, scale_factor=(16.1 / TABLE, 16.1 / TABLE), mode="bicubic")
    x = x + torch.cat([table[:, :1], patches.permute(0, 2, 3, 1).reshape(1, 256, WIDTH)], 1)
    for i in range(DEPTH):
        block = f"encoder.layer.{i}"
        h = norm(x, f"{block}.norm1")
        parts = (apply(h, f"{block}.attention.attention.{n}") for n in ("query", "key", "value"))
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in parts)
        h = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + state[f"{block}.layer_scale1.lambda1"] * apply(h, f"{block}.attention.output.dense")
        h = apply(gelu(apply(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
        x = x + state[f"{block}.layer_scale2.lambda1"] * h
    return norm(x, "layernorm")[:, 0]


def test_features_are_those_of_the_authors_code(folder):
    from safetensors.torch import load_file
    from transformers import Dinov2Model

    eyes = fd_dinov2.Dinov2(folder, "cpu")
    pictures = images(3, 40, 60) // torch.tensor([1, 2, 4], dtype=torch.uint8)[:, None, None, None]
    want = authors_features(load_file(folder / "model.safetensors"), fd_dinov2.prepare(pictures))
    got = eyes(pictures, ["", "", ""])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(eyes(pictures[2:]), got[2:], rtol=1e-5, atol=1e-5)
    assert (got[0] - got[1]).abs().max() > 0.1
    plain = Dinov2Model.from_pretrained(folder).eval()
    with torch.no_grad():  # with positions of its own: a hundred times the tolerance away
        assert (plain(fd_dinov2.prepare(pictures)).pooler_output - want).abs().max() > 0.01
    assert got.shape == (3, eyes.num_features)


@pytest.fixture
def metric(folder):
    """Gives the metric against real features, and the key of its rows."""

    def make(real: Tensor) -> tuple[fd_dinov2.Metric, str]:
        one = fd_dinov2.Metric(Context(weights={"dinov2": str(folder)}, reference=Real(real)))
        return one, one.extractors[0].key

    return make


def test_the_distance_of_two_gaussians(metric):
    """Along each axis |m - m'|^2 + (s - s')^2 of samples whose axes do not mix."""

    def cross(mean: list[float], *sizes: float) -> Tensor:
        axes = torch.diag(torch.tensor(sizes))
        return torch.tensor(mean) + torch.cat([axes, -axes])

    real, made = cross([1.0, 2.0, 3.0], 10, 4, 2), cross([4.0, 2.0, -1.0], 20, 6, 8)
    one, key = metric(real)
    want = 3**2 + 4**2 + 2 / 5 * (10**2 + 2**2 + 6**2)
    assert one.compute(seen(made, key=key)) == {"fd_dinov2": pytest.approx(want, rel=1e-9)}
    assert metric(real)[0].compute(seen(real, key=key))["fd_dinov2"] < 1e-9


def test_any_order_or_merge_gives_the_same_number(metric):
    one, key = metric(noise(30, 5))
    what = seen(noise(20, 5, seed=1), key=key)
    values = same_however_seen(one, what)
    assert set(values) == {"fd_dinov2"}
    assert one.compute(what.take(range(19))) != values


def test_through_images(folder):
    """Brighter images are further away than others of the same kind."""
    eyes = fd_dinov2.Dinov2(folder, "cpu")
    one = fd_dinov2.Metric(Context(weights={"dinov2": str(folder)}, reference=Real(eyes(images(8) // 4))))
    [own] = one.extractors
    near, far = (
        one.compute(Seen([""] * 6, {own.key: own(made, [""] * 6)}))
        for made in (images(6, seed=1) // 4, 255 - images(6) // 4)
    )
    assert near["fd_dinov2"] < far["fd_dinov2"]
    told = one.protocol()
    assert told["extractor"] == "DINOv2 dinov2-tiny"
    assert told["reference"]["num_images"] == 8


def test_messages(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"fd_dinov2 needs real images; set eval\.reference"):
        fd_dinov2.Metric(Context(weights={"dinov2": str(folder)}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: not a Dinov2Model \("):
        fd_dinov2.Metric(Context(weights={"dinov2": str(tmp_path / "empty")}))
    with pytest.raises(ValueError, match="none: no such folder; weights of dinov2 come from https"):
        fd_dinov2.Metric(Context(weights={"dinov2": str(tmp_path / "none")}))
