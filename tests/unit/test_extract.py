"""``fastgen extract-lora``: singular values against closed forms, then whole files in stock pipelines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastgen import export, extract, lora
from fastgen.extract import Kept, Options, Weights, compare, factors, product
from fastgen.pipelines import sd, unet
from tests import command, tiny
from tests.command import done, fastgen

SHAPES = [(12, 7), (7, 12), (6, 5, 3, 3), (4, 3, 1, 1), (5, 4, 3, 3, 3)]
FILE = "diffusion_pytorch_model.safetensors"


def of_rank(shape: tuple[int, ...], rank: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    columns = int(torch.tensor(shape[1:]).prod())
    return (torch.randn(shape[0], rank, generator=g) @ torch.randn(rank, columns, generator=g)).reshape(shape)


# One matrix


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_difference_of_rank_r_comes_back_exactly_at_rank_r(shape: tuple[int, ...], rank: int) -> None:
    difference = of_rank(shape, rank)
    a, b, kept, whole = factors(difference, rank)
    assert a.shape == (rank, *shape[1:])
    assert b.shape == (shape[0], rank, *(1,) * (len(shape) - 2))
    assert (product(a, b) - difference).abs().max() <= 1e-5 * difference.abs().max()
    assert kept == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 2, 3, 50])
def test_what_is_kept_is_the_share_of_squared_singular_values(shape: tuple[int, ...], rank: int) -> None:
    difference = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    a, b, kept, whole = factors(difference, rank)
    squares = torch.linalg.svdvals(difference.double().flatten(1)).square()
    assert kept == pytest.approx(float(squares[:rank].sum()), rel=1e-5)
    assert whole == pytest.approx(float(difference.double().square().sum()), rel=1e-5)
    assert kept == pytest.approx(float(product(a, b).double().square().sum()), rel=1e-5)
    lost = float((difference - product(a, b)).double().square().sum())
    assert lost == pytest.approx(whole - kept, rel=1e-4, abs=1e-5 * whole)


def test_a_known_matrix() -> None:
    """diag(3, 4) without its smaller value: 16 of 25."""
    a, b, kept, whole = factors(torch.diag(torch.tensor([3.0, 4.0])), 1)
    assert (kept, whole) == (pytest.approx(16.0), pytest.approx(25.0))
    assert torch.allclose(product(a, b), torch.diag(torch.tensor([0.0, 4.0])), atol=1e-6)
    assert a.norm() == pytest.approx(b.norm()), "the singular values are shared evenly"


def test_the_product_is_what_peft_adds_to_a_convolution() -> None:
    conv = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    a, b = torch.randn(2, 3, 3, 3), torch.randn(5, 2, 1, 1)
    x = torch.randn(1, 3, 6, 6)
    through = nn.functional.conv2d(nn.functional.conv2d(x, a, padding=1), b)
    with torch.no_grad():
        conv.weight.copy_(product(a, b))
        assert torch.allclose(conv(x), through, atol=1e-4)


def test_beyond_the_smaller_side_a_file_holds_zeros() -> None:
    """Of one rank everywhere: older Diffusers scales layers of other ranks wrongly where the file has no alpha."""
    a, b, kept, whole = factors(torch.randn(2, 9), 6)
    assert a.shape == (6, 9)
    assert b.shape == (2, 6)
    assert not a[2:].any()
    assert not b[:, 2:].any()
    assert kept == whole


# Two checkpoints

BASE = {
    "one.weight": torch.ones(4, 3),
    "one.bias": torch.zeros(4),
    "norm.weight": torch.ones(4),
    "two.weight": torch.ones(2, 4),
}
LAYERS = ["one", "two"]


def test_layers_that_differ_are_in_the_file_and_the_rest_is_told() -> None:
    student = BASE | {
        "one.weight": BASE["one.weight"] + of_rank((4, 3), 2),
        "one.bias": torch.full((4,), 2.0),
        "norm.weight": BASE["norm.weight"] + 1,
        "guide.weight": torch.full((2, 2), 3.0),
        "zero.weight": torch.zeros(9),
    }
    tensors, kept = compare(BASE, student, LAYERS, 2)
    assert set(tensors) == {"one.lora_A.weight", "one.lora_B.weight"}
    made = product(tensors["one.lora_A.weight"], tensors["one.lora_B.weight"])
    assert torch.allclose(made, student["one.weight"] - BASE["one.weight"], atol=1e-5)
    assert kept.share == pytest.approx(1.0)
    assert kept.left_out == {"one.bias": (4, 16.0), "norm.weight": (4, 4.0), "guide.weight": (4, 36.0)}
    whole = kept.layers["one"][1] + 16 + 4 + 36
    assert extract.unheld(kept) == (
        f"biases (1 tensor, 4 values, {16 / whole:.2%} of the squared difference), "
        f"weights of norms (1 tensor, 4 values, {4 / whole:.2%} of the squared difference), "
        f"guide.weight (4 values, {36 / whole:.2%} of the squared difference)"
    )


def test_shares_add_up_over_layers() -> None:
    kept = Kept({"a.0.x": (1.0, 2.0), "a.0.y": (3.0, 4.0), "a.1.x": (0.0, 1.0), "b": (3.0, 3.0)}, {})
    assert kept.share == pytest.approx(0.7)
    assert extract.table(kept) == [
        ("a.0", "2", "66.67%"),
        ("a.1", "1", "0.00%"),
        ("b", "1", "100.00%"),
        ("all", "4", "70.00%"),
    ]


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (
            {"one.weight": BASE["one.weight"]},
            "the student lacks 'norm.weight'; it is of another network than the base",
        ),
        (
            BASE | {"one.weight": torch.ones(4, 5)},
            r"'one.weight' is \(4, 3\) in the base and \(4, 5\) in the student; they are of different networks",
        ),
        (
            BASE | {"two.weight": torch.full((2, 4), torch.inf)},
            "'two.weight' is not finite in the base or the student",
        ),
        (BASE, "the layers of base and student do not differ; there is nothing to make a LoRA file of"),
        (BASE | {"one.bias": torch.ones(4)}, "the layers of base and student do not differ"),
    ],
)
def test_what_is_no_pair_of_checkpoints_is_refused(student: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(BASE, student, LAYERS, 2)


# Files


def test_weights_are_read_of_one_file_or_several(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "m-00001-of-00002.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "m-00002-of-00002.safetensors")
    save_file({"b": torch.ones(9)}, tmp_path / "m.fp16-00002-of-00002.safetensors")  # of a variant: not these
    found = Weights(tmp_path)
    assert sorted(found) == ["a", "b"]
    assert len(found) == 2
    assert found["b"].shape == (3,)


def test_a_variant_alone_is_better_than_nothing(tmp_path: Path) -> None:
    save_file({"b": torch.ones(9)}, tmp_path / "m.fp16.safetensors")
    assert Weights(tmp_path)["b"].shape == (9,)


def test_a_folder_without_weights_or_with_damaged_ones_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^{tmp_path}: holds no weights in safetensors; save it again"):
        Weights(tmp_path)
    (tmp_path / "m.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"m.safetensors: damaged weights \(.+\); save or download them again"):
        Weights(tmp_path)


# Whole pipelines


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = command.teacher(tmp_path_factory.mktemp("base") / "base")
    (folder / "README.md").write_text("---\nlicense: openrail++\nbase_model: owner/origin\n---\n")
    return folder


def moved(rank: int, biases: bool = False, embed: float = 0.0) -> nn.Module:
    """A student whose layers are moved by matrices of this rank."""
    network = sd.wrap(tiny.pipeline("v_prediction")).student()
    with torch.no_grad():
        for i, name in enumerate(lora.layers_of(network)):
            layer: Any = network.get_submodule(name)
            if name != "time_embedding.cond_proj":
                layer.weight += 0.02 * of_rank(tuple(layer.weight.shape), rank, i)
            if biases and layer.bias is not None:
                layer.bias += 0.1
        projection: Any = network.get_submodule("time_embedding.cond_proj")
        projection.weight += embed
    return network.eval()


def exported(network: nn.Module, folder: Path, num_steps: int = 2) -> Path:
    family = sd.wrap(tiny.pipeline("v_prediction"))
    card = {"method": "dmd2", "num_inference_steps": num_steps, "guidance_scale": 1.0, "times": [999.0, 499.0]}
    export.export(family, network, num_steps, folder, prompts=tiny.PROMPTS[:2], card=card)
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(moved(2), tmp_path_factory.mktemp("student") / "student")


def latents(pipeline: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    return pipeline(tiny.PROMPTS[:2], generator=torch.Generator().manual_seed(3), **call).images  # type: ignore[no-any-return]


def with_lora(base: Path, folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(folder, weight_name=export.LORA)
    pipeline.scheduler = LCMScheduler.from_pretrained(folder, subfolder="scheduler")
    return pipeline


def test_at_the_difference_s_own_rank_the_base_becomes_the_student(base: Path, student: Path, tmp_path: Path) -> None:
    result = done("extract-lora", base, student, "--rank", 2, "--out", tmp_path / "lora")
    assert result.out.splitlines()[-1] == (
        f"{tmp_path / 'lora'} keeps 100.00% of the squared Frobenius norm of the difference"
    )
    assert "left out" not in result.err
    theirs = latents(StableDiffusionPipeline.from_pretrained(student))
    ours = latents(with_lora(base, tmp_path / "lora"))
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    plain = StableDiffusionPipeline.from_pretrained(base)
    plain.scheduler = LCMScheduler.from_pretrained(tmp_path / "lora", subfolder="scheduler")
    assert (latents(plain) - theirs).abs().max() > 1e-2 * theirs.abs().max()
    card = export.read_card(tmp_path / "lora")
    assert (card["method"], card["num_inference_steps"], card["guidance_scale"]) == ("dmd2", 2, 1.0)
    assert card["lora"]["energy"] == pytest.approx(1.0)
    assert card["lora"]["left_out"] == []
    assert set(card["lora"]["layers"]) == {n for n in lora.layers_of(moved(1)) if "cond_proj" not in n}


def test_a_smaller_rank_keeps_less_and_says_of_what(base: Path, student: Path, tmp_path: Path) -> None:
    kept = extract.extract(str(base), str(student), tmp_path / "lora", Options(1))
    assert 0.3 < kept.share < 0.95
    ours, theirs = (Weights(folder / "unet") for folder in (student, base))
    kept_now, whole = 0.0, 0.0
    for name in kept.layers:
        values = torch.linalg.svdvals((ours[f"{name}.weight"] - theirs[f"{name}.weight"]).double().flatten(1)).square()
        kept_now, whole = kept_now + float(values[0]), whole + float(values.sum())
        assert kept.layers[name] == pytest.approx((float(values[0]), float(values.sum())), rel=1e-4)
    assert kept.share == pytest.approx(kept_now / whole, rel=1e-4)


def test_its_card_says_what_it_is_and_calls_it(base: Path, student: Path, tmp_path: Path) -> None:
    extract.extract(str(base), str(student), tmp_path / "lora", Options(2, dtype="fp16"))
    assert {v.dtype for v in load_file(tmp_path / "lora" / export.LORA).values()} == {torch.float16}
    card = ModelCard((tmp_path / "lora" / "README.md").read_text())
    assert (card.data.license, card.data.base_model) == ("openrail++", "owner/origin")
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert "Improved Distribution Matching" in card.text
    assert "keeps 100.00% of the squared Frobenius norm" in card.text
    code = card.text.partition("```python\n")[2].partition("\n```")[0]
    assert "dtype=torch.float16" in code
    code = code.replace("path/to/base", str(base)).replace("path/to/lora", str(tmp_path / "lora"))
    found: dict[str, Any] = {}
    exec(code.replace(", dtype=torch.float16", ""), found)
    assert found["image"].size == (16, 16)


def test_what_no_lora_holds_is_refused_or_left_out(base: Path, tmp_path: Path) -> None:
    folder = exported(moved(2, biases=True), tmp_path / "student")
    result = fastgen("extract-lora", base, folder, "--rank", 2, "--out", tmp_path / "lora")
    assert result.code == 2
    assert len(result.err.splitlines()) == 1
    assert "student: no LoRA file holds all of its difference from " in result.err
    assert ": biases (" in result.err
    assert "; add --leave-out to go on without" in result.err
    assert not (tmp_path / "lora").exists()
    result = done("extract-lora", base, folder, "--rank", 2, "--out", tmp_path / "lora", "--leave-out")
    assert "left out: " in result.err
    left_out = export.read_card(tmp_path / "lora")["lora"]["left_out"]
    assert left_out
    assert all(name.endswith(".bias") for name in left_out)
    weights = StableDiffusionPipeline.from_pretrained(base)
    family = sd.wrap(StableDiffusionPipeline.from_pretrained(folder))
    network: Any = family.denoiser.network
    for name, value in weights.unet.state_dict().items():
        if name in left_out:
            network.get_parameter(name).data.copy_(value)
    theirs = family.pipeline(network, None)
    theirs.scheduler = LCMScheduler.from_pretrained(tmp_path / "lora", subfolder="scheduler")
    ours = latents(with_lora(base, tmp_path / "lora"))
    assert (ours - latents(theirs)).abs().max() <= 1e-4 * ours.abs().max()


def test_a_learnt_guidance_embedding_is_named(base: Path, tmp_path: Path) -> None:
    made = tiny.pipeline("v_prediction")
    made.unet = moved(1, embed=0.1)
    assert unet.takes_guidance(made.unet)
    made.save_pretrained(tmp_path / "student")
    with pytest.raises(ValueError, match=r": time_embedding.cond_proj.weight \(512 values, \d.*% of the squared"):
        extract.extract(str(base), str(tmp_path / "student"), tmp_path / "lora", Options(1))
    kept = extract.extract(str(base), str(tmp_path / "student"), tmp_path / "lora", Options(1, leave_out=True))
    assert list(kept.left_out) == ["time_embedding.cond_proj.weight"]
    assert "num_inference_steps" not in export.read_card(tmp_path / "lora")


@pytest.mark.parametrize("form", ["component", "bare"])
def test_a_component_s_folder_does_too(base: Path, student: Path, tmp_path: Path, form: str) -> None:
    folder = tmp_path / "component"
    if form == "component":
        for name in ("unet", "scheduler"):
            shutil.copytree(student / name, folder / name)
        shutil.copy(student / export.CARD, folder)
    else:
        shutil.copytree(student / "unet", folder)
    extract.extract(str(base), str(folder), tmp_path / "lora", Options(2))
    extract.extract(str(base), str(student), tmp_path / "whole", Options(2))
    ours, theirs = (load_file(tmp_path / name / export.LORA) for name in ("lora", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    scheduler = json.loads((tmp_path / "lora" / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    assert scheduler == ("LCMScheduler" if form == "component" else "DDIMScheduler")


def test_what_is_not_of_one_family_is_refused(base: Path, student: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"none: has no unet; name the folder of a pipeline, or of its unet alone"):
        extract.extract(str(base), str(tmp_path / "none"), tmp_path / "lora", Options())
    shutil.copytree(student, tmp_path / "other")
    path = tmp_path / "other" / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "UNet2DModel"}))
    with pytest.raises(
        ValueError,
        match=r"other: its network is a UNet2DModel, that of \S+base a UNet2DConditionModel; name two of one",
    ):
        extract.extract(str(base), str(tmp_path / "other"), tmp_path / "lora", Options())
    assert not (tmp_path / "lora").exists()


def test_a_pipeline_that_takes_no_lora_files_is_refused(
    base: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    load = sd.load
    monkeypatch.setattr(sd, "load", lambda *a, **k: replace(load(*a, **k), component=""))
    with pytest.raises(ValueError, match="base: its pipeline takes no LoRA files"):
        extract.extract(str(base), str(student), tmp_path / "lora", Options())


def test_nothing_is_written_where_the_file_does_not_do_it(
    base: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = extract.compare

    def wrong(*args: Any) -> Any:
        tensors, kept = whole(*args)
        return {name: value for name, value in tensors.items() if not name.startswith("conv_in.lora_A")}, kept

    monkeypatch.setattr(extract, "summed", lambda *_: None)  # the student whole, though the rank is too small
    with pytest.raises(export.ExportError, match=r"not written: with it .* differs from the exported pipeline by"):
        extract.extract(str(base), str(student), tmp_path / "lora", Options(1))
    monkeypatch.undo()
    monkeypatch.setattr(extract, "compare", wrong)
    monkeypatch.setattr(extract, "summed", lambda *_: None)
    with pytest.raises(export.ExportError, match=f"{export.LORA} not written"):
        extract.extract(str(base), str(student), tmp_path / "lora", Options(2))
    assert list(tmp_path.iterdir()) == []


def test_the_base_s_licence_is_told_first(base: Path, student: Path, tmp_path: Path) -> None:
    result = fastgen("extract-lora", base, student, "--rank", 2, "--out", tmp_path / "x", "--license", "mit")
    assert (result.code, result.err) == (
        2,
        f"fastgen: {base}: its README.md says its licence is openrail++; leave out --license mit\n",
    )
    assert not (tmp_path / "x").exists()
