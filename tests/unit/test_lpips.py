"""LPIPS on VGG16's true architecture with random weights: torchmetrics' own numbers, and how methods learn by it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastgen import config, distance, losses, lpips
from fastgen.engine import Engine
from fastgen.family import Family
from fastgen.lpips import Lpips, Perceptual
from fastgen.pipelines import sd
from fastgen.rng import Noise
from fastgen.trainers import consistency, dmd, kd
from tests import tiny
from tests.oracle import Samples, conv_family, moved, optims, same, states, train

METHODS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "consistency": (consistency, "consistency", {"solver": "euler"}),
    "kd": (kd, "regression", {}),
    "dmd": (dmd, "regression", {"guidance_scale": 1.0}),
}


def random_vgg(net: str, pretrained: bool = False) -> nn.Sequential:
    """torchvision's VGG16 up to its last pooling, and no download. Its maps neither vanish nor all look alike."""
    from torchvision.models.vgg import cfgs, make_layers

    assert net == "vgg16"
    torch.manual_seed(0)
    layers: nn.Sequential = make_layers(cfgs["D"])
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.normal_(layer.bias, std=0.1)
    return layers


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The weights' file as ``make`` writes it, and torchmetrics' network, both of the same random VGG16."""
    from torchmetrics.functional.image import lpips as theirs

    file = tmp_path_factory.mktemp("weights") / "new" / lpips.FILE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "_get_tv_model_features", random_vgg)
        lpips.make(file)
        return file, theirs._NoTrainLpips(net="vgg")


@pytest.fixture(scope="module")
def network(world: tuple[Path, Any]) -> Lpips:
    return lpips.load(world[0])


def images(n: int = 3, side: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# The function


@pytest.mark.parametrize("shape", [(32, 32), (16, 16), (40, 24)])
def test_values_and_gradients_are_torchmetrics_own(
    world: tuple[Path, Any], network: Lpips, shape: tuple[int, int]
) -> None:
    x, y = (F.interpolate(images(seed=s), shape, mode="bilinear").requires_grad_() for s in (0, 1))
    theirs = world[1](x, y).flatten()
    ours = network(x, y)
    assert ours.shape == (3,)
    assert ours.min() > 0.01
    assert ours.max() / ours.min() > 1.001
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    for one, two in zip(
        torch.autograd.grad(ours.sum(), [x, y]), torch.autograd.grad(theirs.sum(), [x, y]), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)
        assert one.abs().max() > 1e-6


def test_by_hand_on_one_stage(network: Lpips) -> None:
    """Where only the first stage counts: mean over positions of sum_c w_c (difference of unit vectors)^2."""
    kept = [head.clone() for head in network.heads]
    try:
        for head in network.heads[1:]:
            head.zero_()
        x, y = images(2, 16), images(2, 16, seed=1)
        maps = []
        for pixels in (x, y):
            mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
            h = (pixels / 2 + 0.5 - mean[:, None, None]) / std[:, None, None]
            for i in (0, 2):
                h = F.conv2d(h, network.features[i].weight, network.features[i].bias, padding=1).relu()
            maps.append(F.normalize(h, dim=1))
        expected = ((maps[0] - maps[1]).square() * kept[0].reshape(-1, 1, 1)).sum(1).mean((1, 2))
        torch.testing.assert_close(network(x, y), expected, rtol=1e-3, atol=1e-6)
    finally:
        for head, value in zip(network.heads, kept, strict=True):
            head.copy_(value)


def test_equal_images_are_at_distance_0_without_gradient_and_order_does_not_matter(network: Lpips) -> None:
    x, y = images().requires_grad_(), images(seed=1)
    zero = network(x, x.detach().clone())
    assert torch.equal(zero, torch.zeros(3))
    assert torch.autograd.grad(zero.sum(), x)[0].abs().max() == 0
    torch.testing.assert_close(network(x, y), network(y, x))


def test_each_sample_is_judged_by_itself(network: Lpips) -> None:
    x, y = images(), images(seed=1)
    whole = network(x, y)
    for i in range(3):
        torch.testing.assert_close(network(x[i : i + 1], y[i : i + 1])[0], whole[i], rtol=1e-4, atol=1e-6)


def test_it_computes_in_float32_also_under_autocast(network: Lpips) -> None:
    x, y = images(), images(seed=1)
    plain = network(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(x, y)
        assert torch.equal(found, plain)
        assert torch.equal(network(x.bfloat16().float(), y), network(x.bfloat16(), y))
    assert found.dtype == torch.float32


def test_it_is_frozen_in_eval_mode_and_its_start_draws_no_numbers(world: tuple[Path, Any]) -> None:
    before = torch.get_rng_state()
    network = lpips.load(world[0])
    assert torch.equal(torch.get_rng_state(), before)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert sum(p.numel() for p in network.parameters()) == 14_714_688 + sum(lpips.WIDTHS)  # VGG16's convolutions


# Its file


def test_the_file_holds_the_network_numbered_as_torchvision_s_and_the_published_heads(
    world: tuple[Path, Any],
) -> None:
    found = load_file(world[0])
    vgg = random_vgg("vgg16").state_dict()
    assert {name for name in found if name.startswith("features.")} == {f"features.{name}" for name in vgg}
    for name, value in vgg.items():
        assert torch.equal(found[f"features.{name}"], value)
    for k, width in enumerate(lpips.WIDTHS):
        head = found[f"heads.{k}"]
        assert torch.equal(head, getattr(world[1], f"lin{k}").model[1].weight.flatten())
        assert head.shape == (width,)
        assert head.min() >= 0
        assert head.max() > 0


def test_a_file_is_looked_for_where_the_config_or_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTGEN_WEIGHTS_DIR", raising=False)
    assert lpips.locate("") == Path.home() / ".cache" / "fastgen" / "lpips_vgg16.safetensors"
    monkeypatch.setenv("FASTGEN_WEIGHTS_DIR", "/weights")
    assert lpips.locate("") == Path("/weights/lpips_vgg16.safetensors")
    assert lpips.locate("/mine") == Path("/mine/lpips_vgg16.safetensors")
    assert lpips.locate("/mine/vgg.safetensors") == Path("/mine/vgg.safetensors")


def test_a_missing_file_names_itself_and_what_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGEN_WEIGHTS_DIR", str(tmp_path))
    file = tmp_path / lpips.FILE
    told = (
        rf"^{file}: no LPIPS weights; `python -m fastgen\.lpips {file}` writes it from torchvision's VGG16 and "
        r"torchmetrics' heads; or set lpips\.weights, or another distance$"
    )
    for module, _, options in METHODS.values():
        with pytest.raises(ValueError, match=told):
            module.Method(module.Config(**options, distance="lpips"), conv_family(), 1)
        module.Method(module.Config(**options), conv_family(), 1)  # whose distance needs none


@pytest.mark.parametrize("kind", ["cut", "foreign", "shape"])
def test_a_file_of_something_else_is_told(world: tuple[Path, Any], tmp_path: Path, kind: str) -> None:
    file = tmp_path / "vgg.safetensors"
    if kind == "cut":
        file.write_bytes(b"no")
    else:
        tensors = load_file(world[0]) if kind == "shape" else {"a": torch.zeros(1)}
        save_file(tensors | {"heads.0": torch.zeros(3)}, file)
    with pytest.raises(
        ValueError, match=r"vgg.safetensors: not LPIPS weights \(.+\); `python -m fastgen.lpips \S+` wr"
    ):
        lpips.load(file)


def test_without_the_packages_that_have_the_weights_what_to_install_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.image", None)
    with pytest.raises(ValueError, match=r"lpips.*: is made from .* pip install 'fastgen-diffusion\[eval\]'"):
        lpips.make(tmp_path / lpips.FILE)
    assert not list(tmp_path.iterdir())


def test_the_command_says_where_the_file_is_or_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTGEN_WEIGHTS_DIR", str(tmp_path))
    made: list[Path] = []
    monkeypatch.setattr(lpips, "make", made.append)
    assert lpips.main([]) == lpips.main(["x.safetensors"]) == 0
    assert made == [tmp_path / lpips.FILE, Path("x.safetensors")]
    assert capsys.readouterr().out.splitlines()[1] == "x.safetensors holds LPIPS's weights"
    assert lpips.main(["--help"]) == 2
    assert "python -m fastgen.lpips" in capsys.readouterr().err

    def fails(error: Exception) -> Callable[[Path], None]:
        def make(file: Path) -> None:
            raise error

        return make

    for error, code in ((ValueError("bad"), 2), (OSError("no network"), 1)):
        monkeypatch.setattr(lpips, "make", fails(error))
        assert lpips.main([]) == code
        assert capsys.readouterr().err == f"fastgen: {error}\n"


def test_nothing_heavy_is_imported_by_training_with_it(world: tuple[Path, Any]) -> None:
    code = (
        "import sys; from fastgen import distance, lpips; from pathlib import Path; "
        f"lpips.load(Path({str(world[0])!r})); "
        "print({'torchmetrics', 'torchvision', 'diffusers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# Of latents


def seeing(family: Family, side: int) -> Family:
    """The family with a decoder that shows a latent's two channels and their mean, ``side`` pixels wide."""

    def decode(latents: Tensor) -> Tensor:
        pixels = torch.cat([latents, latents.mean(1, keepdim=True)], 1)
        return F.interpolate(pixels, (side, side))

    return replace(family, decode=decode, image_size=(side, side))


