"""Frozen networks in half precision: fewer bytes, the same numbers, and full precision again in what is exported."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastgen import config, lora, precision, recipe, train
from fastgen.experts import members
from fastgen.lora import Lora
from tests import command, tiny
from tests.unit import test_attention as attentions

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("diffusers").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return command.world(tmp_path_factory.mktemp("world"))


def decoded(world: Path, *changes: str) -> recipe.Recipe:
    tree = config.override(config.read(world / "run.yaml"), changes)
    return recipe.decode(tree, "run.yaml")


# of Flux's own norms, whose weights are float32 in either case
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("make", [attentions.unet, attentions.flux])
@pytest.mark.parametrize("dtype", HALVES.values(), ids=str)
def test_under_autocast_not_a_bit_changes(make: Any, dtype: torch.dtype) -> None:
    plain, held = make(), make()
    saved = precision.lower([held], [], dtype)
    weights = [m.weight for m in plain.modules() if isinstance(m, precision.LAYERS)]
    assert saved == sum(2 * w.numel() for w in weights)
    assert saved > 0.4 * sum(p.numel() * p.element_size() for p in plain.parameters())
    before = {name: p for name, p in plain.named_parameters()}
    for name, p in held.named_parameters():
        assert p.dtype == (dtype if any(before[name] is w for w in weights) else torch.float32)
    with torch.autocast("cpu", dtype):
        assert torch.equal(attentions.called(plain), attentions.called(held))


def gradients(network: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = network(x, torch.tensor([500.0]), encoder_hidden_states=torch.ones(1, 16, 16), return_dict=False)[0]
    return torch.autograd.grad(y.float().square().sum(), x)[0]


def test_gradients_to_its_inputs_are_the_same() -> None:
    plain, held = attentions.unet(), attentions.unet()
    precision.lower([held], [], torch.bfloat16)
    x = torch.ones(1, 4, 8, 8, requires_grad=True)
    assert torch.equal(gradients(plain, x), gradients(held, x))


def test_what_learns_stays_as_it_is_and_what_is_shared_stays_shared() -> None:
    teacher = tiny.unet().requires_grad_(False)
    base = lora.view(teacher, Lora(rank=2))
    student, fake_score = base.with_adapter(), base.with_adapter()  # type: ignore[operator]
    precision.lower([teacher, base, student, fake_score], [student, fake_score], torch.bfloat16)
    assert {p.dtype for p in (*student.parameters(), *fake_score.parameters())} == {torch.float32}
    inner = lora.plain(base)
    for name, layer in teacher.named_modules():
        if isinstance(layer, precision.LAYERS):
            found: Any = inner.get_submodule(name)
            assert layer.weight.dtype == torch.bfloat16
            assert found.base_layer.weight.data_ptr() == layer.weight.data_ptr()
            assert dict(base.named_parameters())[f"{name}.weight"] is found.base_layer.weight
    whole = copy.deepcopy(teacher)
    other = tiny.unet()
    precision.lower([whole, other], [other], torch.bfloat16)
    assert not precision.lowered(other)


def test_weights_come_back_from_where_they_came() -> None:
    network = tiny.unet()
    original = {name: value.clone() for name, value in network.state_dict().items()}
    precision.lower([network], [], torch.bfloat16)
    assert precision.lowered(network)
    assert precision.restore([network], lambda: [original]) == 0
    assert not precision.lowered(network)
    assert all(torch.equal(original[name], value) for name, value in network.state_dict().items())
    precision.lower([network], [], torch.bfloat16)
    held = {name: value.clone() for name, value in network.state_dict().items()}
    lost = {name: value for name, value in original.items() if name != "conv_in.weight"}
    assert precision.restore([network], lambda: [lost]) == 1
    assert torch.equal(network.state_dict()["conv_in.weight"], held["conv_in.weight"].float())

    def unasked() -> list[dict[str, Tensor]]:
        raise AssertionError

    assert precision.restore([network], unasked) == 0


def bytes_of(session: train.Session, role: str) -> dict[torch.dtype, int]:
    found: dict[torch.dtype, int] = {}
    for network in members(session.method.networks[role]):
        for p in network.parameters():
            found[p.dtype] = found.get(p.dtype, 0) + p.numel() * p.element_size()
    return found


@pytest.mark.parametrize("student", ["{}", "{lora: {rank: 2}}", "{lora: {rank: 2}, share_backbone: true}"])
def test_a_training_is_the_same_and_its_teacher_half_as_large(student: str, world: Path) -> None:
    given = ("run.precision=bf16", f"student={student}")
    plain, held = (train.build(decoded(world, *given, f"model.dtype={dtype}")) for dtype in ("fp32", "bf16"))
    teachers = [bytes_of(session, "teacher") for session in (plain, held)]
    assert list(teachers[0]) == [torch.float32]
    assert sum(teachers[1].values()) < 0.6 * sum(teachers[0].values())
    for role in ("student", "fake_score"):
        assert bytes_of(held, role) == bytes_of(plain, role)
        assert list(bytes_of(held, role)) == [torch.float32]
    assert [logs for _, logs in plain.engine.run(range(3))] == [logs for _, logs in held.engine.run(range(3))]


def test_an_exported_adapter_s_pipeline_has_the_teacher_s_own_digits(world: Path, tmp_path: Path) -> None:
    """The base of the adapter is in bf16 while it trains, and in float32 again where the two are fused."""
    chosen = ("run.precision=bf16", "student.lora={rank: 2, targets: [to_q]}", "run.steps=2", f"run.out={tmp_path}")
    train.train(decoded(world, *chosen, "model.dtype=bf16"))
    name = "unet/diffusion_pytorch_model.safetensors"
    teacher, made = load_file(world / "teacher" / name), load_file(tmp_path / "pipeline" / name)
    changed = {key for key, value in teacher.items() if not torch.equal(made[key], value)}
    assert changed
    assert all(key.endswith("to_q.weight") for key in changed)
    assert not any(
        torch.equal(made[key], made[key].bfloat16().float()) for key in teacher if key.endswith("conv1.weight")
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            ["model.dtype=bf16"],
            "^model.dtype bf16 needs run.precision bf16: networks are held in what they compute in$",
        ),
        (["model.dtype=fp16", "run.precision=bf16"], "model.dtype fp16 needs run.precision fp16"),
        (
            ["model.dtype=bf16", "run.precision=bf16", "method={name: scm}", "student.lora={rank: 2}"],
            "^model.dtype bf16: derivatives of student are computed in float32; set model.dtype fp32$",
        ),
    ],
)
def test_what_would_compute_something_else_is_refused(changes: list[str], words: str, world: Path) -> None:
    tree = config.read(world / "run.yaml")
    if "method={name: scm}" in changes:
        tree |= {"method": {"name": "scm"}, "data": {"source": "images", "path": str(world / "images")}}
        tree["optim"] = {"student": {"lr": 1e-3}}
        changes = [c for c in changes if not c.startswith("method")]
    with pytest.raises(ValueError, match=words):
        train.build(recipe.decode(config.override(tree, changes), "run.yaml"))
