"""Which networks are split over processes, by what, and what is refused before anything loads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from torch import nn

from fastgen import parallel, recipe, sharding, train
from fastgen.pipelines import flux
from tests import tiny
from tests.command import RECIPE

ROOT = Path(__file__).parents[2]
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were two processes, so far as it is only asked."""
    monkeypatch.setattr(parallel, "together", lambda: True)


def told(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


# What is chosen


@pytest.mark.usefixtures("two")
def test_the_launcher_chooses_and_the_recipe_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sharding.chosen() is None
    assert sharding.chosen("zero2") == "zero2"
    told(monkeypatch, **FSDP2)
    assert sharding.chosen() == "full"
    assert sharding.chosen("none") is None
    assert sharding.chosen("zero2") == "zero2"
    told(monkeypatch, FSDP_RESHARD_AFTER_FORWARD="false")
    assert sharding.chosen() == "zero2"
    told(monkeypatch, ACCELERATE_USE_FSDP="false")
    assert sharding.chosen() is None


def test_one_process_splits_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, **FSDP2)
    assert sharding.chosen() is None
    assert sharding.chosen("full") is None


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed takes one network .* configs/accelerate/zero2.yaml splits"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM trains language models; use configs/accelerate/fsdp2"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP version 1 takes one network; use configs/accelerate/fsdp2.yaml"),
        ({**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params is not known here; set it false"),
    ],
)
def test_other_engines_are_refused(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str) -> None:
    told(monkeypatch, **variables)
    with pytest.raises(ValueError, match=message):
        sharding.chosen()


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"student": {"steps": 1, "lora": {"rank": 4}}}, "student.lora"),
        ({"model": {"family": "sd", "path": "p", "compile": True}}, "model.compile"),
        ({"run": {"out": "o", "steps": 1, "precision": "fp16", "shard": "zero2"}}, "run.precision: fp16"),
        ({"run": {"out": "o", "steps": 1, "offload": True, "shard": "full"}}, "run.offload"),
        ({"optim": {"student": {"name": "adamw8bit"}, "fake_score": {}}}, "the optimizer adamw8bit"),
        ({"optim": {"student": {"name": "muon"}, "fake_score": {}}}, "the optimizer muon"),
    ],
)
def test_what_does_not_go_with_it_is_refused_before_anything_loads(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], what: str
) -> None:
    import yaml

    told(monkeypatch, **FSDP2)
    tree = yaml.safe_load(RECIPE.format(teacher="no/such", prompts="prompts.txt", out="out")) | changes
    kind = tree["run"].get("shard", "full")
    with pytest.raises(ValueError, match=rf"split over processes \({kind}\) do not go with {what}; leave it out, or"):
        train.build(recipe.decode(tree, "run.yaml"), torch.device("cpu"))


def test_networks_of_several_experts_are_refused() -> None:
    method: Any = SimpleNamespace(networks={"student": nn.ModuleList([nn.Linear(1, 1)])})
    family: Any = SimpleNamespace(denoiser=SimpleNamespace(network=nn.Linear(1, 1)))
    with pytest.raises(
        ValueError, match=r"student: of several experts each process would call its own.*run.shard=none"
    ):
        train.split(method, family, "full", torch.device("cpu"))


def test_no_part_of_a_network_is_exported() -> None:
    session: Any = SimpleNamespace(shard="full")
    with pytest.raises(ValueError, match="out: no process has the whole network; export with one"):
        train.export_run(session, Path("out"))


# What is split by itself


def test_the_blocks_that_diffusers_names_are_split_by_themselves() -> None:
    found = sharding.blocks(tiny.unet())
    kinds = {type(part).__name__ for part in found.values()}
    assert kinds == {"BasicTransformerBlock", "ResnetBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}
    assert "up_blocks.1" in found
    assert "up_blocks.1.attentions.0.transformer_blocks.0" in found
    assert list(found).index("up_blocks.1") < list(found).index("up_blocks.1.attentions.0.transformer_blocks.0")


def test_of_other_networks_the_members_of_the_outermost_lists_are() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)]))
    network = nn.ModuleDict({"first": nn.Linear(2, 2), "blocks": nn.ModuleList([inner, nn.ReLU()])})
    assert list(sharding.blocks(network)) == ["blocks.0"]
    assert sharding.blocks(nn.Linear(2, 2)) == {}


# Weights that are read later


def test_a_network_is_outlined_by_its_files_and_so_are_its_copies(tmp_path: Path) -> None:
    whole = tiny.unet()
    whole.save_pretrained(tmp_path, max_shard_size="50KB")
    save_file({"other": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert len([*tmp_path.glob("*.safetensors")]) > 2
    with torch.device("meta"):
        made = type(whole).from_config(whole.config)
    assert sharding.outlined(made, tmp_path, torch.device("cpu"))
    inside = tuple(f"{name}." for name in sharding.blocks(whole))
    for (name, p), (_, other) in zip(made.named_parameters(), whole.named_parameters(), strict=True):
        assert p.is_meta if name.startswith(inside) else torch.equal(p, other)
    files = vars(made)["stored"]
    for name, value in whole.named_parameters():
        assert torch.equal(files.rows(name, slice(1, 3), torch.float32), value[1:3])
    assert sharding.is_outlined(sharding.move(made, torch.device("cpu")))


def test_a_network_whose_files_have_other_names_is_not_outlined(tmp_path: Path) -> None:
    whole = tiny.unet()
    weights = {name: value for name, value in whole.state_dict().items() if name != "conv_in.bias"}
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    assert not sharding.outlined(whole, tmp_path, torch.device("cpu"))


def test_weights_without_values_and_files_are_an_error() -> None:
    with torch.device("meta"):
        network = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Linear: has weights without values, and no files to read them from"):
        sharding.fill(network, torch.device("cpu"))


def test_a_guidance_embedding_is_not_added_to_an_outlined_flux() -> None:
    with torch.device("meta"):
        network = FluxTransformer2DModel(
            in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1,
            joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4)
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"guidance.embed: this network's weights are read only when it is split"):
        flux.student(network, embed_guidance=True)