@pytest.mark.parametrize(
    ("side", "size", "seen"), [(32, 16, 16), (255, 64, 64), (256, 64, 256), (32, 0, 32), (8, 24, 24), (64, 224, 224)]
)
def test_images_of_less_than_256_pixels_are_resized_first(
    world: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, side: int, size: int, seen: int
) -> None:
    family, found = seeing(conv_family(), side), []

    def forward(self: Lpips, x: Tensor, y: Tensor) -> Tensor:
        found.append((x, y))
        return x.flatten(1).mean(1)

    monkeypatch.setattr(Lpips, "forward", forward)
    x, y = torch.randn(2, 2, 8, 8), torch.randn(2, 2, 8, 8)
    distance.of_images(Perceptual(str(world[0]), size), family)(x, y)
    for latents, pixels in zip((x, y), found[0], strict=True):
        assert pixels.shape == (2, 3, seen, seen)
        expected = family.decode(latents)
        if seen != side:
            expected = F.interpolate(expected, seen, mode="bilinear", align_corners=False)
        torch.testing.assert_close(pixels, expected)


def test_of_videos_it_is_the_mean_over_the_frames(world: tuple[Path, Any]) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = (torch.rand(2, 3, 4, 16, 16, generator=g) * 2 - 1 for _ in range(2))
    family = replace(conv_family(), decode=lambda latents: latents, image_size=(16, 16))
    found = distance.of_images(Perceptual(str(world[0]), 0), family)
    frames = torch.stack([found(x[:, :, i], y[:, :, i]) for i in range(4)])
    torch.testing.assert_close(found(x, y), frames.mean(0))


def test_images_too_small_for_vgg16_are_refused(world: tuple[Path, Any]) -> None:
    with pytest.raises(ValueError, match=r"images of 8 pixels: LPIPS needs 16; set lpips\.size 16 or more"):
        distance.of_images(Perceptual(str(world[0]), 0), seeing(conv_family(), 8))
    with pytest.raises(ValueError, match=r"lpips\.size 15: LPIPS needs 16; set lpips\.size 16 or more"):
        distance.of_images(Perceptual(str(world[0]), 15), seeing(conv_family(), 64))


def test_the_other_distances_need_no_weights() -> None:
    x, y = torch.randn(2, 2, 8, 8), torch.randn(2, 2, 8, 8)
    options = Perceptual("/nowhere")
    torch.testing.assert_close(distance.make("l2", conv_family(), options)(x, y), losses.mse(x, y))
    found = distance.make("pseudo_huber", conv_family(), options, 0.3)(x, y)
    torch.testing.assert_close(found, losses.pseudo_huber(x, y, 0.3))


def test_the_default_is_the_consistency_models_size_and_options_are_read_from_yaml() -> None:
    assert Perceptual().size == 224
    for module, _, _ in METHODS.values():
        tree = {"distance": "lpips", "lpips": {"weights": "x", "size": 64}}
        found = config.decode(module.Config, tree, "run.yaml")
        assert (found.distance, found.lpips) == ("lpips", Perceptual("x", 64))
    with pytest.raises(config.ConfigError, match=r"lpips\.size must be at least 0, got -1"):
        config.decode(kd.Config, {"lpips": {"size": -1}}, "run.yaml")


# In the methods


def made(name: str, file: Path, family: Family, num_steps: int = 1, **changes: Any) -> Any:
    module, _, options = METHODS[name]
    chosen = {**options, "lpips": Perceptual(str(file), 0), **changes}
    torch.manual_seed(0)
    return module.Method(module.Config(**chosen), family, num_steps)


def loss(method: Any, batch: Any) -> dict[str, Tensor]:
    phase = method.phases[0]
    return dict(phase.loss(batch, Noise(batch.samples, 0, 0, phase.name)))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_s_term_is_lpips_of_what_its_l2_compares(
    world: tuple[Path, Any], network: Lpips, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same two latents, decoded; the weight of the term as for any distance."""
    family, batch, term = seeing(conv_family(), 32), Samples((2, 8, 8)).batch(range(3)), METHODS[name][1]
    pairs: list[tuple[Tensor, Tensor]] = []
    plain = made(name, world[0], family, distance="l2")
    compare = plain.distance
    plain.distance = lambda x, y: pairs.append((x, y)) or compare(x, y)
    expected = loss(plain, batch)[term] / losses.mse(*pairs[0])
    found = loss(made(name, world[0], family, distance="lpips"), batch)[term]
    x, y = pairs[0]
    assert not y.requires_grad
    torch.testing.assert_close(found, expected * network(family.decode(x), family.decode(y)), rtol=1e-3, atol=1e-6)
    assert found.shape == (3,)
    assert found.min() > 0


def test_a_weight_by_time_stays_with_it(world: tuple[Path, Any]) -> None:
    """ect's 1 / (kappa_t - kappa_r)."""
    family, batch = seeing(conv_family(), 32), Samples((2, 8, 8)).batch(range(4))
    options: dict[str, Any] = {"variant": "ect", "solver": None, "curriculum_steps": 10, "distance": "lpips"}
    weighted = made("consistency", world[0], family, **options)
    found = loss(weighted, batch)["consistency"]
    drawn = weighted.pair(Noise(batch.samples, 0, 0, "student"))
    plain = loss(made("consistency", world[0], family, **options, weight="uniform"), batch)["consistency"]
    torch.testing.assert_close(found, weighted.weight(*drawn).to(plain) * plain, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found, plain, rtol=0.1)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_through_a_real_decoder_the_whole_student_learns_and_nothing_else(
    world: tuple[Path, Any], name: str, autocast: torch.dtype | None
) -> None:
    pipeline = tiny.pipeline("v_prediction")
    family = sd.wrap(pipeline, autocast)
    cond, uncond = family.encode_prompts(tiny.PROMPTS[:2]), family.uncond()
    latents = Samples(family.latent_shape)

    class Data:
        def batch(self, samples: Any) -> Any:
            return replace(latents.batch(samples), cond=cond, uncond=uncond)

    vae = {key: value.clone() for key, value in pipeline.vae.state_dict().items()}
    method = made(name, world[0], family, distance="lpips")
    term = loss(method, Data().batch(range(2)))[METHODS[name][1]]
    learning = [p for p in method.networks["student"].parameters() if p.requires_grad]
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(term.sum(), learning))
    before = states(method)
    engine = Engine(method, Data(), optims(method, lr=1e-3, weight_decay=0.0), batch_size=2, steps=2)
    logs = train(engine, range(2))
    assert all(abs(value) < 1e6 for log in logs for value in log.values())
    after = states(method)
    assert moved(before["student"], after["student"])
    assert "teacher" not in before or same(before["teacher"], after["teacher"])
    assert same(vae, pipeline.vae.state_dict())
    assert all(p.grad is None and not p.requires_grad for p in pipeline.vae.parameters())


def test_a_student_fits_its_pairs_by_it(world: tuple[Path, Any]) -> None:
    family, data = seeing(conv_family(), 16), Samples((2, 8, 8))
    method = made("kd", world[0], family, distance="lpips")

    class Same:
        def batch(self, samples: Any) -> Any:
            return data.batch(range(4))

    logs = train(Engine(method, Same(), optims(method, lr=3e-3), batch_size=4, steps=40), range(40))
    values = [log["student/regression"] for log in logs]
    assert values[-1] < 0.5 * values[0]
